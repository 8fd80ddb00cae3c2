"""The sites' data: disjoint, complete, seeded, and never written over what is somebody's own."""

import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.site import partition
from app.site.rows import read
from supernode import partitions
from supernode.download import PrepareError
from supernode.partitions import BUNDLED, Split, prepare_data
from supernode.quantise import prepare_model
from tests.killed import kills
from tests.samples import ROWS, write_jsonl


def numbered(count: int) -> list[dict[str, str]]:
    """Rows that are all different, with a class and a text that is hard on formats."""
    topics = ["heart", "lung", "kidney"]
    return [
        {
            "instruction": "Answer",
            "input": f"Question {n}: a\u2028b — “é”?",
            "output": f"Answer {n}\nof two lines.",
            "topic": topics[n % 3],
        }
        for n in range(count)
    ]


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "source.jsonl", numbered(100)))


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    return tmp_path / "federation"


def rows_of(federation: Path, site: int, part: str) -> list[dict[str, str]]:
    text = (federation / f"site-{site:02d}" / "data" / f"{part}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def inputs(federation: Path, sites: int) -> list[str]:
    return [
        row["input"]
        for site in range(sites)
        for part in ("train", "holdout")
        for row in rows_of(federation, site, part)
    ]


def files(federation: Path) -> dict[str, bytes]:
    return {
        p.relative_to(federation).as_posix(): p.read_bytes()
        for p in federation.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
@pytest.mark.parametrize("sites", [1, 3, 7])
def test_the_partitions_are_disjoint_and_complete(
    source: str, federation: Path, partitioner: str, sites: int
) -> None:
    prepare_data(federation, Split(source, sites, partitioner, partition_by="topic", alpha=5.0))
    assert Counter(inputs(federation, sites)) == Counter(r["input"] for r in numbered(100))
    sizes = []
    for site in range(sites):
        train, holdout = (rows_of(federation, site, part) for part in ("train", "holdout"))
        sizes.append(len(train) + len(holdout))
        assert len(holdout) == sizes[-1] // 10
        assert all(set(row) == {"instruction", "input", "output"} for row in train)
    assert min(sizes) >= 2
    if partitioner == "iid":
        assert max(sizes) - min(sizes) <= 1


def test_what_prepare_writes_is_what_the_app_reads(source: str, federation: Path) -> None:
    prepare_data(federation, Split(source, 4))
    read = {
        (row.question, row.answer)
        for site in range(4)
        for part in ("train", "holdout")
        for row in partition.load(federation / f"site-{site:02d}", part)
    }
    assert read == {(r["input"], r["output"]) for r in numbered(100)}


def test_the_holdout_is_a_tenth_and_at_most_its_limit(source: str, federation: Path) -> None:
    prepare_data(federation, Split(source, 2, holdout_fraction=0.5, holdout_rows=8))
    assert [len(rows_of(federation, s, "holdout")) for s in (0, 1)] == [8, 8]
    assert [len(rows_of(federation, s, "train")) for s in (0, 1)] == [42, 42]


def test_a_site_that_is_too_small_to_hold_a_row_out_is_told(
    tmp_path: Path, federation: Path
) -> None:
    source = write_jsonl(tmp_path / "few.jsonl", ROWS[:12])
    said = prepare_data(federation, Split(str(source), 2))
    assert any("WARNING: 2 of 2 sites hold no row out" in line for line in said)
    assert not any(
        "hold no row out" in x for x in prepare_data(tmp_path / "f", Split(str(source), 1))
    )


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet"])
def test_the_seed_decides_who_gets_what(tmp_path: Path, source: str, partitioner: str) -> None:
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split = Split(source, 3, partitioner, partition_by="topic", seed=seed)
        prepare_data(tmp_path / name, split)
        results.append(
            {n: c for n, c in files(tmp_path / name).items() if n != "prepared/data.json"}
        )
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert [r["input"] for r in rows_of(tmp_path / "a", 0, "train")] != [
        r["input"] for r in numbered(100)[: len(rows_of(tmp_path / "a", 0, "train"))]
    ], "the rows were not shuffled"


def test_a_small_alpha_gives_each_site_classes_of_its_own(source: str, federation: Path) -> None:
    topic = {r["input"]: r["topic"] for r in numbered(100)}

    def largest_share(alpha: float, name: str) -> float:
        folder = federation / name
        prepare_data(folder, Split(source, 3, "dirichlet", "topic", alpha=alpha))
        shares = []
        for site in range(3):
            rows = [r for part in ("train", "holdout") for r in rows_of(folder, site, part)]
            counts = Counter(topic[r["input"]] for r in rows)
            shares.append(max(counts.values()) / len(rows))
        return sum(shares) / 3

    assert largest_share(0.1, "skewed") > largest_share(1000.0, "even") + 0.2


def test_the_manifest_holds_rows_and_sha256_of_every_file(source: str, federation: Path) -> None:
    lines = prepare_data(federation, Split(source, 3))
    manifest = json.loads((federation / "prepared" / "data.json").read_text())
    written = {n: c for n, c in files(federation).items() if n != "prepared/data.json"}
    assert set(manifest["files"]) == set(written)
    assert len(written) == 6
    for name, content in written.items():
        facts = manifest["files"][name]
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["rows"] == content.count(b"\n")
        assert any(name in line and str(facts["rows"]) in line for line in lines)


def test_a_second_call_changes_no_file(source: str, federation: Path) -> None:
    first = prepare_data(federation, Split(source, 3))
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in federation.rglob("*")}
    assert prepare_data(federation, Split(source, 3)) == first
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in federation.rglob("*")} == before


