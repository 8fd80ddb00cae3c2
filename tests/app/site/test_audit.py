"""The site's record: every line whole and on the disk, or not there at all."""

import json
import math
import multiprocessing
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.site import audit
from tests.full_disk import full_disk
from tests.killed import kills
from tests.samples import REPOSITORY

NOON = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)


def line(**facts: Any) -> dict[str, Any]:
    return audit.entry(7, "a" * 64, "train") | facts


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "audit.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(x) for x in text.splitlines()]


def test_lines_stand_behind_each_other_with_all_fields(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for n in (1, 2):
        audit.append(state, line(round=n))
    first, second = lines(state)
    assert (first["round"], second["round"]) == (1, 2)
    assert list(first) == list(second) == list(audit.entry(7, "a" * 64, "train"))
    assert first["time"] <= second["time"]
    assert first["schema"] == 1
    assert (state / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_the_page_for_hospitals_has_every_field_and_lines_that_have_them() -> None:
    page = (REPOSITORY / "docs" / "hospital.md").read_text(encoding="utf-8")
    table = page[page.index("| field | what it is |") :]
    told = [
        n for row in re.findall(r"^\| (`.*?) \|", table, re.M) for n in re.findall(r"`(\w+)`", row)
    ]
    assert told == list(line())
    shown = [json.loads(x) for x in page.splitlines() if x.startswith('{"schema"')]
    assert len(shown) == 10
    assert all(list(x) == told for x in shown)


def test_a_reason_is_one_short_line(tmp_path: Path) -> None:
    audit.append(tmp_path, line(reason="a\nb\x1b[2J" + "c" * 2000))
    (only,) = lines(tmp_path)
    assert only["reason"].startswith("a b [2Jcc")
    assert len(only["reason"]) == audit.TEXT


def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path: Path) -> None:
    audit.append(tmp_path, line(round=1))
    whole = (tmp_path / "audit.jsonl").read_bytes()
    for room in (0, 1, 100, len(whole) - 1):
        with full_disk(len(whole) + room), pytest.raises(OSError, match="File too large"):
            audit.append(tmp_path, line(round=2))
        assert (tmp_path / "audit.jsonl").read_bytes() == whole
    audit.append(tmp_path, line(round=3))
    assert [x["round"] for x in lines(tmp_path)] == [1, 3]


def test_what_a_power_cut_left_of_a_line_goes_with_the_next(tmp_path: Path) -> None:
    audit.append(tmp_path, line(round=1))
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"schema":1,"ti')
    assert [x["round"] for x in audit.since(tmp_path, NOON - timedelta(days=9999))] == [1]
    audit.append(tmp_path, line(round=2))
    assert [x["round"] for x in lines(tmp_path)] == [1, 2]
    (tmp_path / "audit.jsonl").write_bytes(b"no end")
    audit.append(tmp_path, line(round=3))
    assert [x["round"] for x in lines(tmp_path)] == [3]


def test_a_file_of_the_size_allowed_is_kept_and_a_new_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MOST_BYTES", 1000)
    for n in range(12):
        audit.append(tmp_path, line(round=n))
    kept = sorted(tmp_path.glob("*.jsonl"))
    assert len(kept) > 3
    assert all(p.stat().st_size <= 1000 for p in kept)
    text = b"".join(p.read_bytes() for p in kept)  # in the order of their names
    assert [json.loads(x)["round"] for x in text.splitlines()] == list(range(12))
    found = audit.since(tmp_path, NOON - timedelta(days=9999))
    assert [x["round"] for x in found] == list(reversed(range(12)))


def test_since_goes_back_no_further_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MOST_BYTES", 1000)
    for hours in (30, 20, 13, 12, 11, 1):
        audit.append(tmp_path, line(time=(NOON - timedelta(hours=hours)).isoformat(), round=hours))
    for hours, path in zip((30, 20, 13), sorted(tmp_path.glob("audit-*")), strict=False):
        path.rename(tmp_path / f"audit-{NOON - timedelta(hours=hours):%Y%m%dT%H%M%S.%fZ}.jsonl")
    first = min(tmp_path.glob("audit-*"))
    first.write_bytes(b"damaged\n" + first.read_bytes())  # before the day: nobody reads it
    found = audit.since(tmp_path, NOON - timedelta(hours=12))
    assert [x["round"] for x in found] == [1, 11, 12]
    assert audit.since(tmp_path / "nowhere", NOON) == []


def test_a_clock_that_was_set_back_hides_no_line_of_the_day(tmp_path: Path) -> None:
    for hours in (-1, 13, 0):  # from NOON; the second one is of the evening before
        audit.append(tmp_path, line(time=(NOON - timedelta(hours=hours)).isoformat(), round=hours))
    (tmp_path / audit.FILE).rename(tmp_path / "audit-20261130T000000.000000Z.jsonl")
    audit.append(tmp_path, line(time=(NOON + timedelta(hours=2)).isoformat(), round=2))
    found = audit.since(tmp_path, NOON - timedelta(hours=12))
    assert [x["round"] for x in found] == [2, 0, -1]


def test_what_json_has_no_number_for_is_null_and_still_a_line(tmp_path: Path) -> None:
    for number in (math.nan, math.inf, -math.inf, 1.5):
        audit.append(tmp_path, line(change_norm=number))
    assert [x["change_norm"] for x in lines(tmp_path)] == [None, None, None, 1.5]


@pytest.mark.parametrize("damage", [b"damaged\n", b"[]\n", b"{}\n", b'{"time":"soon"}\n'])
def test_a_line_that_is_none_is_named_by_its_number(tmp_path: Path, damage: bytes) -> None:
    audit.append(tmp_path, line())
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(audit.AuditError, match=r"/audit\.jsonl, line 2 is no record; move that"):
        audit.since(tmp_path, NOON - timedelta(days=9999))


def _many(folder: Path, who: int) -> None:
    audit.MOST_BYTES = 4000  # in a process of its own
    for n in range(50):
        audit.append(folder, line(round=n, rows=who))


def test_two_processes_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=_many, args=(tmp_path, who)) for who in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    found = audit.since(tmp_path, NOON - timedelta(days=9999))
    for who in (1, 2):
        assert [x["round"] for x in found if x["rows"] == who] == list(reversed(range(50)))


@pytest.mark.parametrize("most_bytes", [10_000, 500])  # the second one begins a new file
def test_one_that_is_killed_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(audit, "MOST_BYTES", most_bytes)
    audit.append(tmp_path, line(round=0))
    seen = 0
    for folder in kills(lambda folder: audit.append(folder, line(round=1)), tmp_path):
        seen += 1
        found = audit.since(folder, NOON - timedelta(days=9999))
        assert [x["round"] for x in found] in ([0], [1, 0])
        audit.append(folder, line(round=2))
        assert lines(folder)[-1]["round"] == 2
    assert seen >= 2
