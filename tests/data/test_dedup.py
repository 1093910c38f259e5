import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloy.data.dedup import Entry, Index, Signing, canonical_url, group, roots, union
from alloy.data.executors import Executor
from alloy.data.minhash import MinHash, band_keys, codes_of, signatures
from alloy.data.parts import list_parts, read_part
from alloy.data.pipeline import read_manifest, run_stage
from alloy.data.shingles import Words, normalise
from alloy.data.stages.dedup import DedupConfig
from alloy.errors import DataError, RecipeError

MINHASH = MinHash(n=7, bands=8, rows=5)
SERIAL = Executor(kind="serial")
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "r", "st", "lom")]
Row = dict[str, Any]


def documents(count: int, seed: int) -> list[Row]:
    """Texts of about 300 characters, half of them another one with some words changed; all columns that count."""
    rng = random.Random(seed)
    rows: list[Row] = []
    for number in range(count):
        words = rng.choices(WORDS, k=60)
        if rows and rng.random() < 0.5:
            words = (rng.choice(rows)["text"] or "empty").lower().split()
            for _ in range(rng.choice([0, 0, 1, 3, 9])):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
        text = " ".join(words)
        rows.append(
            {
                "id": f"{rng.randrange(10**9):09d}-{number}",
                "text": rng.choice([text, text, text.upper(), f" {text}\n"])
                if rng.random() < 0.97
                else rng.choice(["", None]),
                "quality": rng.choice([None, 0.5, 2.0]),
                "from": rng.choice(["web", "book", None]),
            }
        )
    return rows


def write(folder: Path, rows: list[Row], files: int, groups: int = 9) -> list[Path]:
    """Parquet files of row groups of `groups` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(files):
        own = rows[len(rows) * number // files : len(rows) * (number + 1) // files]
        paths.append(folder / f"{number}.parquet")
        pq.write_table(pa.Table.from_pylist(own, schema=_schema(rows)), paths[-1], row_group_size=groups)
    return paths


def _schema(rows: list[Row]) -> pa.Schema:
    return pa.Table.from_pylist(rows).schema


def index_of(folder: Path, files: list[Path], part_bytes: int = 1 << 30, **signing: Any) -> Index:
    """An index of all parts of files."""
    index = Index(folder, Signing(minhash=MINHASH, score="quality", source="from", **signing))
    for part in list_parts(files, part_bytes):
        index.sign(part, read_part(part, 5))
    return index


def kept_ids(result: tuple[list[Entry], Any]) -> dict[str, str]:
    """By id: the id of the document kept in its place."""
    entries, kept = result
    ids = [name for entry in entries for name in entry.facts(["id"])["id"].to_pylist()]
    return {ids[i]: ids[int(other)] for i, other in enumerate(kept)}


def brute_force(rows: list[Row], sources: list[str]) -> dict[str, str]:
    """Pairs by comparing all, sets by walking, the best by Python's order."""
    texts = [normalise(row["text"] or "") for row in rows]
    keys = band_keys(signatures([codes_of(text, "char", Words()) for text in texts], MINHASH), MINHASH)
    near: dict[int, list[int]] = {i: [] for i in range(len(rows))}
    for a, b in itertools.combinations(range(len(rows)), 2):
        if texts[a] and texts[b] and (texts[a] == texts[b] or (keys[:, a] == keys[:, b]).any()):
            near[a].append(b)
            near[b].append(a)

    def rank(i: int) -> tuple[Any, ...]:
        row = rows[i]
        place = sources.index(row["from"]) if row["from"] in sources else len(sources)
        score = -row["quality"] if row["quality"] is not None else float("inf")
        return place, score, -len(texts[i]), row["id"]

    result: dict[str, str] = {}
    for i in range(len(rows)):
        seen, todo = {i}, [i]
        while todo:
            todo += [j for j in near[todo.pop()] if j not in seen and not seen.add(j)]
        result[rows[i]["id"]] = rows[min(seen, key=rank)]["id"]
    return result


