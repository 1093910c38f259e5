"""Tokenizers and shards: lossless, deterministic, byte-equal to the format, never half written."""

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alloy.data.io import Document
from alloy.data.shards import TokenCorpus, TokenShard, load_manifest, shard_dtype, write_shard
from alloy.data.tokens import (
    SPECIAL_TOKENS,
    TextEncoder,
    load_tokenizer,
    save_tokenizer,
    tokenize_corpus,
    tokenizer_hash,
    train_tokenizer,
)
from alloy.errors import DataError, RecipeError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "sigma"]
TEXTS = [
    f"Line {i} of {WORDS[i % 12]} and {WORDS[i * i % 12]}: value = {i * i}; naïve 日本 <think> \r\n\n\tdone."
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab=320)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return TextEncoder(tokenizer)


@given(st.text())
def test_round_trip_is_lossless(tokenizer, encoder, text) -> None:
    """Any text comes back as it was, special tokens written in it included."""
    for sample in (text, text + "<s></think>" + text):
        (ids,) = encoder.encode([sample])
        assert tokenizer.decode(ids, skip_special_tokens=False) == sample
        assert not set(ids.tolist()) & set(range(len(SPECIAL_TOKENS)))


def test_digits_stand_alone(tokenizer, encoder) -> None:
    (ids,) = encoder.encode(["1024 and 77"])
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("102477")


def test_special_tokens_have_the_first_ids(tokenizer) -> None:
    """Known to the tokenizer as specials, one id each through its own call, as the chat template needs."""
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(7))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("<|im_start|><think>", add_special_tokens=False) == [3, 5]


