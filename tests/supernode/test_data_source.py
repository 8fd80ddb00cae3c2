"""Where rows come from: read anew each time, no copy left, and every row that is lost is said."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.site import partition
from app.site.rows import VERSION
from supernode.download import PrepareError
from supernode.partitions import BUNDLED, Split, prepare_data
from tests.samples import write_jsonl


def numbered(count: int, what: str = "") -> list[dict[str, str]]:
    return [{"question": f"Question {what}{n}?", "answer": f"Answer {n}."} for n in range(count)]


def held(federation: Path, sites: int) -> tuple[list[str], list[str]]:
    """The questions that are trained on, and those that are held out, at all sites."""
    train, holdout = (
        [r.question for n in range(sites) for r in partition.load(federation / f"site-{n:02d}", p)]
        for p in ("train", "holdout")
    )
    return train, holdout


def test_a_source_of_the_same_path_size_and_time_is_read_anew(tmp_path: Path) -> None:
    source, federation = write_jsonl(tmp_path / "s.jsonl", numbered(40, "a")), tmp_path / "f"
    prepare_data(federation, Split(str(source), 2))
    times = source.stat()
    write_jsonl(source, numbered(40, "b"))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    prepare_data(federation, Split(str(source), 2))
    assert all("Question b" in q for part in held(federation, 2) for q in part)


def folder_of(path: Path, splits: dict[str, list[Any]], readme: str = "") -> Path:
    for name, rows in splits.items():
        write_jsonl(path / f"{name}.jsonl", rows)
    path.mkdir(exist_ok=True)
    (path / "README.md").write_text(readme)
    return path


@pytest.mark.parametrize("partitioner", ["iid", "files"])
def test_a_changed_file_of_a_source_folder_is_noticed(tmp_path: Path, partitioner: str) -> None:
    files = {"site-00": numbered(20), "site-01": numbered(20, "of another ")}
    files = {"train": numbered(30)} if partitioner == "iid" else files
    source, federation = folder_of(tmp_path / "set", files), tmp_path / "f"
    split = Split(str(source), 2, partitioner)
    prepare_data(federation, split)
    changed = "train" if partitioner == "iid" else "site-01"
    write_jsonl(source / f"{changed}.jsonl", numbered(30, "new "))
    prepare_data(federation, split)
    train, holdout = held(federation, 2)
    assert sum("new" in q for q in train + holdout) == 30


def test_of_a_folder_with_splits_train_is_taken(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "set", {"train": numbered(20), "test": numbered(20, "test ")})
    write_jsonl(source / "more" / "fever-dev.jsonl", numbered(20, "dev "))
    split = Split(str(source), 2)
    lines = prepare_data(tmp_path / "f", split)
    train, holdout = held(tmp_path / "f", 2)
    assert sorted(train + holdout) == sorted(r["question"] for r in numbered(20))
    said = f"{source}: not read: more/fever-dev.jsonl (validation), test.jsonl (test)"
    assert said in lines
    assert said in prepare_data(tmp_path / "f", split)


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (("train.jsonl", "extra.jsonl"), "extra.jsonl"),
        (("a.jsonl", "b.jsonl", "c.csv"), "c.csv"),
        (("more.jsonl", "rows.JSONL"), "rows.JSONL"),
        (("train/a.jsonl", "b.jsonl", "c/d.json", "test/e.jsonl"), "b.jsonl, c/d.json"),
        (
            ("train.jsonl", *(f"{n:02d}.jsonl" for n in range(12))),
            ", ".join(f"{n:02d}.jsonl" for n in range(10)) + " and 2 more",
        ),
    ],
)
def test_a_folder_with_a_file_that_would_not_be_read_is_refused_naming_it(
    tmp_path: Path, names: tuple[str, ...], lost: str
) -> None:
    source = folder_of(tmp_path / "set", {})
    for name in names:
        write_jsonl(source / name, numbered(20, name))
    with pytest.raises(PrepareError) as caught:
        prepare_data(tmp_path / "f", Split(str(source), 2))
    assert f"data set {source}: {lost} would not be read" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "f").rglob("*.jsonl"))


def test_what_is_no_data_file_of_a_folder_is_no_matter(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "set", {"train": numbered(20), ".old/train": numbered(20, "o")})
    write_jsonl(source / ".train.jsonl", numbered(20, "hidden"))
    (source / "dataset_infos.json").write_text("{}")
    (source / "notes.txt").write_text("Not a row.")
    prepare_data(tmp_path / "f", Split(str(source), 2))
    train, holdout = held(tmp_path / "f", 2)
    assert sorted(train + holdout) == sorted(r["question"] for r in numbered(20))


def test_files_of_one_name_in_several_folders_are_all_read(tmp_path: Path) -> None:
    both = {f"{year}/train": numbered(20, f"of {year} ") for year in (2020, 2021)}
    source = folder_of(tmp_path / "set", both)
    lines = prepare_data(tmp_path / "f", Split(str(source), 2))
    assert lines[-1] == f"{source}: 40 rows, 40 of them used"


CONFIGS = """---
configs:
- config_name: english
  data_files: en.jsonl
