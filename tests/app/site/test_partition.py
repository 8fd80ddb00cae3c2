"""A site's rows: what is read, what is left out, and that no message carries a row's text."""

import csv
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.site.partition import Row, SiteError, load, part_of
from tests.samples import ROWS, write_jsonl

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
MARKER = "Mrs Lindqvist was told on Tuesday"  # stands for a patient's text
GOOD = {"instruction": "Answer", "input": "Why?", "output": "Because."}


def write(site: Path, rows: list[Any], suffix: str = ".jsonl", part: str = "train") -> Path:
    path = site / "data" / f"{part}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".jsonl":
        write_jsonl(path, rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("instruction", "input", "output"))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def error_of(site: Path, part: str = "train") -> str:
    with pytest.raises(SiteError) as caught:
        load(site, part)
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", ["train", "holdout"])
def test_the_same_rows_come_out_of_each_format(tmp_path: Path, suffix: str, part: str) -> None:
    write(tmp_path, list(ROWS), suffix, part)
    assert load(tmp_path, part) == [Row(r["input"], r["output"]) for r in ROWS]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.text('ab é\u2028\u2029\x85\x0b\x0c\r\n"\\\t漢😀', max_size=12), st.text()),
        min_size=1,
        max_size=6,
        unique=True,
    ),
    st.sampled_from(SUFFIXES),
)
def test_any_text_survives_line_separators_included(
    pairs: list[tuple[str, str]], suffix: str
) -> None:
    texts = [(f"Q{q}?", f"A{a}.") for q, a in pairs]
    rows = [{"instruction": "", "input": q, "output": a} for q, a in texts]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rows, suffix)
        assert load(Path(folder), "train") == [Row(q, a) for q, a in texts]


def test_a_line_separator_within_a_text_does_not_shift_the_line_numbers(tmp_path: Path) -> None:
    strange = GOOD | {"output": "one\u2028two\x85three"}
    write(tmp_path, [strange, strange, {"input": [MARKER], "output": ""}])
    assert "line 3" in error_of(tmp_path)


def test_windows_line_ends_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    text = "".join(json.dumps(r) + "\r\n\r\n" for r in ROWS)
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(text.encode())
    assert len(load(tmp_path, "train")) == len(ROWS)


