"""Cleaning by a model that answers with errors, silence, broken JSON and bad texts: every row gets its status, none is lost."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from alloy.data.executors import Executor
from alloy.data.pipeline import run_stage
from alloy.data.prompts import load_prompt
from alloy.data.stages.clean import Clean, CleanConfig
from alloy.errors import RecipeError
from tests.core.endpoint import Endpoint, Reply

SERIAL = Executor(kind="serial")
FAST: dict[str, Any] = {
    "mode": "llm",
    "max_retries": 2,
    "timeout_s": 0.25,
    "backoff_s": 0.001,
    "max_in_flight": 4,
}


def page(name: str) -> str:
    """A page about `name` with a menu, two formulas and code."""
    return (
        "Home | About | Contact\n\n"
        f"# The {name}\n\n"
        f"The {name} of a positive number is the one whose square it is, and it is written in this way since the sixteenth century:\n\n"
        f"$$x_{{{name}}} = \\sqrt{{a^2 + b^2}}$$\n\n"
        f"It holds that $f({name}) = 2 x + 1$ for every point of the plane, which follows from the theorem that was proved above.\n\n"
        f"```python\ny = {name} + 1\n```\n\n"
        "© 2020 All rights reserved"
    )


def source(prompt: str) -> str:
    """The text that a prompt is about."""
    return prompt.rpartition("The text of the page:\n\n")[2]


def well(prompt: str) -> str:
    """What a good model makes of a page."""
    text = source(prompt)
    if text == "© 2020 All rights reserved":
        return "NO USEFUL CONTENT"
    return text.replace("Home | About | Contact\n\n", "").replace("\n\n© 2020 All rights reserved", "")


def script(prompt: str, n: int) -> Reply | str:
    """Behaves as the page's name says."""
    text, good = source(prompt), well(prompt)
    without = good.replace("$$x_", "$$y_")
    answers: dict[str, Reply | str] = {
        "overload": Reply(status=429, headers={"Retry-After": "0.01"}) if n == 0 else good,
        "crash": Reply(status=500) if n == 0 else good,
        "down": Reply(status=503),
        "hang": Reply(hang=True),
        "cutjson": Reply(content=b'{"choices": [{"message": {"con'),
        "garbled": Reply(content=b"\xfe\xff{{{"),
        "halfmath": without,
        "mended": without if n == 0 else good,
        "cutoff": Reply(good[:80], finish_reason="length"),
        "refuses": "I'm sorry, but I can't help with that.",
        "framed": "Here is the cleaned text:\n\n" + good if n == 0 else good,
        "fenced": f"````markdown\n{good}\n````",
        "loops": good + " and so on and on" * 60,
        "blank": "NO USEFUL CONTENT",
        "fine": good,
    }
    return next((answer for name, answer in answers.items() if name in text), good)


STATUS = {
    "overload": ("llm", "ok"),
    "crash": ("llm", "ok"),
    "down": ("failed", "no answer: HTTP 503"),
    "hang": ("failed", "no answer: timeout"),
    "cutjson": ("failed", "no answer: not JSON"),
    "garbled": ("failed", "no answer: not JSON"),
    "halfmath": ("failed", "math=0.50"),
    "mended": ("llm", "ok"),
    "refuses": ("failed", "math=0.00 code=0.00 refusal=1.00 novel=1.00"),
    "framed": ("llm", "ok"),
    "fenced": ("llm", "ok"),
    "blank": ("failed", "math=0.00 code=0.00"),
    "fine": ("llm", "ok"),
}


def write(folder: Path, texts: list[str | None]) -> str:
    folder.mkdir()
    pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), folder / "rows.parquet")
    return str(folder)