def test_training_is_deterministic_and_sampling_follows_the_seed(tokenizer) -> None:
    assert tokenizer_hash(train_tokenizer(iter(TEXTS), vocab=320)) == tokenizer_hash(tokenizer)
    sampled = [tokenizer_hash(train_tokenizer(TEXTS, 290, max_bytes=500, seed=seed)) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(RecipeError, match="vocab = 262 is too small: 256 bytes and 7 special tokens need 263"):
        train_tokenizer(TEXTS, 262)
    with pytest.raises(DataError, match="max_bytes = 3 leaves no whole text"):
        train_tokenizer(TEXTS, 320, max_bytes=3)


def test_saved_folder_is_a_transformers_tokenizer(tokenizer, tmp_path) -> None:
    """Loaded by the library itself it has the same ids, template and hash; a second save there is refused."""
    folder = save_tokenizer(tokenizer, tmp_path / "tok")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded(TEXTS[3]).input_ids == tokenizer(TEXTS[3]).input_ids
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.decode(loaded.encode(" a , b ' s . x"), skip_special_tokens=True) == " a , b ' s . x"
    with pytest.raises(RecipeError, match="holds a tokenizer already"):
        save_tokenizer(tokenizer, folder)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_hash_changes_with_the_merges(tokenizer) -> None:
    assert tokenizer_hash(train_tokenizer(TEXTS, vocab=321)) != tokenizer_hash(tokenizer)


def test_chat_template(tokenizer) -> None:
    """Nemotron 3's layout written out: empty system turn, reasoning before the last user turn cut, thinking on or off."""
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2", "reasoning_content": "add"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4", "reasoning_content": "add"},
    ]

    def render(messages, **options) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    start = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    end = "2<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n"
    last = "<think>\nadd\n</think>\n4<|im_end|>\n"
    assert render(messages) == start + "<think></think>" + end + last
    assert render(messages, truncate_history_thinking=False) == start + "<think>\nadd\n</think>\n" + end + last
    assert render(messages[:1], add_generation_prompt=True) == start + "<think>\n"
    assert render(messages[:1], add_generation_prompt=True, enable_thinking=False) == start + "<think></think>"
    system = [{"role": "system", "content": "Be brief."}, *messages[:1]]
    assert render(system, add_generation_prompt=True) == start.replace("system\n", "system\nBe brief.") + "<think>\n"
    with pytest.raises(Exception, match="unknown role tool in turn 1"):
        render([{"role": "tool", "content": "x"}])
    with pytest.raises(Exception, match="no layout for tools"):
        render(messages, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


@pytest.mark.parametrize(("dtype", "code", "size"), [("<u2", 8, "H"), ("<i4", 4, "i")])
def test_shard_bytes_equal_a_hand_made_file(tmp_path, dtype, code, size) -> None:
    """Both files, byte for byte, against struct by the layout of data.md 11.2, written and read."""
    documents = [[7, 300, 2], [5], [1, 2, 3, 4]]
    itemsize = struct.calcsize("<" + size)
    data = b"".join(struct.pack(f"<{len(ids)}{size}", *ids) for ids in documents)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", 3, 4)
    index += (
        struct.pack("<3i", 3, 1, 4) + struct.pack("<3q", 0, 3 * itemsize, 4 * itemsize) + struct.pack("<4q", 0, 1, 2, 3)
    )
    entry = write_shard(tmp_path / "ours", [np.array(ids) for ids in documents], dtype)
    assert (tmp_path / "ours.bin").read_bytes() == data
    assert (tmp_path / "ours.idx").read_bytes() == index
    assert entry["bin_sha256"] == hashlib.sha256(data).hexdigest()
    assert entry["idx_sha256"] == hashlib.sha256(index).hexdigest()
    (tmp_path / "theirs.bin").write_bytes(data)
    (tmp_path / "theirs.idx").write_bytes(index)
    shard = TokenShard(tmp_path / "theirs")
    assert [shard[i].tolist() for i in range(len(shard))] == documents
    assert (shard.num_documents, shard.num_tokens, shard.dtype) == (3, 8, np.dtype(dtype))


def test_documents_of_several_sequences_and_modes(tmp_path) -> None:
    """A foreign file may have several sequences a document and a mode byte for each sequence."""
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    index += struct.pack("<3i", 2, 1, 4) + struct.pack("<3q", 0, 8, 12) + struct.pack("<3q", 0, 2, 3) + bytes(3)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(struct.pack("<7i", *range(7)))
    shard = TokenShard(tmp_path / "a")
    assert [shard[i].tolist() for i in range(len(shard))] == [[0, 1, 2], [3, 4, 5, 6]]


def test_dtype_rule() -> None:
    assert [shard_dtype(vocab) for vocab in (300, 65_499, 65_500, 131_072)] == ["<u2", "<u2", "<i4", "<i4"]


def test_bad_shards_are_refused(tmp_path) -> None:
    """Ids beyond the dtype, empty documents and shards, damaged or missing files."""
    with pytest.raises(DataError, match=r"token id 65536 does not fit uint16 \(0 to 65535\)"):
        write_shard(tmp_path / "a", [np.array([1, 65_536])], "<u2")
    with pytest.raises(DataError, match="token id -1 does not fit int32"):
        write_shard(tmp_path / "a", [np.array([-1])], "<i4")
    with pytest.raises(DataError, match="document 1 has no tokens"):
        write_shard(tmp_path / "a", [np.array([1]), np.array([], int)])
    assert not list(tmp_path.iterdir())
    write_shard(tmp_path / "empty", [])
    with pytest.raises(DataError, match=r"empty\.idx is empty: it holds no tokens"):
        TokenShard(tmp_path / "empty")
    write_shard(tmp_path / "a", [np.arange(5), np.arange(9)])
    index, data = tmp_path / "a.idx", tmp_path / "a.bin"
    whole = index.read_bytes()
    for content, message in [
        (whole[:-3], "cut short or damaged"),
        (b"{}" + whole, "does not begin with MMIDIDX"),
        (whole[:9] + struct.pack("<Q", 2) + whole[17:], "version 2 and type code 8"),
        (whole[:34] + struct.pack("<i", 6) + whole[38:], "inconsistent"),
    ]:
        index.write_bytes(content)
        with pytest.raises(DataError, match=message):
            TokenShard(tmp_path / "a")
    index.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"a\.bin has 26 bytes but its \.idx describes 28"):
        TokenShard(tmp_path / "a")
    data.unlink()
    with pytest.raises(DataError, match=r"a\.bin is missing"):
        TokenShard(tmp_path / "a")