def test_the_instruction_is_the_question_where_there_is_no_input(tmp_path: Path) -> None:
    write(tmp_path, [{"instruction": "What causes scurvy?", "input": " ", "output": "Hunger."}])
    assert load(tmp_path, "train") == [Row("What causes scurvy?", "Hunger.")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_repeats_and_rows_without_question_or_answer_are_left_out(
    tmp_path: Path, suffix: str
) -> None:
    no_answer = GOOD | {"output": " \n"}
    no_question = {"instruction": "", "input": "", "output": "Because."}
    spaced = GOOD | {"input": " Why? "}
    other = GOOD | {"input": ROWS[0]["input"]}
    write(tmp_path, [GOOD, no_answer, spaced, no_question, other, GOOD], suffix)
    found = part_of(tmp_path, "train")
    assert found.rows == [Row("Why?", "Because."), Row(ROWS[0]["input"], "Because.")]
    assert found.counts() == {"read": 6, "empty": 2, "repeated": 2, "known": 0}


@pytest.fixture
def site_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("app").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("app").removeHandler(caplog.handler)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_site_trains_on_is_not_scored_as_held_out(
    tmp_path: Path, suffix: str, site_log: pytest.LogCaptureFixture
) -> None:
    told = [r | {"output": f"{MARKER} {n}"} for n, r in enumerate(ROWS[:8])]
    write(tmp_path, told, suffix)
    spaced = [r | {"input": f" {r['input']} "} for r in ROWS[5:10]]  # with other answers
    write(tmp_path, spaced, ".jsonl", "holdout")
    assert load(tmp_path, "holdout") == [Row(r["input"], r["output"]) for r in ROWS[8:10]]
    assert part_of(tmp_path, "holdout").known == 3
    assert len(load(tmp_path, "train")) == 8
    warned = [r for r in site_log.records if r.levelno >= logging.WARNING]
    assert {r.getMessage() for r in warned} == {
        f"data/holdout.jsonl: 3 of 5 rows ask what data/train{suffix} asks too; they are not "
        "scored as held-out",
    }
    write(tmp_path, spaced[:2], ".jsonl", "holdout")
    assert load(tmp_path, "holdout") == []


@pytest.mark.parametrize(
    "rows", [[], [GOOD | {"output": ""}], [GOOD | {"input": "", "instruction": ""}]]
)
def test_a_training_file_without_a_usable_row_is_an_error_but_a_holdout_is_not(
    tmp_path: Path, rows: list[dict[str, str]]
) -> None:
    write(tmp_path, rows)
    write(tmp_path, rows, part="holdout")
    assert "train.jsonl" in error_of(tmp_path)
    assert load(tmp_path, "holdout") == []


def test_without_a_file_training_fails_and_evaluation_is_left_out(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train.json", "train.parquet"):
        assert name in error_of(tmp_path)
    assert load(tmp_path, "holdout") == []


@pytest.mark.parametrize("part", ["train", "holdout"])
def test_a_file_whose_name_is_nearly_right_is_named_in_the_sites_log(
    tmp_path: Path, part: str, site_log: pytest.LogCaptureFixture
) -> None:
    if part == "holdout":
        write(tmp_path, [GOOD])
    write(tmp_path, [GOOD], part=part).rename(tmp_path / "data" / f"{part}.jsonl.txt")
    (tmp_path / "data" / f"{part.title()}.xlsx").touch()
    (tmp_path / "data" / f"{part}ing.csv").touch()
    if part == "train":
        assert f"{part}.jsonl.txt" not in error_of(tmp_path)  # it goes to the server
    else:
        assert load(tmp_path, part) == []
    assert site_log.records[-1].getMessage() == (
        f"data/: {part.title()}.xlsx and {part}.jsonl.txt not read; the name is {part}.jsonl, "
        ".json, .csv or .parquet, in small letters"
    )
    site_log.clear()
    write(tmp_path, [*ROWS[:2]], part=part)
    assert load(tmp_path, part)
    assert not any("not read" in r.getMessage() for r in site_log.records)


@pytest.mark.parametrize("part", ["train", "holdout"])
def test_two_files_for_one_part_are_both_named(tmp_path: Path, part: str) -> None:
    write(tmp_path, [GOOD], ".json", part)
    write(tmp_path, [GOOD], ".parquet", part)
    message = error_of(tmp_path, part)
    assert f"{part}.json " in message
    assert f"{part}.parquet" in message


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line 3"), (".json", "row 3")])
@pytest.mark.parametrize(
    ("bad", "column"),
    [
        ({"instruction": MARKER, "input": MARKER, "output": {MARKER: 1}}, "column 'output'"),
        ({"instruction": MARKER, "input": [MARKER], "output": MARKER}, "column 'input'"),
        ([MARKER, MARKER, MARKER], "not an object of columns"),
        (MARKER, "not an object of columns"),
    ],
)
def test_a_bad_row_is_named_by_its_place_and_column_never_by_its_text(
    tmp_path: Path, bad: object, column: str, suffix: str, place: str
) -> None:
    write(tmp_path, [GOOD, GOOD, bad, GOOD], suffix)
    message = error_of(tmp_path)
    assert f"train{suffix}" in message
    assert place in message
    assert column in message
    assert MARKER not in message
    assert "Lindqvist" not in message


def test_a_parquet_file_without_a_column_is_named_by_the_column(tmp_path: Path) -> None:
    write(tmp_path, [{"instruction": MARKER, "input": MARKER}], ".parquet")
    message = error_of(tmp_path)
    assert "train.parquet: no column 'output'" in message
    assert MARKER not in message


@pytest.mark.parametrize(
    "line",
    [
        '{"input": "' + MARKER,
        f"{MARKER}",
        f'{{"input": "{MARKER}"}} {{}}',
        f'["{MARKER}", ' + "[" * 100_000,
    ],
    ids=["cut", "plain text", "two values", "nested too deep"],
)
def test_a_line_that_is_not_json_is_named_by_its_number_never_by_its_text(
    tmp_path: Path, line: str
) -> None:
    path = write(tmp_path, [GOOD, GOOD])
    path.write_text(path.read_text() + line + "\n" + json.dumps(GOOD) + "\n")
    message = error_of(tmp_path)
    assert "train.jsonl, line 3" in message
    assert "Lindqvist" not in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f'[\n{{"instruction": "",\n"input": "{MARKER}" "output": ""}}\n]', ", line 3"),
        (f'["{MARKER}", ' + "[" * 100_000, ""),
    ],
    ids=["breaks off", "nested too deep"],
)
def test_a_json_file_that_is_none_is_named_and_where_json_tells_by_the_line(
    tmp_path: Path, text: str, place: str
) -> None:
    path = tmp_path / "data" / "train.json"
    path.parent.mkdir()
    path.write_text(text)
    message = error_of(tmp_path)
    assert f"train.json{place}: not valid JSON" in message
    assert MARKER not in message


