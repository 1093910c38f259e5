"""Tokenizing part by part: the same bytes as in one go, whoever works; joined corpora; every type of ids."""

import json
import struct

import numpy as np
import pytest

from alloy.data.executors import Executor
from alloy.data.io import read_documents
from alloy.data.parts import RowWriter
from alloy.data.pipeline import run_stage
from alloy.data.shards import TokenCorpus, TokenShard, join_corpora, load_manifest, write_shard
from alloy.data.stages.tokenize import TokenizeConfig
from alloy.data.tokens import save_tokenizer, tokenize_corpus, train_tokenizer
from alloy.errors import DataError, RecipeError
from tests.data.test_data_cli import run

TEXTS = [f"Row {i}: " + "some words " * (i % 7) + "naïve" * (i % 3) if i % 11 else "" for i in range(230)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer and three files of rows, two of them Parquet."""
    import pyarrow as pa

    folder = tmp_path_factory.mktemp("rows")
    save_tokenizer(train_tokenizer(TEXTS, 300), folder / "tok")
    (folder / "rows").mkdir()
    for name, part in zip("abc", (TEXTS[:90], TEXTS[90:170], TEXTS[170:]), strict=True):
        if name == "b":
            (folder / "rows" / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        else:
            with RowWriter(folder / "rows" / f"{name}.parquet") as writer:
                writer.add(pa.table({"text": part}))
    return folder


def files(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".bin", ".idx")}


@pytest.mark.parametrize(("kind", "workers"), [("serial", 1), pytest.param("process", 2, marks=pytest.mark.slow)])
def test_parts_give_the_bytes_of_one_go(folder, tmp_path, kind, workers) -> None:
    """Shards, counts and checksums equal those of `tokenize_corpus`; nothing of the parts is left; a rerun changes nothing."""
    from alloy.data.tokens import load_tokenizer

    whole = tokenize_corpus(read_documents(folder / "rows"), load_tokenizer(folder / "tok"), tmp_path / "whole", 700)
    config = TokenizeConfig(tokenizer=str(folder / "tok"), shard_tokens=700)
    executor = Executor(kind=kind, workers=workers)
    made = run_stage(config, [str(folder / "rows")], tmp_path / "parts", executor)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len(whole["shards"]) > 2
    assert {**load_manifest(tmp_path / "parts"), "key": None} == {**whole, "key": None}
    assert (made["rows_out"], made["tokens"], made["counts"]["empty"]) == (whole["documents"], whole["tokens"], 21)
    assert not list((tmp_path / "parts").glob("part-*"))
    assert run_stage(config, [str(folder / "rows")], tmp_path / "parts", executor) == made
    with pytest.raises(RecipeError, match="it was made with shard_tokens = 700, not 900"):
        run_stage(config.model_copy(update={"shard_tokens": 900}), [str(folder / "rows")], tmp_path / "parts", executor)
    again = run_stage(
        config.model_copy(update={"shards": 2}), [str(folder / "rows")], tmp_path / "parts", executor, True
    )
    assert (again["tokens"], len(TokenCorpus(tmp_path / "parts").shards)) == (whole["tokens"], 2)


def test_an_interrupted_end_goes_on(folder, tmp_path) -> None:
    """Parts done, the end not: the rerun joins them without tokenizing again."""
    config = TokenizeConfig(tokenizer=str(folder / "tok"))
    first = run_stage(config, [str(folder / "rows")], tmp_path / "a", Executor(kind="serial"))
    wanted = files(tmp_path / "a")
    # as a run killed while it removed the pairs leaves it
    manifest = json.loads((tmp_path / "a" / "_manifest.json").read_text())
    (tmp_path / "a" / "_manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    (tmp_path / "a" / "part-00001.bin").write_bytes(b"x")
    again = run_stage(config, [str(folder / "rows")], tmp_path / "a", Executor(kind="serial"))
    assert files(tmp_path / "a") == wanted
    assert again["tokens"] == first["tokens"]


def test_what_cannot_be_tokenized(folder, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}], "text": "x"}\n')
    config = TokenizeConfig(tokenizer=str(folder / "tok"))
    for names, message in [
        ("a", 'neither the column "text" nor "messages" but id, body'),
        ("b", "no row holds text"),
        ("bc", "are chats and texts; tokenize them apart"),
    ]:
        inputs = [str(tmp_path / f"{name}.jsonl") for name in names]
        with pytest.raises(DataError, match=message):
            run_stage(config, inputs, tmp_path / names, Executor(kind="serial"))
    tokenize_corpus(["x"], train_tokenizer(TEXTS, 300), tmp_path / "there")
    with pytest.raises(RecipeError, match="holds a tokenized corpus already"):
        run_stage(config, [str(folder / "rows")], tmp_path / "there", Executor(kind="serial"))


def index(code: int, lengths: list[int], documents: list[int], size: int, modes: bytes = b"") -> bytes:
    """An .idx file by the layout of Megatron's writer."""
    ends = np.cumsum([0, *lengths])[:-1] * size
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    return head + struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(documents)}q", *lengths, *ends, *documents) + modes


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_joined_pairs_keep_sequences_and_modes(tmp_path, code, letter) -> None:
    """Two multimodal pairs of every type of integers: lengths, documents and modes as Megatron's own merge has them."""
    size = struct.calcsize(letter)
    for name, first, modes in (("a", 3, bytes([0, 1, 0])), ("b", 60, bytes([1, 0, 0]))):
        (tmp_path / f"{name}.bin").write_bytes(struct.pack(f"<9{letter}", *range(first, first + 9)))
        (tmp_path / f"{name}.idx").write_bytes(index(code, [4, 2, 3], [0, 2, 3], size, modes))
    manifest = join_corpora([tmp_path / "a", tmp_path / "b.idx"], tmp_path / "out")
    assert (manifest["documents"], manifest["tokens"], manifest["bytes"]) == (4, 18, None)
    expected = index(code, [4, 2, 3] * 2, [0, 2, 3, 5, 6], size, bytes([0, 1, 0, 1, 0, 0]))
    assert (tmp_path / "out" / "shard-00000.idx").read_bytes() == expected
    shard = TokenShard(tmp_path / "out" / "shard-00000")
    assert [shard[i].tolist() for i in range(4)] == [[*range(3, 9)], [9, 10, 11], [*range(60, 66)], [66, 67, 68]]
    assert shard.modes is not None
    assert shard.modes.tolist() == [0, 1, 0, 1, 0, 0]
    join_corpora([tmp_path / "out"], tmp_path / "cut", shard_tokens=7)
    cut = TokenCorpus(tmp_path / "cut")
    assert [s.tokens.tolist() for s in cut.shards] == [[*range(3, 12)], [*range(60, 69)]]
    assert cut.shards[1].modes is not None
    assert cut.shards[1].modes.tolist() == [1, 0, 0]