def test_tokenized_corpus_and_its_manifest(tokenizer, tmp_path) -> None:
    """Several shards read as one list; bos and eos around each text; counts and checksums are true; progress is told."""
    told = []
    documents = [Document(text, "x") for text in (*TEXTS[:20], "", *TEXTS[20:])]
    manifest = tokenize_corpus(
        documents, tokenizer, tmp_path / "c", shard_tokens=500, progress=lambda *n: told.append(n)
    )
    corpus = TokenCorpus(tmp_path / "c")
    assert len(corpus.shards) > 2
    assert corpus.num_documents == len(TEXTS) == manifest["documents"]
    for ids, text in zip((corpus[i] for i in range(len(corpus))), TEXTS, strict=True):
        assert (ids[0], ids[-1]) == (1, 2)
        assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == text
    size = sum(len(text.encode()) for text in TEXTS)
    assert told[-1] == (len(TEXTS), manifest["tokens"], size)
    assert (manifest["tokens"], manifest["bytes"]) == (corpus.num_tokens, size)
    assert manifest["tokenizer"] == {"hash": tokenizer_hash(tokenizer), "vocab": 320, "bos": 1, "eos": 2}
    assert load_manifest(tmp_path / "c") == manifest
    for shard in manifest["shards"]:
        data = (tmp_path / "c" / f"{shard['name']}.bin").read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["bin_sha256"]
    with pytest.raises(RecipeError, match="holds a tokenized corpus already"):
        tokenize_corpus(TEXTS, tokenizer, tmp_path / "c")
    assert tokenize_corpus(TEXTS, tokenizer, tmp_path / "c", overwrite=True)["bytes"] == size
    assert len(TokenCorpus(tmp_path / "c").shards) == 1


def test_interrupted_tokenization_is_not_a_corpus(tokenizer, tmp_path) -> None:
    """An error in the middle leaves no manifest; running again succeeds."""

    def documents():
        yield from TEXTS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(documents(), tokenizer, tmp_path, shard_tokens=300)
    with pytest.raises(DataError, match=r"no manifest\.json: nothing was tokenized there, or it was interrupted"):
        TokenCorpus(tmp_path)
    manifest = tokenize_corpus(TEXTS, tokenizer, tmp_path)
    assert TokenCorpus(tmp_path).num_tokens == manifest["tokens"]
    with pytest.raises(DataError, match="no document holds text"):
        tokenize_corpus([""], tokenizer, tmp_path / "nothing")
    assert not list((tmp_path / "nothing").iterdir())


@pytest.mark.slow
def test_kill_leaves_no_corpus(tokenizer, tmp_path) -> None:
    """SIGKILL while shards are being written: the folder is refused, and the next run clears what was left."""
    save_tokenizer(tokenizer, tmp_path / "tok")
    code = (
        "import itertools, sys\n"
        "from alloy.data.tokens import load_tokenizer, tokenize_corpus\n"
        "texts = (f'text {i} ' * 5000 for i in itertools.count())\n"
        "tokenize_corpus(texts, load_tokenizer(sys.argv[1]), sys.argv[2], shard_tokens=100_000)\n"
    )
    folder = tmp_path / "c"
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "tok", folder], env={**os.environ, "PYTHONPATH": "src"}
    )
    deadline = time.monotonic() + 50
    while not list(folder.glob("shard-00003.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(folder.glob("shard-*.bin"))) >= 4
    with pytest.raises(DataError, match=r"no manifest\.json"):
        TokenCorpus(folder)
    manifest = tokenize_corpus(TEXTS, tokenizer, folder)
    assert TokenCorpus(folder).num_tokens == manifest["tokens"]
    assert not list(folder.glob(".*"))


def test_manifest_that_disagrees(tokenizer, tmp_path) -> None:
    manifest = tokenize_corpus(TEXTS, tokenizer, tmp_path)
    manifest["shards"][0]["tokens"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json says"):
        TokenCorpus(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        TokenCorpus(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="lacks tokenizer or shards"):
        TokenCorpus(tmp_path)