def test_another_split_replaces_partitions_that_nobody_touched(
    source: str, federation: Path
) -> None:
    prepare_data(federation, Split(source, 3))
    prepare_data(federation, Split(source, 3, seed=9))
    assert Counter(inputs(federation, 3)) == Counter(r["input"] for r in numbered(100))
    prepare_data(federation, Split(source, 5))
    assert Counter(inputs(federation, 5)) == Counter(r["input"] for r in numbered(100))


@pytest.mark.parametrize("content", [b"", b'{"split": ', b"[]", b'{"files": {}}', b"\xff"])
def test_a_damaged_manifest_is_one_line_and_nothing_is_overwritten(
    tmp_path: Path, federation: Path, content: bytes
) -> None:
    manifest = federation / "prepared" / "data.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(content)
    own = write_jsonl(federation / "site-00" / "data" / "train.jsonl", [ROWS[0]])
    with pytest.raises(PrepareError, match=r"^[^\n]*data\.json is not what[^\n]*$"):
        prepare_data(federation, Split(str(tmp_path / "any.jsonl"), 3))
    assert own.read_text() == json.dumps(ROWS[0]) + "\n"


@pytest.mark.parametrize("name", ["train.jsonl", "holdout.jsonl"])
def test_a_file_that_was_corrected_is_the_sites_own_and_never_overwritten(
    source: str, federation: Path, name: str
) -> None:
    first = prepare_data(federation, Split(source, 3))
    mine = federation / "site-01" / "data" / name
    mine.write_text(mine.read_text("utf-8") + json.dumps(ROWS[0]) + "\n", encoding="utf-8")
    before = files(federation)
    again = prepare_data(federation, Split(source, 3))  # as with each `docker compose up`
    said = f"site-01/data/{name}: changed or put there since; it is the site's own, and stays"
    assert said in again
    assert set(first) - set(again) == {line for line in first if f"site-01/data/{name}" in line}
    with pytest.raises(PrepareError, match=f"site-01/data/{name}"):
        prepare_data(federation, Split(source, 3, seed=9))  # others would get its rows
    assert files(federation) == before


