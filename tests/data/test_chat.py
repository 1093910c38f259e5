"""Chats: what is trained on, in which context; what is refused; packed rows as Megatron reads them."""

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.chat import PACKED, BadChat, ChatEncoder, pack_samples, read_messages
from alloy.data.tokens import save_tokenizer, train_tokenizer
from tests.data.test_data_cli import run

SYSTEM = "<|im_start|>system\n<|im_end|>\n"
# Qwen's way: no thoughts, no system turn of its own
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four, five and six; assistant system user think\n"] * 5, vocab=300)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, thought: str | None = None) -> dict:
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})


def turns(tokenizer, sample) -> tuple[str, list[str]]:
    """The text of a sample, and of each run of ids whose loss counts."""
    runs, inside = [], False
    for token, counts in zip(sample.ids[1:], sample.mask[:-1], strict=True):
        if counts:
            runs = [*runs, []] if not inside else runs
            runs[-1].append(token)
        inside = bool(counts)
    return tokenizer.decode(sample.ids), [tokenizer.decode(run) for run in runs]


def test_only_answers_are_trained_on(tokenizer) -> None:
    """Without thoughts a chat is one sample; what the prompt of each answer holds, and what follows its end, is not trained."""
    chat = [user("one"), assistant("two"), user("three"), assistant("four"), user("bye")]
    (sample,) = ChatEncoder(tokenizer).encode(chat)
    text, trained = turns(tokenizer, sample)
    assert text == SYSTEM + (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think></think>two<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n<think></think>four<|im_end|>\n"
    )
    assert trained == ["two<|im_end|>", "four<|im_end|>"]


def test_each_thought_is_trained_in_its_own_context(tokenizer) -> None:
    """The template cuts thoughts of earlier turns: two samples, each as its answer is generated; stripped, one."""
    chat = [user("one"), assistant("two", "five"), user("three"), assistant("<think>\nsix\n</think>\n\nfour")]
    first, second = (turns(tokenizer, sample) for sample in ChatEncoder(tokenizer).encode(chat))
    start = SYSTEM + "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert first == (start + "<think>\nfive\n</think>\ntwo<|im_end|>\n", ["five\n</think>\ntwo<|im_end|>"])
    assert second[0].startswith(start + "<think></think>two<|im_end|>\n")
    assert second[1] == ["six\n</think>\nfour<|im_end|>"]
    (stripped,) = ChatEncoder(tokenizer, "strip").encode(chat)
    assert turns(tokenizer, stripped)[1] == ["two<|im_end|>", "four<|im_end|>"]


def test_another_template(tokenizer) -> None:
    """A template that knows nothing of thoughts; two answers in a row."""
    other = train_tokenizer(["one two"] * 3, vocab=270)
    other.chat_template = CHATML
    chat = [user("x"), assistant("one"), assistant("two"), user("x"), assistant("one\ntwo")]
    (sample,) = ChatEncoder(other).encode(chat)
    assert turns(other, sample)[1] == ["one<|im_end|>", "two<|im_end|>", "one\ntwo<|im_end|>"]


@given(
    st.lists(st.sampled_from(["one", "<|im_end|>", "</think>", "<s>", "\n", "é", "<think>"]), min_size=1).map("".join)
)
def test_a_message_cannot_speak_for_the_template(tokenizer, text) -> None:
    """Special tokens in a message stay text: the ids of the specials are those of a chat without them."""
    specials = set(range(7))
    plain, hostile = ([user(t), assistant("two")] for t in ("one", text))
    expected = [i for i in ChatEncoder(tokenizer).encode(plain)[0].ids if i in specials]
    (sample,) = ChatEncoder(tokenizer).encode(hostile)
    assert [i for i in sample.ids if i in specials] == expected
    assert f"user\n{text}<|im_end|>" in tokenizer.decode(sample.ids)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("{", "not JSON"),
        ([], "not a list, or an empty one"),
        ([{"content": "x"}], "without a role"),
        ([user("x")], "no assistant turn"),
        ([assistant("x")], "an answer without anything before it"),
        ([user("x"), {"role": "assistant", "content": 3}], "not text"),
        ([user("x"), assistant("")], "an empty assistant turn"),
        ([{"role": "tool", "content": "x"}, assistant("y")], "the chat template refuses it: unknown role tool"),
        ([user("\U00100001"), assistant("y")], "reserved"),
    ],
)
def test_bad_chats_have_a_reason(tokenizer, messages, reason) -> None:
    with pytest.raises(BadChat, match=reason):
        ChatEncoder(tokenizer).encode(messages)


def test_forms_of_messages() -> None:
    """JSON, parts, nulls of other rows' keys, `reasoning`: one form."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "tool_calls": None},
        {"role": "assistant", "content": "c", "reasoning": "d"},
    ]
    expected = [user("ab"), assistant("c", "d")]
    assert read_messages(messages) == read_messages(json.dumps(messages)) == expected
    assert read_messages(messages, reasoning=False)[1] == assistant("c")


def test_packed_rows(tokenizer) -> None:
    """Every sample is somewhere, whole, at its start; the mask is that of the labels; no row is longer than it may be."""
    samples = [s for i in range(1, 9) for s in ChatEncoder(tokenizer).encode([user("one " * i), assistant("two " * i)])]
    table = pack_samples(samples, 120)
    assert table.schema == PACKED
    found = []
    for row in table.to_pylist():
        assert len(row["input_ids"]) == len(row["loss_mask"]) <= 120
        bounds = [*row["seq_start_id"], len(row["input_ids"])]
        for start, stop in itertools.pairwise(bounds):
            found.append((row["input_ids"][start:stop], row["loss_mask"][start:stop]))
            assert row["loss_mask"][stop - 1] == 0
    assert sorted(found) == sorted((s.ids.tolist(), s.mask.tolist()) for s in samples)
    assert table.num_rows < len(samples)


def test_the_command_packs_chats(capsys, tokenizer, tmp_path) -> None:
    """Rows with messages become Parquet; what is dropped or cut is counted with its reason."""
    save_tokenizer(tokenizer, tmp_path / "tok")
    chats = [
        [user("one"), assistant("two")],
        [user("one")],
        [user("one " * 90), assistant("two " * 30)],
        [user("x"), assistant("")],
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    options = ["data", "tokenize", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tok", "--seq", 150]
    code, out, _ = run(capsys, *options, "--out", tmp_path / "drop")
    counts = json.loads((tmp_path / "drop" / "_manifest.json").read_text())["counts"]
    assert code == 0
    assert "too long: drop" in out
    assert counts["dropped: no assistant turn"] == counts["dropped: an empty assistant turn"] == 1
    assert (counts["samples"], counts["too long: drop"]) == (1, 1)
    rows = pq.read_table(tmp_path / "drop" / "part-00000.parquet").to_pylist()
    assert sum(len(row["input_ids"]) for row in rows) == counts["tokens"]
    assert sum(sum(row["loss_mask"]) for row in rows) == counts["trained_tokens"]
    long = len(ChatEncoder(tokenizer).encode(chats[2])[0].ids)
    assert run(capsys, *options[:-1], long - 5, "--out", tmp_path / "cut", "--too-long", "cut")[0] == 0
    counts = json.loads((tmp_path / "cut" / "_manifest.json").read_text())["counts"]
    assert (counts["samples"], counts["too long: cut"]) == (2, 1)
    longest = max(pq.read_table(tmp_path / "cut" / "part-00000.parquet")["input_ids"].to_pylist(), key=len)
    assert np.array_equal(longest[: long - 5], ChatEncoder(tokenizer).encode(chats[2])[0].ids[: long - 5])
