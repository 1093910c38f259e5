"""`alloy data` from text files to shards and back to text."""

import json

import pytest

from alloy.cli import main

TEXTS = [f"Document {i}: the square of {i} is {i * i}, naïve as that is.\n" for i in range(30)]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


def test_from_text_to_shards(capsys, tmp_path) -> None:
    """tokenizer, tokenize and inspect in a chain; inspect prints the text that went in."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    tok, corpus = tmp_path / "tok", tmp_path / "corpus"
    options = [tmp_path / "a.jsonl", "--column", "body"]
    code, out, _ = run(capsys, "data", "tokenizer", *options, "--out", tok, "--vocab", 280)
    assert (code, "280 tokens" in out, "round trip checked" in out) == (0, True, True)
    code, _, err = run(capsys, "data", "tokenizer", *options, "--out", tmp_path / "large", "--vocab", 3000)
    assert (code, "fewer than the 3000 asked for" in err) == (0, True)
    code, out, _ = run(capsys, "data", "tokenize", *options, "--out", corpus, "--tokenizer", tok)
    assert (code, "30 documents" in out) == (0, True)
    code, out, _ = run(capsys, "data", "inspect", corpus, "--tokenizer", tok, "--first", 7, "--documents", 2)
    assert code == 0
    assert f"<s>{TEXTS[7]}</s>" in out
    assert TEXTS[8] in out
    assert TEXTS[9] not in out
    code, out, _ = run(capsys, "data", "inspect", corpus / "shard-00000.idx", "--json", "--documents", 1)
    facts = json.loads(out)
    assert (facts["documents"], facts["dtype"], facts["tokenizer"]) == (30, "uint16", None)
    assert facts["content"]["0"][0] == 1
    # the same again is done already
    assert run(capsys, "data", "tokenize", *options, "--out", corpus, "--tokenizer", tok)[0] == 0
    code, _, err = run(capsys, "data", "tokenize", *options, "--out", corpus, "--tokenizer", tok, "--shard-tokens", 9)
    assert (code, "error: " in err, "--overwrite" in err) == (2, True, True)
    assert run(capsys, "data", "tokenize", *options, "--out", corpus, "--tokenizer", tok, "--overwrite")[0] == 0


def test_bad_data_exits_with_4(capsys, tmp_path) -> None:
    """One line that names what is wrong, no traceback."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, out, err = run(capsys, "data", "tokenizer", tmp_path / "latin.txt", "--out", tmp_path / "tok")
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert "offset 3" in err
    code, _, err = run(capsys, "data", "inspect", tmp_path / "nothing")
    assert (code, "no token shards there" in err) == (4, True)


def test_numbers_out_of_range(capsys, tmp_path) -> None:
    """Shards of no tokens, documents that are not there: exit code 2 with the option's name, nothing written."""
    (tmp_path / "a.txt").write_text(TEXTS[0])
    assert run(capsys, "data", "tokenizer", tmp_path / "a.txt", "--out", tmp_path / "tok", "--vocab", 263)[0] == 0
    options = ["data", "tokenize", tmp_path / "a.txt", "--out", tmp_path / "corpus", "--tokenizer", tmp_path / "tok"]
    code, _, err = run(capsys, *options, "--shard-tokens", 0)
    assert (code, "--shard-tokens" in err, (tmp_path / "corpus").exists()) == (2, True, False)
    assert run(capsys, *options)[0] == 0
    code, _, err = run(capsys, "data", "inspect", tmp_path / "corpus", "--first", 1)
    assert (code, "--first = 1" in err, "1 documents, numbered from 0" in err) == (2, True, True)
    assert run(capsys, "data", "inspect", tmp_path / "corpus", "--first", -1)[0] == 2