def test_a_site_may_put_a_file_of_its_own_in_the_place_of_prepares(
    source: str, federation: Path
) -> None:
    prepare_data(federation, Split(source, 3))
    (federation / "site-02" / "data" / "train.jsonl").unlink()
    own = federation / "site-02" / "data" / "train.CSV"
    own.write_text("question;answer\nWhy?;Because.\n")
    before = files(federation)
    said = prepare_data(federation, Split(source, 3))
    assert [line for line in said if "site's own" in line] == [
        "site-02/data/train.CSV: changed or put there since; it is the site's own, and stays"
    ]
    assert files(federation) == before
    assert partition.load(federation / "site-02", "train") == [partition.Row("Why?", "Because.")]


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet", "holdout.jsonl"])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_hospitals_own_file_is_never_overwritten(
    source: str, federation: Path, name: str, prepared: bool
) -> None:
    if prepared:
        prepare_data(federation, Split(source, 3, seed=9))
    mine = federation / "site-02" / "data" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("my own")
    before = files(federation)
    with pytest.raises(PrepareError, match=f"site-02/data/{name}"):
        prepare_data(federation, Split(source, 3))
    assert files(federation) == before


def test_after_fewer_sites_as_many_as_before_can_be_prepared_again(
    source: str, federation: Path
) -> None:
    for sites in (4, 2, 4):
        prepare_data(federation, Split(source, sites))
        assert Counter(inputs(federation, sites)) == Counter(r["input"] for r in numbered(100))
        # No row stays behind at a site that takes no part: it may come back one day.
        assert len(list(federation.rglob("*.jsonl"))) == 2 * sites


def test_after_an_interruption_the_next_call_completes_the_partitions(
    source: str, federation: Path
) -> None:
    in_the_way = federation / "site-02" / "data"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()  # as a full disk or a killed container: some sites written, others not
    with pytest.raises((OSError, PrepareError)):
        prepare_data(federation, Split(source, 3))
    in_the_way.unlink()
    prepare_data(federation, Split(source, 3))
    assert Counter(inputs(federation, 3)) == Counter(r["input"] for r in numbered(100))


