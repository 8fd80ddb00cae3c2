"""report.html of each run that has ended, without anybody's asking."""

import json
import os
from pathlib import Path

import pytest

from superlink.page.reports import Reports
from tests.superlink.page.made_runs import NEWEST, OTHER, events, facts, line, two_runs, write


def page(results: Path, run_id: str) -> str:
    return (results / run_id / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_a_run_gets_its_page_when_it_has_ended_and_none_before(tmp_path: Path, status: str) -> None:
    folder = write(tmp_path / "5", facts("5"), [line(1)], events())
    reports = Reports(tmp_path)
    reports.write()
    assert not (folder / "report.html").exists()
    write(folder, facts("5", status=status, error="round 3: 0 usable replies"), [line(1)], events())
    reports.write()
    assert f">{status}</span>" in page(tmp_path, "5")
    assert "round 3: 0 usable replies" in page(tmp_path, "5")


def test_it_is_written_again_when_the_run_was_evaluated_and_not_otherwise(tmp_path: Path) -> None:
    two_runs(tmp_path)
    Reports(tmp_path).write()
    first = (tmp_path / OTHER / "report.html").stat().st_ino
    Reports(tmp_path).write()  # as after a restart
    assert (tmp_path / OTHER / "report.html").stat().st_ino == first
    report = tmp_path / OTHER / "eval" / "report.json"
    report.parent.mkdir()
    report.write_text("no JSON")
    Reports(tmp_path).write()
    assert "eval/report.json is no JSON object" in page(tmp_path, OTHER)
    assert not (tmp_path / NEWEST / "report.html").exists()


def test_a_run_that_was_cut_off_gets_it_when_another_goes_on_from_there(tmp_path: Path) -> None:
    write(tmp_path / "5", facts("5"), [line(1)], events())
    write(tmp_path / "6", facts("6", resumed_from=[{"run_id": "5", "last_round": 1}]))
    Reports(tmp_path).write()
    assert ">cut off</span>" in page(tmp_path, "5")
    assert not (tmp_path / "6" / "report.html").exists()


def test_one_that_cannot_be_written_is_said_once_and_the_others_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_id in ("5", "6", "7"):
        write(tmp_path / run_id, facts(run_id, status="completed"))
    (tmp_path / "6" / "report.html").mkdir()
    os.utime(tmp_path / "6" / "report.html", ns=(0, 0))
    reports = Reports(tmp_path)
    reports.write()
    reports.write()
    told = capsys.readouterr().out
    assert told == f"page: cannot write {tmp_path}/6/report.html: Is a directory\n"
    assert page(tmp_path, "5")
    assert page(tmp_path, "7")
    run = tmp_path / "6" / "run.json"
    run.write_text(json.dumps(facts("6", status="failed")))
    (tmp_path / "6" / "report.html").rmdir()
    reports.write()
    assert ">failed</span>" in page(tmp_path, "6")