@pytest.mark.parametrize(("suffix", "place"), [(".jsonl", "line 2"), (".json", "row 2")])
@pytest.mark.parametrize("column", ["instruction", "input", "output"])
def test_half_a_character_that_no_tokenizer_takes_is_found_before_training(
    tmp_path: Path, suffix: str, place: str, column: str
) -> None:
    bad = GOOD | {"input": "" if column == "instruction" else "Why?"} | {column: f"{MARKER} ?"}
    path = write(tmp_path, [GOOD, bad], suffix)
    path.write_text(path.read_text().replace(f"{MARKER} ?", f"{MARKER} \\ud83d"))
    message = error_of(tmp_path)
    assert f"train{suffix}, {place}: " in message
    assert "\\ud800" in message
    assert "Lindqvist" not in message


@pytest.mark.parametrize("value", [{"rows": [GOOD]}, {MARKER: [GOOD]}, MARKER, 3, None])
def test_a_json_file_must_be_an_array(tmp_path: Path, value: object) -> None:
    path = tmp_path / "data" / "train.json"
    path.parent.mkdir()
    path.write_text(json.dumps(value))
    message = error_of(tmp_path)
    assert "array" in message
    assert MARKER not in message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_other_bytes_is_a_site_error_without_its_text(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / "data" / f"train{suffix}"
    path.parent.mkdir()
    path.write_bytes(f'{{"input": "{MARKER}: Fieber, Übelkeit"}}\n'.encode("latin-1"))
    message = error_of(tmp_path)
    assert f"train{suffix}" in message
    assert "Lindqvist" not in message
    assert "belkeit" not in message
    if suffix != ".parquet":
        assert "UTF-8" in message


@contextmanager
def _without_privileges() -> Iterator[None]:
    """File modes mean nothing to root; act as nobody for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_may_not_be_read_is_named(suffix: str) -> None:
    # Containers run as a user of their own, and the hospital's file belongs to somebody else.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        write(Path(folder), [GOOD], suffix).chmod(0o000)
        with _without_privileges():
            assert f"train{suffix}" in error_of(Path(folder))


def test_it_is_said_that_the_instruction_of_all_rows_is_left_out(
    tmp_path: Path, site_log: pytest.LogCaptureFixture
) -> None:
    site_log.set_level(logging.INFO, logger="app")
    write(tmp_path, list(ROWS[:3]), ".jsonl")
    load(tmp_path, "train")
    (said,) = {r.getMessage() for r in site_log.records}
    assert said == "data/train.jsonl: the instruction of all rows is no part of the questions"
    site_log.clear()
    write(tmp_path, [r | {"instruction": ""} for r in ROWS[:3]], ".jsonl")  # as prepare writes
    load(tmp_path, "train")
    assert not site_log.records