def test_no_row_of_a_local_file_stays_anywhere_but_with_its_site(
    tmp_path: Path, federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    rows = [row | {"input": f"only-here-{n}"} for n, row in enumerate(numbered(40))]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    left = federation / "prepared" / ".rows-killed"  # by a call that could not tidy up
    left.mkdir(parents=True)
    prepare_data(federation, Split(str(source), 2), tmp_path / "cache")
    places = [tmp_path, Path(os.environ["HF_DATASETS_CACHE"])]
    found = {
        p
        for folder in places
        for p in folder.rglob("*")
        if p.is_file() and p != source and b"only-here-" in p.read_bytes()
    }
    sites = [federation / f"site-{n:02d}" / "data" for n in range(2)]
    assert {p.parent for p in found} == set(sites)
    assert [p.name for p in (federation / "prepared").iterdir()] == ["data.json"]
    assert not (tmp_path / "cache").exists()


def test_own_files_go_to_their_sites_in_every_format(tmp_path: Path, federation: Path) -> None:
    folder = tmp_path / "own"
    write_jsonl(folder / "site-00.jsonl", numbered(20)[:10])
    (folder / "site-01.json").write_text(json.dumps(numbered(20)[10:15]))
    pq.write_table(pa.Table.from_pylist(numbered(20)[15:]), folder / "site-02.parquet")
    prepare_data(federation, Split(str(folder), 3, "files"))
    for site, (start, end) in enumerate([(0, 10), (10, 15), (15, 20)]):
        rows = rows_of(federation, site, "train") + rows_of(federation, site, "holdout")
        assert {r["input"] for r in rows} == {r["input"] for r in numbered(20)[start:end]}


def all_of(federation: Path, site: int) -> tuple[list[str], list[str]]:
    """The questions that this site trains on, and those that it holds out."""
    train, holdout = (rows_of(federation, site, part) for part in ("train", "holdout"))
    return [r["input"].strip() for r in train], [r["input"].strip() for r in holdout]


def test_a_question_that_a_sites_file_has_twice_is_taken_once(
    tmp_path: Path, federation: Path
) -> None:
    rows = numbered(20)
    again = [r | {"input": f" {r['input']}\n", "output": "Another answer."} for r in rows[:17]]
    write_jsonl(tmp_path / "own" / "site-00.jsonl", rows + again)
    split = Split(str(tmp_path / "own"), 1, "files", holdout_fraction=0.5)
    said = prepare_data(federation, split)
    train, holdout = all_of(federation, 0)
    assert sorted(train + holdout) == sorted(r["input"] for r in rows)
    assert len(holdout) == 10
    answers = {r["output"] for part in ("train", "holdout") for r in rows_of(federation, 0, part)}
    assert answers == {r["output"] for r in rows}  # the first of each
    assert "WARNING: site-00.jsonl: 37 rows, 20 of them used, 17 that ask a question again" in said


def test_what_several_sites_have_is_trained_on_and_never_held_out(
    tmp_path: Path, federation: Path
) -> None:
    """Or one would be scored on what another trains on."""
    rows = numbered(40)
    own = [rows[:20], rows[8:30], rows[28:] + rows[:2]]
    for site, part in enumerate(own):
        write_jsonl(tmp_path / "own" / f"site-{site:02d}.jsonl", part)
    split = Split(str(tmp_path / "own"), 3, "files", holdout_fraction=0.4)
    said = prepare_data(federation, split)
    assert said[-1] == "16 questions are at more than one site: none of them is held out"
    assert prepare_data(federation, split) == said  # also of the call that finds them made
    trained: set[str] = set()
    held_out: list[str] = []
    for site, part in enumerate(own):
        train, holdout = all_of(federation, site)
        assert sorted(train + holdout) == sorted(r["input"] for r in part), "no row is lost"
        trained |= set(train)
        held_out += holdout
    assert not trained & set(held_out)
    # Two fifths; of the first site only 6 rows are nobody else's.
    assert [len(all_of(federation, site)[1]) for site in range(3)] == [6, 8, 5]


def test_partitions_of_another_versions_reader_are_made_anew(
    tmp_path: Path, federation: Path
) -> None:
    write_jsonl(tmp_path / "own" / "site-00.jsonl", numbered(20))
    split = Split(str(tmp_path / "own"), 1, "files")
    prepare_data(federation, split)
    manifest_file = federation / "prepared" / "data.json"
    written = manifest_file.read_text()
    manifest = json.loads(written)
    del manifest["split"]["reader"]  # as an older version wrote it
    manifest_file.write_text(json.dumps(manifest))
    prepare_data(federation, split)
    assert manifest_file.read_text() == written


def test_killed_anywhere_prepare_is_completed_by_the_next_call(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    table = read({source: Path(source)})
    # Read once, not fifty times.
    monkeypatch.setattr(partitions, "source_table", lambda *_: table)
    prepare_data(start, Split(source, 3))
    for federation in kills(lambda f: prepare_data(f, Split(source, 2, seed=9)), start):
        prepare_data(federation, Split(source, 1))  # another one than that, with fewer sites
        assert Counter(inputs(federation, 1)) == Counter(r["input"] for r in numbered(100))
        names = {f"site-00/data/{part}.jsonl" for part in ("train", "holdout")}
        assert set(files(federation)) == names | {"prepared/data.json"}


@pytest.mark.parametrize("twice", [False, True])
def test_own_files_must_be_exactly_one_a_site(
    tmp_path: Path, federation: Path, twice: bool
) -> None:
    folder = tmp_path / "own"
    write_jsonl(folder / "site-00.jsonl", numbered(10))
    if twice:
        write_jsonl(folder / "site-01.jsonl", numbered(10))
        write_jsonl(folder / "site-01.json", numbered(10))
    with pytest.raises(PrepareError, match="site-01"):
        prepare_data(federation, Split(str(folder), 2, "files"))
    assert not list(federation.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["site-03.jsonl", "site-04.CSV"], "site-03.jsonl, site-04.CSV are beyond --sites 3"),
        (["more/site-100.json"], "more/site-100.json is beyond --sites 3"),
        (["Site-01.jsonl", "site-1.jsonl"], "Site-01.jsonl, site-1.jsonl are beyond --sites 3, or"),
    ],
)
def test_own_files_that_no_site_would_get_are_refused(
    tmp_path: Path, federation: Path, names: list[str], words: str
) -> None:
    folder = tmp_path / "own"
    for name in ["site-00.jsonl", "site-01.jsonl", "site-02.jsonl", *names]:
        write_jsonl(folder / name, numbered(10))
    (folder / "notes.txt").touch()
    with pytest.raises(PrepareError, match=re.escape(f"{folder}: {words}")):
        prepare_data(federation, Split(str(folder), 3, "files"))
    assert not list(federation.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("left", "missing"), [(("input", "topic"), "output"), (("output", "topic"), "instruction")]
)
def test_a_source_without_a_column_is_refused_naming_it_and_those_it_has(
    tmp_path: Path, federation: Path, left: tuple[str, str], missing: str
) -> None:
    rows = [{k: v for k, v in row.items() if k in left} for row in numbered(20)]
    source = write_jsonl(tmp_path / "source.jsonl", rows)
    with pytest.raises(PrepareError, match=f"no column '{missing}'.*; it has {', '.join(left)}$"):
        prepare_data(federation, Split(str(source), 2))


