"""`alloy eval MODEL --ppl FILE` gives the numbers of the function it calls."""

import json

import pytest

from alloy.cli import main
from alloy.data.tokens import save_tokenizer, train_tokenizer
from alloy.eval.ppl import bits_per_byte
from alloy.models.configs import HybridConfig
from alloy.models.hybrid import HybridLM
from alloy.models.registry import save

TEXTS = [f"Document {i}: the square of {i} is {i * i}, naïve as that is.\n" * 3 for i in range(5)]


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(exit_info.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab=280)


@pytest.fixture(scope="module")
def model(tokenizer) -> HybridLM:
    config = HybridConfig(
        vocab=len(tokenizer), hidden=24, pattern="M*-", num_heads=3, num_kv_heads=1, head_dim=8, ffn=40,
        ssm_heads=4, ssm_head_dim=6, ssm_state=5, ssm_groups=2, chunk=8, max_positions=64, mtp_depths=0,
    )  # fmt: skip
    return HybridLM(config).eval()


def test_saved_model_gives_the_number_again(capsys, tmp_path, tokenizer, model) -> None:
    """From a folder and a file the command prints what the function gives in the process that made them."""
    save(model, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code, out, _ = run(capsys, "eval", tmp_path / "model", "--ppl", tmp_path / "held_out.jsonl", "--json")
    assert code == 0
    printed = json.loads(out)
    expected = bits_per_byte(model, tokenizer, TEXTS, seq=64)
    assert printed["seq"] == 64
    assert printed["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert (printed["tokens"], printed["bytes"], printed["documents"]) == (expected.tokens, expected.bytes, 5)
    code, out, _ = run(capsys, "eval", tmp_path / "model", "--ppl", tmp_path / "held_out.jsonl", "--seq", 17)
    assert code == 0
    for line in ("bits per byte", "nats per token", "perplexity", "windows of 17 tokens"):
        assert line in out


def test_what_cannot_be_measured(capsys, tmp_path, tokenizer, model) -> None:
    """A missing text, a folder without a model, a model without a tokenizer."""
    (tmp_path / "a.txt").write_text("text")
    code, _, err = run(capsys, "eval", tmp_path, "--ppl", tmp_path / "b.txt")
    assert (code, "b.txt does not exist" in err) == (4, True)
    save_tokenizer(tokenizer, tmp_path / "tok")
    assert run(capsys, "eval", tmp_path / "tok", "--ppl", tmp_path / "a.txt")[0] == 4
    save(model, tmp_path / "bare")
    code, _, err = run(capsys, "eval", tmp_path / "bare", "--ppl", tmp_path / "a.txt")
    assert (code, "has no tokenizer.json" in err) == (4, True)


def test_window_of_no_tokens(capsys, tmp_path, tokenizer, model) -> None:
    """0 is a number that does not work, not a missing one."""
    save(model, tmp_path / "model", tokenizer)
    (tmp_path / "a.txt").write_text("text")
    code, _, err = run(capsys, "eval", tmp_path / "model", "--ppl", tmp_path / "a.txt", "--seq", 0)
    assert (code, "seq = 0 leaves no token to predict" in err) == (2, True)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_the_cost_of_weights_is_printed(capsys, tmp_path, tokenizer, model, weights: str) -> None:
    """Both scores and their difference, in words and as JSON; a random model loses next to nothing."""
    save(model, tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    asked = ("eval", tmp_path / "model", "--ppl", tmp_path / "a.txt", "--device", "cpu", "--weights", weights)
    code, out, _ = run(capsys, *asked, "--json")
    assert code == 0
    printed = json.loads(out)
    full, low = printed["nats_per_token"], printed["weights"]["nats_per_token"]
    assert printed["weights"]["name"] == weights
    assert full != low
    assert abs(full - low) < 0.01
    code, out, _ = run(capsys, *asked)
    assert f"with weights {weights}, and the difference:" in out
    assert f"{low:.4f} ({low - full:+.5f})" in out
    code, _, err = run(capsys, *asked[:-1], "int2")
    assert code != 0
    assert 'weights = "int2" is not known' in err
