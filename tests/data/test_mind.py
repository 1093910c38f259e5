"""Conversations: turns, filters, faithfulness, and the stage against an endpoint that also fails."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from alloy.data.algebra import Equality, is_equal
from alloy.data.executors import Executor
from alloy.data.mind import STYLES, Turn, drop_reason, faithfulness, interleave, messages, turns
from alloy.data.pipeline import run_stage
from alloy.data.prompts import load_prompt
from alloy.data.stages.mind import MindConfig
from tests.core.endpoint import Endpoint, Reply

SERIAL = Executor(kind="serial")
FAST: dict[str, Any] = {"max_retries": 1, "timeout_s": 2.0, "backoff_s": 0.001}
TALK = "Student: What is the sum of 3 and 4?\n\nTeacher: It is $3 + 4 = 7$.\nNote: this is easy.\n\nStudent: Thank you!"


def test_turns_by_hand() -> None:
    assert turns(TALK, ["Student", "Teacher"]) == [
        Turn("Student", "What is the sum of 3 and 4?"),
        Turn("Teacher", "It is $3 + 4 = 7$.\nNote: this is easy."),
        Turn("Student", "Thank you!"),
    ]
    bold = "Intro.\n**Dr. Müller:** One.\n**Anna (student):** Two: a.\n**Dr. Müller:** Three.\n**Anna:** Four."
    assert turns(bold) == [
        Turn("Dr. Müller", "One."),
        Turn("Anna", "Two: a."),
        Turn("Dr. Müller", "Three."),
        Turn("Anna", "Four."),
    ]
    assert turns("Step 1: add.\nStep 2: multiply.\nNote: a.\nNote: b.") == []


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        (TALK + "\n\n" + "Teacher: Very well said indeed. " * 20, "stop", None),
        (TALK, "stop", "short"),
        (TALK * 9, "length", "truncated"),
        (TALK * 9 + "\n\nTeacher: And then we", "stop", "truncated"),
        ("Teacher: I explain. " * 30, "stop", "not-dialogue"),
        ("A plain essay about sums. " * 30, "stop", "not-dialogue"),
        (TALK * 9 + load_prompt("mind-teacher_student").user[:600] + ".", "stop", "echo"),
        ("I'm sorry, but I cannot do that.", "stop", "refused"),
    ],
)
def test_what_is_worth_nothing_is_dropped(text: str, finish_reason: str, reason: str | None) -> None:
    assert drop_reason(text, load_prompt("mind-teacher_student"), len(text) // 4, finish_reason) == reason


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("2+3", "5", True),
        ("\\frac{1}{2} + \\frac13", "\\frac{5}{6}", True),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        ("(x+1)^2", "x^2 + 2x", False),
        ("\\sqrt{2}", "1.41", True),
        ("\\sqrt{2}", "1.42", False),
        ("\\sin^2 x + \\cos^2 x", "1", True),
        ("x_1 + x_{1}", "2 \\cdot x_1", True),
        ("\\left( 1{,}000 \\right)", "1", False),
        ("1,000 \\div 8", "125", True),
        ("5!", "120", True),
        ("-2^2", "-4", True),
        ("2(3+4)", "14", True),
        ("\\alpha\\,x", "x\\alpha", True),
        ("\\frac{1}{0}", "1", False),
        ("9^{9^9}", "0", False),
        ("\\int_0^1 x", "\\int_0^1 x", False),
        ("__import__('os')", "1", False),
    ],
)
def test_equality_by_hand(left: str, right: str, equal: bool) -> None:
    assert is_equal(left, right) is equal


@given(st.text("0123456789+-*/^(){}xy\\frac .,!|_", max_size=30))
def test_no_formula_breaks_the_reader(text: str) -> None:
    assert is_equal(text, text) in (True, False)


@given(st.recursive(st.integers(-9, 9), lambda x: st.tuples(st.sampled_from("+-*"), x, x), max_leaves=6))
def test_sums_agree_with_python(tree: Any) -> None:
    def text(node: Any) -> str:
        return f"({node})" if isinstance(node, int) else f"({text(node[1])}{node[0]}{text(node[2])})"

    value = eval(text(tree))
    assert is_equal(text(tree).replace("*", "\\cdot "), str(value))
    assert not is_equal(text(tree), str(value + 1))


def test_faithfulness_counts_what_the_text_supports() -> None:
    """Formulas of the text, their consequences and numbers worked out hold; other ones do not; questions do not count."""
    source = "A train of 120 m passes in 8 s, so that its speed is $v = 120/8$."
    talk = [
        Turn("Student", "Is it 99 km?"),
        Turn("Teacher", "We have $v = 120 / 8$ and $120 / 8 = 15$, so 15 m in 1 s, and 120 m in all."),
        Turn("Teacher", "But $120/8 = 16$ is wrong, and 77 stands nowhere. Also 60 + 60 = 120."),
    ]
    found = faithfulness(source, talk, ["Teacher"], is_equal)
    # v = 120/8, 120/8 = 15, 15, 120; 120/8 = 16 and 77 fail; 60 + 60 = 120
    assert (found.claims, found.supported) == (7, 5)
    assert faithfulness(source, [Turn("A", "Nothing.")], [], is_equal).share == 1.0


def test_an_evaluation_that_takes_too_long_does_not_follow() -> None:
    equal = Equality(timeout_s=20.0)
    try:
        assert equal("1+1", "2")
        assert equal("1+1", "2")
        assert not equal("1+1", "3")
    finally:
        equal.close()


def test_messages_alternate_and_begin_with_the_user() -> None:
    talk = [Turn("Expert", "Hi."), Turn("Layman", "What?"), Turn("Layman", "Why?"), Turn("Expert", "So.")]
    roles = [m["role"] for m in messages(talk, ["Expert"])]
    assert roles == ["user", "assistant", "user"]
    found = messages(talk[1:], ["Expert"])
    assert found == [{"role": "user", "content": "What?\n\nWhy?"}, {"role": "assistant", "content": "So."}]
    assert [m["role"] for m in messages([Turn("A", "a"), Turn("B", "b"), Turn("C", "c")], [])] == ["user", "assistant"]
    assert messages([], []) == []


@given(
    st.lists(st.integers(1, 50), max_size=9),
    st.lists(st.integers(1, 50), max_size=9),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_mixtures_keep_their_ratio_at_every_beginning(raw: list[int], synthetic: list[int], a: int, b: int) -> None:
    """As long as there are rows of both kinds, no side is ahead by more than a row; every synthetic row is there, in order."""
    order = interleave(raw, synthetic, (a, b))
    assert [i for kind, i in order if kind == "synthetic"] == list(range(len(synthetic)))
    chosen = [i for kind, i in order if kind == "raw"]
    assert chosen == list(range(len(chosen)))
    tokens = {"raw": 0, "synthetic": 0}
    for kind, i in order:
        tokens[kind] += (raw if kind == "raw" else synthetic)[i]
        if len(chosen) < len(raw):
            assert tokens["synthetic"] * a - tokens["raw"] * b <= 50 * max(a, b)
        assert tokens["raw"] * b - tokens["synthetic"] * a < 50 * b + 1


TEXT = "The sum of the first n odd numbers is $n^2$, which follows by induction. For 5 of them it is 25, as is easily seen."


def answer(prompt: str, n: int) -> Reply | str:
    """A conversation whose length tells its style; some texts get none."""
    styles = {load_prompt(f"mind-{style}").user.split("\n")[0]: style for style in STYLES}
    style = styles[prompt.split("\n")[0]]
    if "refuse" in prompt:
        return "I cannot help with that."
    if "crash" in prompt and style != "debate":
        return Reply(status=500)
    a, b = load_prompt(f"mind-{style}").speakers
    claim = "It is $5^2 = 25$." if "invent" not in prompt else "It is $5^2 = 26$, or 333."
    turn = f"{a}: What does the text say about odd numbers, and why is it so?\n\n{b}: {claim} The sum is $n^2$."
    return "\n\n".join([f"Here is the conversation:\n\n{turn}", *[turn] * (3 + STYLES.index(style))])


def run(tmp_path: Path, texts: list[str], **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    table = pa.table({"id": [f"d{i}" for i in range(len(texts))], "text": texts, "url": ["u"] * len(texts)})
    pq.write_table(table, folder / "rows.parquet")
    with Endpoint(answer) as endpoint:
        config = MindConfig(**{**FAST, **settings}, endpoint=endpoint.url)
        manifest = run_stage(config, [str(folder)], tmp_path / "out", SERIAL)
    return pq.read_table(tmp_path / "out").to_pylist(), manifest


def test_styles_make_a_row_each(tmp_path: Path) -> None:
    rows, manifest = run(
        tmp_path, [TEXT, f"{TEXT}\n\n{TEXT}"], styles=("interview", "debate"), chunk_tokens=32, messages=True
    )
    assert [(r["source_id"], r["style"], r["chunk_ids"]) for r in rows] == [
        ("d0", "debate", [0]),
        ("d0", "interview", [0]),
        ("d1", "debate", [0, 1]),
        ("d1", "interview", [0, 1]),
    ]
    row = rows[3]
    assert row["speakers"] == ["Interviewer", "Expert"]
    assert row["n_turns"] == 40
    assert row["text"].startswith("Interviewer: What does")
    assert row["generator"] == "scripted"
    assert row["prompt_sha"] == load_prompt("mind-interview").sha
    assert (row["kept"], row["drop_reason"], row["faithfulness"], row["url"]) == (True, None, 1.0, "u")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * 20
    assert len({r["id"] for r in rows}) == 4
    assert manifest["counts"]["conversations"] == 6


def test_the_longest_of_seven_is_taken(tmp_path: Path) -> None:
    """Style `interview` is the longest here; where all but one fail, that one."""
    rows, manifest = run(tmp_path, [TEXT, TEXT + " crash", TEXT + " refuse", ""], dropped=True)
    kept = [r for r in rows if r["kept"]]
    assert [(r["source_id"], r["style"], r["speakers"][0]) for r in kept] == [
        ("d0", "longest", "Interviewer"),
        ("d1", "longest", "Speaker A"),
    ]
    dropped = [(r["source_id"], r["drop_reason"]) for r in rows if not r["kept"]]
    assert sorted(dropped) == [("d1", "failed")] * 6 + [("d2", "refused")] * 7
    assert manifest["counts"]["dropped=failed"] == 6


def test_unfaithful_conversations_can_be_dropped(tmp_path: Path) -> None:
    rows, _ = run(tmp_path, [TEXT, TEXT + " invent"], styles=("interview",))
    assert [round(r["faithfulness"], 3) for r in rows] == [1.0, 0.0]
    (tmp_path / "b").mkdir()
    rows, manifest = run(tmp_path / "b", [TEXT, TEXT + " invent"], styles=("interview",), min_faithful=0.5)
    assert [r["source_id"] for r in rows] == ["d0"]
    assert manifest["counts"]["dropped=unfaithful"] == 1


def test_texts_are_mixed_in(tmp_path: Path) -> None:
    """About a token of text for one of conversation, and text that is too much is left out and counted."""
    rows, manifest = run(tmp_path, [TEXT * 3] * 9, styles=("interview",), mix="1:1")
    raw = [r for r in rows if r["style"] == "raw"]
    assert [r["style"] for r in rows[:2]] == ["interview", "raw"]
    assert raw[0]["text"] == TEXT * 3
    assert len(rows) == 18 - manifest["counts"].get("raw_left_out", 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"styles": ("lecture",)}, 'there is no "lecture"'),
        ({"styles": ("all", "debate")}, "stand alone"),
        ({"mix": "half"}, "not a ratio"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MindConfig(**settings, endpoint="http://a")