@pytest.mark.parametrize(
    ("row", "has"),
    [
        ({"Warum ist Frau Meier gelb?": "x", "topic": "y"}, "2 columns"),
        ({"topic": "x", "72": "y"}, "2 columns"),
        ({"topic": "x", "p" * 33: "y"}, "2 columns"),
        ({f"c{n}": "x" for n in range(13)}, "13 columns"),
        ({f"c{n}": "x" for n in range(12)}, ", ".join(f"c{n}" for n in range(12))),
        ({"Höhe_cm": "x", "icd-10.code": "y"}, "höhe_cm, icd-10.code"),
    ],
)
def test_columns_are_listed_only_where_none_looks_like_a_rows_text(
    tmp_path: Path, federation: Path, row: dict[str, str], has: str
) -> None:
    """A file without a line of column names has a row there, an object of questions has those."""
    source = str(write_jsonl(tmp_path / "s.jsonl", [row] * 20))
    with pytest.raises(PrepareError, match=f"; it has {re.escape(has)}$"):
        prepare_data(federation, Split(source, 2))
    given = Split(source, 2, "dirichlet", "specialty", columns=",".join([*row][:2]))
    write_jsonl(tmp_path / "s.jsonl", [{k: str(n) for k in row} for n in range(20)])
    with pytest.raises(PrepareError, match=f" has {re.escape(has)}$"):
        prepare_data(federation, given)


NO_CLASS = float("nan"), "N/A", "<NA>"


