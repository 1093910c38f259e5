import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alloy.data.decontaminate import Finder, Hit, Item, cut, read_benchmarks, read_items
from alloy.data.executors import Executor
from alloy.data.pipeline import run_stage
from alloy.data.stages.decontaminate import DecontaminateConfig
from alloy.errors import DataError, RecipeError

SERIAL = Executor(kind="serial")
QUESTION = "A farmer has seventeen sheep and buys twice as many goats; how many legs do all of them have now?"


def items_of(*texts: str) -> list[Item]:
    """Items of one benchmark."""
    return [Item(0, number, text) for number, text in enumerate(texts)]


def words_of(text: str) -> list[str]:
    """By another rule than ours, for texts of ASCII letters."""
    return re.sub(r"[^a-z0-9 ]", " ", text.lower()).split()


def random_texts(count: int, length: int, seed: int) -> list[str]:
    """Texts of a few words, so that runs are shared by chance and on purpose."""
    rng = random.Random(seed)
    return [
        "".join(rng.choice(["ab", "Cd", "e1", "f"]) + rng.choice([" ", " ", ", ", "\n"]) for _ in range(length))
        for _ in range(count)
    ]


@pytest.mark.parametrize("n", [5, 6, 9])
def test_runs_are_those_of_a_search_by_strings(n: int) -> None:
    """An item is hit exactly where n of its words stand in a row in the document."""
    items, rng = random_texts(23, 31, seed=n), random.Random(n)
    texts = [*random_texts(40, 57, seed=n + 1), "", "ab", "ab " * 300]
    for text in random_texts(20, 20, seed=n + 2):
        begin = rng.randrange(40)
        texts.append(f"{text}{rng.choice(items)[begin : begin + 40]} {text}")
    found = Finder(items_of(*items), n=n).find(texts)
    total = 0
    for text, hits in zip(texts, found, strict=True):
        words = words_of(text)
        runs = {item: [w[i : i + n] for i in range(len(w) - n + 1)] for item, w in enumerate(map(words_of, items))}
        expected = [
            (start, item)
            for start in range(len(words) - n + 1)
            for item in runs
            if words[start : start + n] in runs[item]
        ]
        places = [match.start() for match in re.finditer(r"\w+", text)]
        assert [(places.index(hit.start), hit.item) for hit in hits] == expected
        assert all(
            words_of(text[hit.start : hit.stop]) == words[i : i + n] for hit, (i, _) in zip(hits, expected, strict=True)
        )
        total += len(hits)
    assert total > 50


def test_rephrased_items_are_those_of_a_search_through_all_windows() -> None:
    """Fuzzy hits are exactly the items with a window of as many words whose trigrams are similar enough."""
    rng = random.Random(0)
    vocabulary = [a + b for a in "bcdfgklm" for b in ("at", "em", "il", "op")]
    items = [" ".join(rng.choices(vocabulary, k=rng.randrange(14, 40))) for _ in range(30)]
    texts = []
    for item in items * 3:
        words = item.split()
        for _ in range(rng.randrange(5)):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts.append(" ".join([*rng.choices(vocabulary, k=rng.randrange(30)), *words, *rng.choices(vocabulary, k=9)]))

    def trigrams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    hits = 0
    for text, found in zip(texts, Finder(items_of(*items), n=1000, fuzzy=0.7).find(texts), strict=True):
        words = text.split()
        expected = []
        for number, item in enumerate(items):
            own, size = trigrams(item.split()), len(item.split())
            windows = [trigrams(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]
            if max(len(own & window) / len(own | window) for window in windows) >= 0.7:
                expected.append(number)
        # n is out of reach, so whole items stand for exact runs
        whole = {number for number, item in enumerate(items) if f" {item} " in f" {text} "}
        assert sorted({hit.item for hit in found} | whole) == sorted({*expected, *whole})
        hits += len(expected)
    assert 30 < hits < 80


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        ("Quiz. What is the capital of France? Paris.", True),
        ("what is the capital of france", True),
        ("1. What is the capital of France\n2. And of Spain", True),
        ('He asked: "What is the capital of France?"', True),
        ("Tell me what is the capital of France?", False),
        ("What is the capital of France doing in this list?", False),
        ("What is the capital of Spain?", False),
    ],
)
def test_short_items_are_hit_where_they_stand_alone(text: str, hit: bool) -> None:
    """All their words, between breaks."""
    finder = Finder(items_of("What is the capital of France?"), n=13)
    assert bool(finder.find([text])[0]) == hit