- config_name: german
  data_files: de.jsonl
---
"""


@pytest.mark.parametrize(
    ("splits", "readme", "words"),
    [
        (("en", "de"), CONFIGS, "it has the configurations english, german; give the file of one"),
        (
            ("test", "validation"),
            "",
            "no split 'train', it has (test, validation|validation, test)",
        ),
        ((), "", "no files that can be read"),
    ],
)
def test_a_set_without_one_train_split_is_one_line_with_the_choices(
    tmp_path: Path, splits: tuple[str, ...], readme: str, words: str
) -> None:
    source = folder_of(tmp_path / "set", dict.fromkeys(splits, numbered(20)), readme)
    with pytest.raises(PrepareError, match=words) as caught:
        prepare_data(tmp_path / "f", Split(str(source), 2))
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)  # where the files are
    assert not list((tmp_path / "f").rglob("*.jsonl"))


@pytest.mark.parametrize("whole", [False, True])
def test_no_copy_of_a_source_is_left_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = folder_of(tmp_path / "set", {"train": numbered(30, "only-here-")})
    source = folder if whole else folder / "train.jsonl"
    prepare_data(tmp_path / "f", Split(str(source), 2), tmp_path / "cache")
    caches = [tmp_path, Path(os.environ["HF_DATASETS_CACHE"])]
    found = {
        p.parent
        for place in caches
        for p in place.rglob("*")
        if p.is_file() and b"only-here-" in p.read_bytes()
    }
    assert found == {folder, *(tmp_path / "f" / f"site-0{n}" / "data" for n in (0, 1))}


def test_what_is_left_out_is_said_and_above_a_tenth_it_is_a_warning(tmp_path: Path) -> None:
    def said(empty: int, again: int) -> str:
        rows = numbered(50) + numbered(again) + [{"question": "Why?", "answer": None}] * empty
        source = str(write_jsonl(tmp_path / "s.jsonl", rows))
        lines = prepare_data(tmp_path / "f", Split(source, 2))
        assert prepare_data(tmp_path / "f", Split(source, 2)) == lines
        return lines[-1].replace(source, "s")

    assert said(0, 0) == "s: 50 rows, 50 of them used"
    assert said(1, 0) == "s: 51 rows, 50 of them used, 1 without a question or an answer"
    assert said(2, 3) == (
        "s: 55 rows, 50 of them used, 2 without a question or an answer, 3 that ask a question "
        "again"
    )
    assert said(6, 0).startswith("WARNING: s: 56 rows, 50 of them used, 6 without")


QUESTIONS = st.lists(st.sampled_from([f"{n}?" for n in range(12)]), min_size=6, max_size=30)


@pytest.mark.parametrize("partitioner", ["iid", "dirichlet", "files"])
def test_no_held_out_question_is_trained_on_anywhere(tmp_path: Path, partitioner: str) -> None:
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    @given(QUESTIONS, QUESTIONS, st.integers(0, 9))
    def check(first: list[str], second: list[str], seed: int) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            folder = Path(name)
            both = [
                [
                    {
                        "instruction": f" {q}",
                        "input": "N/A",
                        "output": str(n),
                        "class": "ab"[int(q[:-1]) % 2],
                    }
                    for n, q in enumerate(part)
                ]
                for part in (first, second)
            ]
            source = folder / "source"
            if partitioner == "files":
                for n, rows in enumerate(both):
                    write_jsonl(source / f"site-{n:02d}.jsonl", rows)
            else:
                source = write_jsonl(folder / "s.jsonl", both[0] + both[1])
            split = Split(
                str(source), 2, partitioner, "class", alpha=1000.0, seed=seed, holdout_fraction=0.4
            )
            different = {*first, *second}
            if partitioner != "files" and len(different) < 8:
                return  # too few for two sites
            prepare_data(folder / "f", split)
            train, holdout = held(folder / "f", 2)
            assert not set(train) & set(holdout)
            assert set(train) | set(holdout) == different

    check()


def test_the_demos_partitions_are_what_they_have_been(tmp_path: Path) -> None:
    """Its losses, and those of the reference recipe, hang on these rows in this order."""
    assert VERSION == 3
    prepare_data(tmp_path, Split(str(BUNDLED), 4))
    rows = [
        [r.question, r.answer]
        for n in range(4)
        for part in ("train", "holdout")
        for r in partition.load(tmp_path / f"site-{n:02d}", part)
    ]
    assert len(rows) == 440
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:6] == "423787"