def _write_source(path: Path, content: Any) -> str:
    if content is None:
        return str(path)
    path.write_bytes(content) if isinstance(content, bytes) else write_jsonl(path, content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "changes", "words"),
    [
        ("few.jsonl", numbered(5), {}, "5 rows are too few for 3 sites"),
        ("x.jsonl", numbered(20), {"partitioner": "random"}, "random"),
        ("x.jsonl", numbered(20), {"partitioner": "dirichlet"}, "--partition-by"),
        (
            "x.jsonl",
            numbered(20),
            {"partitioner": "dirichlet", "partition_by": "specialty"},
            "specialty.*topic",
        ),
        ("rows.xlsx", b"PK", {}, r"one of \.jsonl, \.json, \.csv, \.parquet is needed"),
        ("rows.csv", b"instruction,input,output\n", {}, "0 rows are too few"),
        ("x.jsonl", numbered(20), {"sites": 0}, "^--sites 0: a whole number above 0"),
        ("x.jsonl", numbered(20), {"alpha": -1.0}, r"^--alpha -1\.0: a number above 0"),
        ("x.jsonl", numbered(20), {"alpha": float("nan")}, "^--alpha nan: a number above 0"),
        ("x.jsonl", numbered(20), {"seed": -1}, "^--seed -1: a whole number from 0"),
        ("gone.jsonl", None, {"partitioner": "random"}, "--partitioner random: iid, dirichlet or"),
        (
            "x.jsonl",
            [*numbered(20), numbered(21)[20] | {"topic": None}],
            {"partitioner": "dirichlet", "partition_by": "topic"},
            "1 rows have nothing in column 'topic'; .*of instruction, input, output, topic$",
        ),
        (
            "x.jsonl",
            [
                *numbered(20),
                *(r | {"topic": x} for r, x in zip(numbered(23)[20:], NO_CLASS, strict=True)),
            ],
            {"partitioner": "dirichlet", "partition_by": "topic"},
            "3 rows have nothing in column 'topic'",
        ),
        (
            "x.jsonl",
            numbered(20),
            {"columns": "question"},
            "^--columns question: QUESTION,ANSWER is needed",
        ),
        ("bad.parquet", b"not parquet", {}, "bad.parquet"),
        ("bad.json", b"{", {}, "bad.json"),
    ],
)
def test_a_split_that_cannot_be_made_is_one_line_and_writes_nothing(
    tmp_path: Path,
    federation: Path,
    name: str,
    content: Any,
    changes: dict[str, Any],
    words: str,
) -> None:
    source = _write_source(tmp_path / name, content)
    with pytest.raises(PrepareError, match=words) as caught:
        prepare_data(federation, Split(source, **{"sites": 3, **changes}))
    assert "\n" not in str(caught.value)
    assert not list(federation.rglob("*.json*"))


def test_a_data_set_that_is_neither_here_nor_on_the_hub_is_named(federation: Path) -> None:
    with pytest.raises(PrepareError, match="nobody/no-such-data"):
        prepare_data(federation, Split("nobody/no-such-data", 2))


@pytest.mark.parametrize(
    "name",
    ["", " ", "rows.jsonl", "data/rows.csv", "/no/such/rows", "../rows", "~/rows", "a/b/c",
     "https://example.org/rows"],
)  # fmt: skip
def test_a_path_with_a_slip_is_not_looked_for_on_the_hub(
    federation: Path, tmp_path: Path, name: str
) -> None:
    said = re.escape("here, and the hub has no such names, only ORG/NAME")
    with pytest.raises(PrepareError, match=f"data set .*: no file or folder {said}"):
        prepare_data(federation, Split(name, 2))
    with pytest.raises(PrepareError, match=f"base model .*: no folder {said}"):
        prepare_model(tmp_path / "models", tmp_path, name, "none", None)


def test_the_bundled_flashcards_are_enough_small_and_all_different(federation: Path) -> None:
    assert BUNDLED.stat().st_size < 300_000
    rows = [json.loads(x) for x in BUNDLED.read_text("utf-8").split("\n") if x]
    assert len(rows) >= 400
    assert all(set(row) == {"instruction", "input", "output"} for row in rows)
    assert all(row["input"].strip() and row["output"].strip() for row in rows)
    assert len({row["input"].strip().casefold() for row in rows}) == len(rows)
    prepare_data(federation, Split(str(BUNDLED), 20))
    trains = [partition.load(federation / f"site-{s:02d}", "train") for s in range(20)]
    assert min(map(len, trains)) >= 16  # a batch of the recipe