def test_items_of_too_few_words_are_listed() -> None:
    """They are not looked for."""
    finder = Finder(items_of("2 + 2 = ?", "", "one two three four five", "x" * 100_000), n=13)
    assert finder.skipped == [0, 1, 3]
    assert finder.find(["2 + 2 = ?", "", "\0\ud800", "x" * 100_000]) == [[], [], [], []]


def test_case_punctuation_and_spacing_commands_do_not_hide_an_item() -> None:
    """Commands that mean something do distinguish."""
    finder = Finder(items_of(r"Find $\frac{a}{b}$ where a is 3 and b is the root of $x^2 = \pi$ now"), n=16)
    assert finder.find([r"FIND $ \frac { a } { b } \, \quad $: where a is 3, and b is the root of $x^{2} = \pi$"])[0]
    assert not finder.find([r"find $\dfrac{a}{b}$ where a is 3 and b is the root of $x^2 = \alpha$"])[0]


def test_cutting_by_hand() -> None:
    """200 characters go on each side; too many pieces or too little text leave nothing."""
    text = "".join(f"{i:04d} " for i in range(1000))
    assert cut(text, [Hit(0, 2000, 2100)]) == [text[:1800].strip(), text[2300:].strip()]
    assert cut(text, [Hit(0, 2000, 2100), Hit(1, 2300, 2350)]) == [text[:1800].strip(), text[2550:].strip()]
    assert cut(text, [Hit(0, 0, 10)]) == [text[210:].strip()]
    assert cut(text[:700], [Hit(0, 200, 420)]) == []
    spread = [Hit(0, at, at + 5) for at in range(300, 4900, 460)]
    assert len(cut(text * 2, spread[:9])) == 10
    assert cut(text * 2, spread[:10]) == []


def write_benchmarks(folder: Path) -> Path:
    """Two invented benchmarks: a JSONL file and a Parquet file."""
    sums = [{"question": f"Question: {QUESTION}", "answer": 204}, {"question": "Question: Why?", "answer": 1}]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    choices = {"text": ["in the blue harbour", "under the old bridge of the town"]}
    stem = "Where did the three painters of the northern school meet every spring to show their work?"
    pq.write_table(pa.Table.from_pylist([{"stem": stem, "choices": choices}]), folder / "choice.parquet")
    file = folder / "bench.toml"
    file.write_text(
        '[[benchmarks]]\nname = "sums"\npath = "sums.jsonl"\nfields = ["question"]\nprefix = "Question: "\n'
        '[[benchmarks]]\nname = "choice"\npath = "choice.parquet"\nfields = ["stem", "choices"]\n'
    )
    return file


def test_items_are_read_from_fields(tmp_path: Path) -> None:
    """Lists and tables are joined, the prefix is cut off."""
    items = read_items(read_benchmarks(write_benchmarks(tmp_path)))
    assert [(item.benchmark, item.number) for item in items] == [(0, 0), (0, 1), (1, 0)]
    assert items[0].text == QUESTION
    assert items[2].text.split("\n")[1:] == ["in the blue harbour", "under the old bridge of the town"]


@pytest.mark.parametrize(
    ("toml", "error", "message"),
    [
        ('[[benchmarks]]\nname = "a"\npath = "sums.jsonl"\nfields = ["query"]', DataError, 'no field "query" but question, answer'),
        ('[[benchmarks]]\nname = "a"\npath = "none.jsonl"\nfields = ["q"]', DataError, "no such file"),
        ('[[benchmarks]]\nname = "a"\npath = "sums.jsonl"', RecipeError, "fields"),
        ('[[benchmarks]]\nname = "a"\npath = "sums.jsonl"\nfield = ["q"]', RecipeError, 'bench.toml:4: unknown key .*field'),
        ('[[benchmarks]]\nname = "a"\npath = "sums.jsonl"\nfields = ["question"]\n' * 2, RecipeError, '2 benchmarks are called "a"'),
        ("", RecipeError, "benchmarks"),
    ],
)  # fmt: skip
def test_faults_of_a_benchmark_file_are_named(tmp_path: Path, toml: str, error: type[Exception], message: str) -> None:
    """Before any document is read."""
    file = write_benchmarks(tmp_path)
    file.write_text(toml)
    with pytest.raises(error, match=message):
        read_items(read_benchmarks(file))