@pytest.mark.parametrize("sources", [[], ["book", "web"]])
def test_groups_and_what_is_kept_equal_brute_force(tmp_path: Path, sources: list[str]) -> None:
    """All pairs compared one by one give the same sets, and Python's order the same document of each."""
    rows = documents(211, seed=1)
    index = index_of(tmp_path / "index", write(tmp_path, rows, files=3))
    found = kept_ids(group(index, sources))
    assert found == brute_force(rows, sources)
    assert 20 < sum(a != b for a, b in found.items()) < 150


@pytest.mark.parametrize(("files", "part_bytes"), [(1, 1 << 30), (1, 1), (7, 1 << 30), (7, 1)])
def test_neither_parts_nor_their_order_nor_memory_matter(tmp_path: Path, files: int, part_bytes: int) -> None:
    """One part or many, rows in another order, sorting in many ranges: the same groups."""
    rows = documents(157, seed=2)
    whole = kept_ids(group(index_of(tmp_path / "a", write(tmp_path / "whole", rows, files=1))))
    random.Random(3).shuffle(rows)
    index = index_of(tmp_path / "b", write(tmp_path / "cut", rows, files), part_bytes)
    assert kept_ids(group(index)) == whole
    assert kept_ids(group(index, memory_bytes=500)) == whole


def test_an_index_that_grew_is_one_made_at_once(tmp_path: Path) -> None:
    """Parts added later, in any order, and again."""
    rows = documents(130, seed=4)
    files = write(tmp_path / "in", rows, files=5)
    whole = kept_ids(group(index_of(tmp_path / "a", files)))
    for some in ([files[3]], [files[4], files[0]], files):
        grown = index_of(tmp_path / "b", some)
    assert kept_ids(group(grown)) == whole


def test_a_changed_file_takes_its_old_documents_along(tmp_path: Path) -> None:
    """What was signed of an earlier version is forgotten, also where the new one has fewer parts."""
    rows = documents(90, seed=5)
    files = write(tmp_path / "in", rows, files=2)
    index = index_of(tmp_path / "index", files, part_bytes=1)
    assert len(index.entries()) == 10
    write(tmp_path / "in", rows[:60], files=1, groups=100)
    index.forget_changed(str(file) for file in files)
    index = index_of(tmp_path / "index", files, part_bytes=1)
    assert sum(entry.rows for entry in index.entries()) == 60 + 45


def test_files_without_their_entry_are_made_again(tmp_path: Path) -> None:
    """A process killed before the entry was written leaves matrices that nobody reads."""
    files = write(tmp_path / "in", documents(60, seed=6), files=3)
    index = index_of(tmp_path / "index", files)
    expected = kept_ids(group(index))
    lost = index.entries()[1]
    (index.folder / f"{lost.stem}.entry").unlink()
    (index.folder / f"{lost.stem}.npy").write_bytes(b"half")
    (index.folder / f".{lost.stem}.npy.123.tmp").write_bytes(b"half")
    assert len(index.entries()) == 2
    assert kept_ids(group(index_of(tmp_path / "index", files))) == expected
    assert not list(index.folder.glob(".*"))


def test_an_index_of_other_settings_is_refused(tmp_path: Path) -> None:
    """The message names what differs."""
    Index(tmp_path, Signing(minhash=MINHASH))
    with pytest.raises(RecipeError, match=r"index .* was made with column = text, not body"):
        Index(tmp_path, Signing(minhash=MINHASH, column="body"))
    with pytest.raises(RecipeError, match=r"minhash = .*'n': 7.* not .*'n': 24"):
        Index(tmp_path, Signing(minhash=MinHash()))


def test_the_keep_rule_by_hand(tmp_path: Path) -> None:
    """Source, then score, then length, then id."""
    text = "one text that is the same in all of them " * 3
    rows = [
        {"id": "e", "text": text, "quality": 3.0, "from": "web"},
        {"id": "d", "text": text, "quality": None, "from": "book"},
        {"id": "b", "text": text, "quality": 3.0, "from": None},
        {"id": "c", "text": text + "more", "quality": 3.0, "from": "web"},
        {"id": "a", "text": "alone", "quality": 0.0, "from": "web"},
    ]
    index = index_of(tmp_path / "index", write(tmp_path, rows, files=1))
    for sources, best in (([], "c"), (["book"], "d"), (["web", "book"], "c")):
        assert kept_ids(group(index, sources)) == {"a": "a", **dict.fromkeys("bcde", best)}
    rows[3]["quality"] = 2.0
    index = index_of(tmp_path / "other", write(tmp_path / "other_rows", rows, files=1))
    assert kept_ids(group(index))["d"] == "b"