def test_every_row_gets_its_status(tmp_path: Path) -> None:
    """Whatever the endpoint does, the run ends with every row in its place, and no formula is lost."""
    names = [*STATUS, "loops", "cutoff"]
    rows = write(tmp_path / "in", [*(page(name) for name in names), None, " \n"])
    with Endpoint(script) as endpoint:
        config = CleanConfig(**FAST, endpoint=endpoint.url, usd_in=1.0, usd_out=2.0, trace=tmp_path / "trace.jsonl")
        manifest = run_stage(config, [rows], tmp_path / "out", SERIAL)
        temperatures = [r["temperature"] for r in endpoint.requests if "The halfmath" in r["messages"][-1]["content"]]
        seen = len(endpoint.requests)
        assert endpoint.most_at_once <= 4
    table = {row["n"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert list(table) == list(range(len(names) + 2))
    for n, name in enumerate(names):
        row = table[n]
        if name in STATUS:
            assert (row["clean_status"], row["clean_guard"]) == STATUS[name], name
        # the model's text or that of the rules: the same here
        assert row["cleaned_text"] == well("The text of the page:\n\n" + page(name)), name
        assert row["clean_math_kept"] == 1.0
        assert row["text"] == page(name)
    assert table[names.index("loops")]["clean_status"] == "failed"
    assert "loop" in table[names.index("loops")]["clean_guard"]
    assert table[names.index("cutoff")]["clean_status"] == "partial"
    assert "truncated" in table[names.index("cutoff")]["clean_guard"]
    assert {row["clean_status"] for row in list(table.values())[-2:]} == {"empty"}
    assert table[0]["clean_model"] == "scripted"
    assert table[0]["clean_prompt_sha"] == load_prompt("math").sha
    assert temperatures == [0.7, 0.0]
    counts = manifest["counts"]
    assert counts["clean_status=llm"] + counts["clean_status=failed"] + counts["clean_status=empty"] == len(names) + 1
    assert counts["llm_failed=timeout"] == 1
    cost = manifest["cost"]
    assert cost["failed"] == 4
    assert cost["retries"] >= 10
    assert cost["usd"] == pytest.approx((cost["prompt_tokens"] + 2 * cost["completion_tokens"]) / 1e6, abs=1e-4)
    # probes are traced, too; answers of one request come as one line
    assert seen > len((tmp_path / "trace.jsonl").read_text().splitlines()) - 1 > len(names)


def test_chunks_come_back_in_order_whatever_comes_first(tmp_path: Path) -> None:
    """Two runs with other orders of completion write the same rows; a failed chunk is cleaned by rules."""
    text = "\n\n".join(page(f"fine{i}" if i != 5 else "down") for i in range(9))
    rows = write(tmp_path / "in", [text, page("fine")])
    outputs = []
    for run in range(2):
        with Endpoint(script) as endpoint:
            flight = {**FAST, "max_in_flight": 1 if run else 8}
            config = CleanConfig(**flight, endpoint=endpoint.url, chunk_tokens=160)
            run_stage(config, [rows], tmp_path / f"out{run}", SERIAL)
        outputs.append(pq.read_table(tmp_path / f"out{run}").to_pylist())
    assert outputs[0] == outputs[1]
    row = outputs[0][0]
    assert row["clean_status"] == "partial"
    assert row["clean_guard"] == "5x ok; no answer: HTTP 503"
    assert row["cleaned_text"] == "\n\n".join(well(page(f"fine{i}" if i != 5 else "down")) for i in range(9))


def test_an_answer_that_is_cut_off_is_asked_for_in_halves(tmp_path: Path) -> None:
    def cut_long(prompt: str, n: int) -> Reply | str:
        return Reply("cut", finish_reason="length") if len(source(prompt)) > 700 else well(prompt)

    text = "\n\n".join(page(f"fine{i}") for i in range(2))
    with Endpoint(cut_long) as endpoint:
        stage = Clean(CleanConfig(**FAST, endpoint=endpoint.url))
        stage.start(tmp_path)
        result = stage.run(pa.table({"text": [text]}), None)  # pyright: ignore[reportArgumentType]
    assert result["clean_status"].to_pylist() == ["llm"]
    assert result["clean_guard"].to_pylist() == ["2x ok"]
    assert result["cleaned_text"].to_pylist() == ["\n\n".join(well(page(f"fine{i}")) for i in range(2))]


@pytest.mark.parametrize(("on_fail", "text"), [("raw", page("down")), ("drop", ""), ("rules", well(page("down")))])
def test_what_a_failed_row_holds_is_chosen(tmp_path: Path, on_fail: str, text: str) -> None:
    with Endpoint(script) as endpoint:
        config = CleanConfig(**{**FAST, "max_retries": 0}, endpoint=endpoint.url, on_fail=on_fail)  # pyright: ignore[reportArgumentType]
        run_stage(config, [write(tmp_path / "in", [page("down")])], tmp_path / "out", SERIAL)
    assert pq.read_table(tmp_path / "out")["cleaned_text"].to_pylist() == [text]


def test_nothing_of_use_and_prefilter(tmp_path: Path) -> None:
    """Spam goes; a page that the rules hardly touch is not asked about."""
    spam = "Buy cheap watches here, the best offer of the year for you and for all of your friends, order today."
    rows = write(tmp_path / "in", [spam, page("fine"), "A plain paragraph without any boilerplate in it."])
    with Endpoint(lambda p, n: "NO USEFUL CONTENT." if "Buy" in p else script(p, n)) as endpoint:
        config = CleanConfig(**FAST, endpoint=endpoint.url, prefilter=0.05)
        manifest = run_stage(config, [rows], tmp_path / "b", SERIAL)
        assert len(endpoint.requests) == 1
    assert pq.read_table(tmp_path / "b")["clean_status"].to_pylist() == ["skipped", "llm", "skipped"]
    assert manifest["counts"]["saved_tokens"] == -(-len(spam) // 4) + 12
    with Endpoint(lambda p, n: "NO USEFUL CONTENT.") as endpoint:
        run_stage(CleanConfig(**FAST, endpoint=endpoint.url), [rows], tmp_path / "c", SERIAL)
    table = pq.read_table(tmp_path / "c")
    assert table["clean_status"].to_pylist() == ["nothing", "failed", "nothing"]
    assert table["cleaned_text"].to_pylist() == ["", well(page("fine")), ""]


def test_labels_are_read_from_answers(tmp_path: Path) -> None:
    def label(prompt: str, n: int) -> str:
        if "Which subject" in prompt:
            return "**Mathematics**." if "fine" in prompt else "Mathematics or Physics"
        return "Some code.\nFinal score: 1" if "fine" in prompt else "Final score: 7"

    rows = write(tmp_path / "in", [page("fine"), page("other"), ""])
    with Endpoint(label) as endpoint:
        config = CleanConfig(**{**FAST, "mode": "rules"}, endpoint=endpoint.url, labels=("label-topic", "label-code2"))
        run_stage(config, [rows], tmp_path / "out", SERIAL)
    table = pq.read_table(tmp_path / "out")
    assert table["label_topic"].to_pylist() == ["Mathematics", None, None]
    assert table["label_code2"].to_pylist() == ["1", None, None]
    assert table["clean_status"].to_pylist() == ["rules", "rules", "empty"]


def test_a_resumed_run_asks_for_nothing_that_it_has(tmp_path: Path) -> None:
    """The part is lost, its answers are not."""
    rows = write(tmp_path / "in", [page(f"fine{i}") for i in range(7)])
    with Endpoint(script) as endpoint:
        config = CleanConfig(**FAST, endpoint=endpoint.url)
        run_stage(config, [rows], tmp_path / "out", SERIAL)
        first = pq.read_table(tmp_path / "out").to_pylist()
        for file in (*tmp_path.glob("out/part-*"), *tmp_path.glob("out/_done/*")):
            file.unlink()
        manifest = tmp_path / "out" / "_manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "status": "interrupted"}))
        run_stage(config, [rows], tmp_path / "out", SERIAL)
        assert len(endpoint.requests) == 7
    assert pq.read_table(tmp_path / "out").to_pylist() == first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "llm"}, "neither an endpoint nor a server"),
        ({"mode": "llm", "endpoint": "http://a", "server": "auto", "model": "m"}, "exclude each other"),
        ({"mode": "llm", "server": "auto"}, "model names none"),
        ({"prompt": "poetry"}, "neither a file nor one of code, "),
    ],
)
def test_settings_that_clash_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        CleanConfig(**settings)


def test_refusals_are_one_sentence(tmp_path: Path) -> None:
    rows = write(tmp_path / "in", ["text"])
    config = CleanConfig(**{**FAST, "max_retries": 0}, endpoint="http://127.0.0.1:9")
    with pytest.raises(RecipeError, match="the endpoint does not answer a probe of one token"):
        run_stage(config, [rows], tmp_path / "out", SERIAL)
    array = Executor(kind="array", array_index=0, array_count=1)
    with pytest.raises(RecipeError, match=r"server = auto does not work with executor\.kind = array"):
        run_stage(CleanConfig(mode="llm", server="auto", model="m"), [rows], tmp_path / "b", array)
    prompt = tmp_path / "mine.toml"
    prompt.write_text('user = "Clean this."')
    with pytest.raises(ValidationError, match="where the text of the page goes"):
        CleanConfig(prompt=str(prompt))
