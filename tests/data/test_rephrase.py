"""Texts written anew: every task makes its rows, pieces stand in order, and what is dropped is counted."""

from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from alloy.data.executors import Executor
from alloy.data.pipeline import run_stage
from alloy.data.prompts import load_prompt
from alloy.data.stages.rephrase import RephraseConfig, Task
from tests.core.endpoint import Endpoint, Reply

TASKS = get_args(Task)
PAIRS = "\n\n".join(f"**Question {i}:** What is {i}?\n**Answer:** It is {i}." for i in range(1, 11))
LONG = "a sentence that is long enough to be kept, with words and words and words " * 3


def run(tmp_path: Path, script: Any, texts: list[str], **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    (tmp_path / "in").mkdir()
    table = pa.table({"id": list("abcdefgh"[: len(texts)]), "text": ["raw"] * len(texts), "cleaned_text": texts})
    pq.write_table(table, tmp_path / "in" / "rows.parquet")
    with Endpoint(script) as endpoint:
        config = RephraseConfig(endpoint=endpoint.url, max_retries=0, backoff_s=0.001, **settings)
        manifest = run_stage(config, [str(tmp_path / "in")], tmp_path / "out", Executor(kind="serial"))
    return pq.read_table(tmp_path / "out").to_pylist(), manifest


def text_of(prompt: str) -> str:
    return prompt.rpartition("The text:\n\n")[2]


def test_each_task_makes_a_row_of_its_pieces_in_order(tmp_path: Path) -> None:
    """The cleaned text is asked about; a remark before an answer goes."""
    text = "First paragraph here.\n\nSecond paragraph here."

    def script(prompt: str, n: int) -> str:
        if "Question:" in prompt:
            return "Here are the questions:\n\n" + PAIRS
        return f"Sure! Here is the text:\n\n{LONG}{text_of(prompt)}"

    rows, manifest = run(tmp_path, script, [text, ""], tasks=TASKS, chunk_tokens=7)
    assert [row["task"] for row in rows] == list(TASKS)
    assert {row["source_id"] for row in rows} == {"a"}
    assert len({row["id"] for row in rows}) == len(TASKS)
    joined = f"{LONG}First paragraph here.\n\n{LONG}Second paragraph here."
    for row in rows:
        assert row["prompt_sha"] == load_prompt(f"rephrase-{row['task']}").sha
        assert row["chunk_ids"] == [0, 1]
        assert "cleaned_text" not in row
        if row["task"] != "diverse_qa":
            assert row["text"] == joined
    pieces = rows[TASKS.index("diverse_qa")]["text"].split("\n\nSecond")
    assert pieces[0].startswith(
        "First paragraph here.\n\nQuestion: What is 1?\nAnswer: It is 1.\n\nQuestion: What is 2?"
    )
    assert pieces[0].endswith("Answer: It is 8.")
    assert manifest["counts"]["pieces"] == 10


def test_what_cannot_be_used_is_dropped_and_counted(tmp_path: Path) -> None:
    """A half answer of questions keeps those that are whole."""

    def script(prompt: str, n: int) -> Reply | str:
        answers: dict[str, Reply | str] = {
            "down": Reply(status=500),
            "short": "Too short.",
            "refuse": "I'm sorry, but I can't do that.",
            "cut": Reply(LONG, finish_reason="length"),
            "half": Reply(PAIRS[:80], finish_reason="length"),
            "none": LONG,
        }
        return answers[text_of(prompt)]

    names = ["down", "short", "refuse", "cut", "half", "none"]
    rows, manifest = run(tmp_path, script, names, tasks=("distill", "diverse_qa"), dropped=True)
    reasons = {(row["source_id"], row["task"]): row["drop_reason"] for row in rows}
    assert len(reasons) == 12
    assert [reasons[i, "distill"] for i in "abcd"] == ["failed", "short", "refused", "truncated"]
    assert [reasons[i, "diverse_qa"] for i in "abf"] == ["failed", "no-questions", "no-questions"]
    (half,) = [row for row in rows if row["source_id"] == "e" and row["task"] == "diverse_qa"]
    assert half["text"] == "half\n\nQuestion: What is 1?\nAnswer: It is 1."
    assert {(row["source_id"], row["task"]) for row in rows if row["kept"]} == {("e", "diverse_qa"), ("f", "distill")}
    assert manifest["counts"]["dropped=failed"] == 2