def test_of_copies_of_a_page_the_newest_stays(tmp_path: Path) -> None:
    """Older ones join its group whatever their text, and bring no other document into it."""
    other, text = "a text that stands on two pages of this little web " * 4, "the newest text of a page of its own " * 4
    rows = [
        {"id": "old", "text": other, "url": "http://www.x.org/p/", "fetch_time": "2023-01-01T00:00:00"},
        {"id": "new", "text": text, "url": "https://x.org/p#top", "fetch_time": "2024-01-01T00:00:00"},
        {"id": "oldest", "text": "zero", "url": "https://x.org/p?utm_source=a", "fetch_time": None},
        {"id": "else", "text": other, "url": "https://y.org/", "fetch_time": "2020-01-01T00:00:00"},
        {"id": "none", "text": text + "!", "url": None, "fetch_time": None},
        {"id": "half", "text": "first part", "url": "https://z.org/", "fetch_time": "2022"},
        {"id": "rest", "text": "second part", "url": "https://z.org/", "fetch_time": "2022"},
    ]
    files = write(tmp_path, rows, files=2)
    kept = kept_ids(group(index_of(tmp_path / "index", files)))
    assert kept == {
        "old": "none", "new": "none", "oldest": "none", "none": "none", "else": "else", "half": "half", "rest": "rest",
    }  # fmt: skip
    kept = kept_ids(group(index_of(tmp_path / "plain", files, by_url=False)))
    assert kept["old"] == kept["else"] != kept["new"]


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("HTTP://WWW.Example.org:80/a/b/?b=2&a=1&utm_campaign=x#f", "https://example.org/a/b?a=1&b=2"),
        ("https://example.org:8080/", "http://example.org:8080"),
        ("https://example.org/?q=", "https://example.org?q="),
    ],
)
def test_canonical_urls(url: str, same: str) -> None:
    """Ways to write one address."""
    assert canonical_url(url) == canonical_url(same) != canonical_url(same + "x")
    assert canonical_url("http://[broken") == "http://[broken"


@pytest.mark.parametrize("memory_bytes", [1 << 30, 1_000])
def test_verified_copies_are_similar_to_what_is_kept(tmp_path: Path, memory_bytes: int) -> None:
    """By sets of strings, each document that goes is at least so similar to the one that stays; without, some are not."""
    rows = documents(211, seed=7)
    index = index_of(tmp_path / "index", write(tmp_path, rows, files=2))
    texts = {row["id"]: normalise(row["text"] or "") for row in rows}

    def similarities(kept: dict[str, str]) -> list[float]:
        sets = {name: {text[i : i + 7] for i in range(len(text) - 6)} for name, text in texts.items()}
        return [len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in kept.items() if a != b]

    loose = similarities(kept_ids(group(index)))
    strict = similarities(kept_ids(group(index, verify=0.8, memory_bytes=memory_bytes)))
    assert min(loose) < 0.8 <= min(strict)
    assert len(strict) > len([s for s in loose if s >= 0.8]) * 0.9
    (tmp_path / "0.parquet").unlink()
    with pytest.raises(DataError, match=r"0\.parquet has changed or gone since it was signed"):
        group(index, verify=0.8)


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_union_equals_walking(pairs: list[tuple[int, int]], batches: int) -> None:
    """The root of each is the smallest number that can be reached."""
    parent = np.arange(30)
    for batch in range(batches):
        own = np.array(pairs[batch::batches], dtype=np.int64).reshape(-1, 2)
        union(parent, own[:, 0], own[:, 1])
    for start in range(30):
        seen, todo = {start}, [start]
        while todo:
            at = todo.pop()
            todo += [
                b for pair in pairs for a, b in (pair, pair[::-1]) if a == at and b not in seen and not seen.add(b)
            ]
        assert roots(parent)[start] == min(seen)