def test_joining_refuses_what_differs(tmp_path) -> None:
    write_shard(tmp_path / "a", [np.arange(5)], "<u2")
    write_shard(tmp_path / "b", [np.arange(5)], "<i4")
    with pytest.raises(DataError, match=r"holds int32 ids but .* uint16 ones"):
        join_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for name, vocab in (("c", 270), ("d", 275)):
        tokenize_corpus(["some words of a text"] * 3, train_tokenizer(["some words of a text"], vocab), tmp_path / name)
    with pytest.raises(DataError, match="was tokenized with another tokenizer"):
        join_corpora([tmp_path / "c", tmp_path / "d"], tmp_path / "out")
    with pytest.raises(RecipeError, match="both read and written"):
        join_corpora([tmp_path / "c"], tmp_path / "c", overwrite=True)


def test_the_commands(capsys, folder, tmp_path) -> None:
    """tokenize with workers, concat, and a checksum that finds one changed byte."""
    options = ["data", "tokenize", folder / "rows", "--tokenizer", folder / "tok", "--out"]
    assert run(capsys, *options, tmp_path / "one")[0] == 0
    code, out, _ = run(capsys, "data", "concat", tmp_path / "one", tmp_path / "one", "--out", tmp_path / "two")
    assert (code, f"{2 * TokenCorpus(tmp_path / 'one').num_documents:,} documents" in out) == (0, True)
    assert run(capsys, "data", "inspect", tmp_path / "two", "--check")[0] == 0
    data = bytearray((tmp_path / "two" / "shard-00000.bin").read_bytes())
    data[10] ^= 1
    (tmp_path / "two" / "shard-00000.bin").write_bytes(data)
    code, _, err = run(capsys, "data", "inspect", tmp_path / "two", "--check")
    assert (code, "shard-00000.bin is damaged" in err) == (4, True)
    (tmp_path / "x.txt").write_text("x")
    code, _, err = run(capsys, "data", "tokenize", tmp_path / "x.txt", *options[3:], tmp_path / "x", "--workers", 2)
    assert (code, "--workers = 2" in err) == (2, True)