def rows_with_leaks() -> list[dict[str, Any]]:
    """Seven documents; the third and fifth hold the first item."""
    filler = " ".join(f"sentence {i} about nothing that matters here." for i in range(20))
    leak = f"{filler} {QUESTION.upper()} {filler}"
    texts = [filler, "", leak, None, f"{QUESTION} And more.", "why?", filler + "end"]
    return [{"id": str(i), "text": text, "x": i} for i, text in enumerate(texts)]


@pytest.mark.parametrize("kind", ["serial", "process"])
def test_the_stage_marks_and_reports(tmp_path: Path, kind: Any) -> None:
    """Columns, and a table of benchmarks in the manifest that does not depend on the parts."""
    (tmp_path / "in").mkdir()
    rows = rows_with_leaks()
    for number, own in enumerate((rows[:3], rows[3:])):
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    config = DecontaminateConfig(benchmarks=write_benchmarks(tmp_path))
    manifest = run_stage(config, [str(tmp_path / "in")], tmp_path / "out", Executor(kind=kind, workers=2))
    found = [row for file in sorted((tmp_path / "out").glob("part-*")) for row in pq.read_table(file).to_pylist()]
    assert [(row["id"], row["text"], row["x"]) for row in found] == [(r["id"], r["text"], r["x"]) for r in rows]
    assert [row["contaminated_with"] for row in found] == [["sums"] if i in (2, 4) else [] for i in range(7)]
    runs = len(words_of(QUESTION)) - 13 + 1
    assert [row["contamination_hits"] for row in found] == [runs if i in (2, 4) else 0 for i in range(7)]
    sums, choice = manifest["benchmarks"]
    assert sums.pop("examples")[0]["text"].upper().count("SEVENTEEN SHEEP") == 1
    assert sums == {
        "name": "sums", "items": 2, "items_hit": 1, "items_skipped": [1], "documents_hit": 2, "share": 0.285714,
    }  # fmt: skip
    assert (choice["items_hit"], choice["documents_hit"], choice["items_skipped"]) == (0, 0, [])


def test_actions_remove_documents_or_windows(tmp_path: Path) -> None:
    """Dropped whole, or cut into pieces with ids of their own; what is clean is the same in both."""
    rows = rows_with_leaks()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = write_benchmarks(tmp_path)
    left = {}
    for action in ("drop-doc", "drop-window"):
        config = DecontaminateConfig.model_validate({"benchmarks": benchmarks, "action": action})
        run_stage(config, [str(tmp_path / "in.jsonl")], tmp_path / action, SERIAL)
        left[action] = pq.read_table(tmp_path / action / "part-00000.parquet").to_pylist()
    assert [row["id"] for row in left["drop-doc"]] == ["0", "1", "3", "5", "6"]
    # the fifth is too short to leave anything
    assert [row["id"] for row in left["drop-window"]] == ["0", "1", "2-0", "2-1", "3", "5", "6"]
    pieces = [row for row in left["drop-window"] if row["x"] == 2]
    place = rows[2]["text"].index(QUESTION.upper())
    assert pieces[0]["text"] == rows[2]["text"][: place - 200].strip()
    assert "SHEEP" not in pieces[0]["text"] + pieces[1]["text"]
    assert [row for row in left["drop-window"] if row["x"] != 2] == left["drop-doc"]


def test_changed_benchmarks_are_not_taken_as_done(tmp_path: Path) -> None:
    """Their files are part of what a run depends on."""
    (tmp_path / "in.jsonl").write_text(json.dumps(rows_with_leaks()[0]) + "\n")
    config = DecontaminateConfig(benchmarks=write_benchmarks(tmp_path))
    run_stage(config, [str(tmp_path / "in.jsonl")], tmp_path / "out", SERIAL)
    (tmp_path / "sums.jsonl").write_text(
        json.dumps(
            {
                "question": "sentence 0 about nothing that matters here. sentence 1 about nothing that matters",
                "answer": 0,
            }
        )
    )
    with pytest.raises(RecipeError, match="overwrite"):
        run_stage(config, [str(tmp_path / "in.jsonl")], tmp_path / "out", SERIAL)
    manifest = run_stage(config, [str(tmp_path / "in.jsonl")], tmp_path / "out", SERIAL, overwrite=True)
    assert manifest["benchmarks"][0]["documents_hit"] == 1