@pytest.mark.parametrize("order", ["up", "down", "mixed"])
def test_a_chain_of_a_hundred_thousand_is_joined_at_once(order: str) -> None:
    """Its depth costs rounds by its logarithm, so this ends."""
    chain = np.arange(100_001)
    pairs = np.stack([chain[:-1], chain[1:]])
    if order == "mixed":
        pairs = np.random.default_rng(0).permutation(chain)[pairs]
    parent = chain.copy()
    union(parent, *(pairs[:, ::-1] if order == "down" else pairs))
    assert not roots(parent).any()


@pytest.mark.parametrize("kind", ["serial", "process"])
def test_the_stage_marks_rows(tmp_path: Path, kind: Any) -> None:
    """Columns as by brute force, rows in order, others untouched; counts in the manifest; drop leaves copies out."""
    rows = documents(120, seed=8)
    write(tmp_path / "in", rows, files=4)
    own = {"unit": "char", "n": 7, "bands": 8, "rows": 5, "score": "quality", "source": "from", "priority": ["book"]}
    config = DedupConfig.model_validate(own)
    manifest = run_stage(config, [str(tmp_path / "in")], tmp_path / "out", Executor(kind=kind, workers=2))
    found = pq.read_table(sorted((tmp_path / "out").glob("part-*"))).to_pylist()
    expected = brute_force(rows, ["book"])
    groups = [name for name in set(expected.values()) if list(expected.values()).count(name) > 1]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    for row in found:
        best = expected[row["id"]]
        assert row["dup_group"] == (best if best in groups else None)
        assert row["dup_keep"] == (best == row["id"])
    copies = sum(not row["dup_keep"] for row in found)
    assert manifest["dedup"] | {"curve": 0} == {"indexed": 120, "copies": copies, "groups": len(groups), "curve": 0}
    drop = config.model_copy(update={"drop": True})
    run_stage(drop, [str(tmp_path / "in")], tmp_path / "dropped", SERIAL)
    left = pq.read_table(sorted((tmp_path / "dropped").glob("part-*")))["id"].to_pylist()
    assert left == [row["id"] for row in found if row["dup_keep"]]


def test_an_index_of_the_user_keeps_what_earlier_runs_saw(tmp_path: Path) -> None:
    """A second set is compared with the first, and only its own rows are written; `only` holds for signing too."""
    rows = documents(80, seed=9)
    files = write(tmp_path / "in", rows, files=2)
    config = DedupConfig(index=tmp_path / "index", unit="char", n=7, bands=8, rows=5, only="id != '0'")
    for number, file in enumerate(files):
        manifest = run_stage(config, [str(file)], tmp_path / f"out{number}", SERIAL)
    assert manifest["dedup"]["indexed"] == 80
    second = pq.read_table(tmp_path / "out1" / "part-00000.parquet").to_pylist()
    expected = brute_force([{**row, "quality": None, "from": None} for row in rows], [])
    assert {row["id"]: row["dup_keep"] for row in second} == {r["id"]: expected[r["id"]] == r["id"] for r in rows[40:]}
    shared = {row["dup_group"] for row in second} & {row["id"] for row in rows[:40]}
    assert shared, "no copy of the first set is in the second"


def test_nothing_to_compare(tmp_path: Path) -> None:
    """Empty files and texts are no copies of each other."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        '{"id": "1", "text": ""}\n{"id": "2", "text": " "}\n{"id": "3", "text": null}\n'
    )
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), tmp_path / "in/b.parquet"
    )
    run_stage(DedupConfig(), [str(tmp_path / "in")], tmp_path / "out", SERIAL)
    found = [row for file in sorted((tmp_path / "out").glob("part-*")) for row in pq.read_table(file).to_pylist()]
    assert [(row["dup_group"], row["dup_keep"]) for row in found] == [(None, True)] * 3


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    """With its name, before anything is read."""
    write(tmp_path / "in", documents(5, seed=10), files=1)
    with pytest.raises(DataError, match='no column "body"'):
        run_stage(DedupConfig(column="body"), [str(tmp_path / "in")], tmp_path / "out", SERIAL)
    with pytest.raises(DataError, match='no column "source"'):
        run_stage(DedupConfig(priority=("a",)), [str(tmp_path / "in")], tmp_path / "out2", SERIAL)
    assert read_manifest(tmp_path / "out")["status"] == "failed"
    with pytest.raises(ValueError, match="verify is for near copies"):
        DedupConfig(verify=0.8, fuzzy=False)
