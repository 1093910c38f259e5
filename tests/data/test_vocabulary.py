"""Training data of tokenizers in balance, their measures counted by hand, and tokens added to one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloy.data.tokens import SPECIAL_TOKENS, TextEncoder, load_tokenizer, tokenizer_hash, train_tokenizer
from alloy.data.vocabulary import balanced_texts, extend_tokenizer, measure_tokenizer, share_bytes
from alloy.errors import RecipeError
from tests.data.test_data_cli import run

TEXTS = [f"The HTTPServer of {i * 137} users isn't naïve; it's CamelCase_{i}.\r\n\t" for i in range(60)]


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(1, 10**6), min_size=1, max_size=5),
    st.integers(1, 10**6),
    st.floats(1, 50),
)
def test_shares_follow_the_temperature(sizes, most, temperature) -> None:
    """All bytes are given out but for roundings; of two sources that have some left, shares are as size ** (1 / T)."""
    budgets = share_bytes(sizes, most, temperature)
    assert all(0 <= budgets[name] <= sizes[name] for name in sizes)
    assert 0 <= min(most, sum(sizes.values())) - sum(budgets.values()) <= len(sizes)
    partial = [name for name in sizes if budgets[name] < sizes[name]]
    for name in partial[1:]:
        ratio = (sizes[name] / sizes[partial[0]]) ** (1 / temperature)
        assert budgets[name] == pytest.approx(ratio * budgets[partial[0]], abs=2 + 2 * ratio)


def test_balanced_texts_come_from_small_sources_too() -> None:
    """A source a hundredth of the other's size gives almost as much at a high temperature, and in proportion at 1."""
    sources = {"large": lambda: ["x" * 10] * 1000, "small": lambda: ["y" * 10] * 10}
    for temperature, expected in ((1.0, 0), (1e9, 10)):
        texts = list(balanced_texts(sources, 220, temperature, seed=3))
        assert sum(text[0] == "y" for text in texts) == expected
        assert sum(map(len, texts)) <= 220
    assert texts == list(balanced_texts(sources, 220, 1e9, seed=3))
    with pytest.raises(RecipeError, match=r"temperature = 0.5; it is at least 1"):
        balanced_texts(sources, 200, 0.5)


# the published expressions, here run by another engine
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("pieces", "digits", "expression"), [("gpt4", 3, CL100K), ("nemotron", 1, TEKKEN)])
def test_pieces_are_those_of_the_published_expressions(pieces, digits, expression) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, pieces=pieces, digits=digits)
    text = TEXTS[7] + " Ünïcode/path//x = 1234567;\n\n  नमस्ते दुनिया HTTPServer don't"
    regex = pytest.importorskip("regex")
    found = [text[a:b] for _, (a, b) in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == regex.findall(expression, text)
    (ids,) = TextEncoder(tokenizer).encode([text])
    assert tokenizer.decode(ids) == text


def test_measures_by_hand() -> None:
    """Bytes, words and tokens counted apart; ids that the sample never needs; a tokenizer that loses case says so."""
    tokenizer = train_tokenizer(TEXTS, 300)
    report = measure_tokenizer(tokenizer, {"a": lambda: TEXTS[:5], "b": lambda: ["zz zz é", "x"]}, sample_bytes=5)
    counted = tokenizer.encode("zz zz é", add_special_tokens=False)
    assert report["sources"]["b"] == {
        "documents": 1,
        "bytes": 8,
        "words": 3,
        "tokens": len(counted),
        "lossless": 1.0,
        "bytes_per_token": 8 / len(counted),
        "fertility": len(counted) / 3,
    }
    used = set(counted) | set(tokenizer.encode(TEXTS[0], add_special_tokens=False)) | set(range(len(SPECIAL_TOKENS)))
    assert report["unused"] == 300 - len(used)
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert measure_tokenizer(tokenizer, {"a": lambda: ["low", "High"]})["lossless"] == 0.5


def test_added_tokens_and_what_they_were() -> None:
    """New ids at the end, the pieces that spelt them before; known ones are passed over; documents keep them as text."""
    tokenizer = train_tokenizer(TEXTS, 300)
    before = tokenizer.encode("<|call|>", add_special_tokens=False)
    pieces = extend_tokenizer(tokenizer, ["<|call|>", "<think>", "<|call|>"])
    assert pieces == {300: before}
    assert tokenizer.encode("<|call|>", add_special_tokens=False) == [300]
    (ids,) = TextEncoder(tokenizer).encode(["a<|call|>"])
    assert 300 not in ids
    extend_tokenizer(tokenizer, ["naïve "], special=False)
    (ids,) = TextEncoder(tokenizer).encode(["so naïve it"])
    assert 301 in ids
    assert tokenizer.decode(ids) == "so naïve it"


def test_the_command(capsys, tmp_path) -> None:
    """Two sources, a comparison, further tokens from a file; then the tokenizer is extended."""
    (tmp_path / "a.txt").write_text("".join(TEXTS[:40]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[40:]))
    (tmp_path / "special").write_text("<fim>\n<fim, end>\n")
    sources = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    code, _, _ = run(capsys, "data", "tokenizer", *sources, "--out", tmp_path / "one", "--vocab", 290)
    assert code == 0
    options = ["--vocab", 300, "--pieces", "nemotron", "--special-tokens", tmp_path / "special", "--json"]
    options += ["--compare", tmp_path / "one", "--max-bytes", 2000, "--temperature", 5]
    made = [run(capsys, "data", "tokenizer", *sources, "--out", tmp_path / name, *options) for name in ("two", "same")]
    assert [code for code, _, _ in made] == [0, 0]
    report = json.loads(made[0][1])
    assert set(report) == {str(tmp_path / "one"), str(tmp_path / "two")}
    assert set(report[str(tmp_path / "two")]["sources"]) == {str(path) for path in sources}
    assert json.loads((tmp_path / "two" / "report.json").read_text()) == report
    two, same = (load_tokenizer(tmp_path / name) for name in ("two", "same"))
    assert tokenizer_hash(two) == tokenizer_hash(same)
    assert two.convert_tokens_to_ids(["<fim>", "<fim, end>"]) == [7, 8]
    code, _, err = run(capsys, "data", "tokenizer", *sources, "--out", tmp_path / "x", "--temperature", 5)
    assert (code, "--max-bytes" in err) == (2, True)
    extend = [
        "data",
        "tokenizer",
        "--extend",
        tmp_path / "two",
        "--out",
        tmp_path / "three",
        "--special-tokens",
        "<a>,<b>",
    ]
    code, _, _ = run(capsys, *extend)
    assert (code, load_tokenizer(tmp_path / "three").convert_tokens_to_ids("<b>")) == (0, len(two) + 1)
    assert run(capsys, *extend[:3], tmp_path / "three", "--out", tmp_path / "four", *extend[6:])[0] == 2
