"""Where a run stands, from what its files say."""

from datetime import timedelta
from pathlib import Path

import pytest

from superlink.page.runs import Run, read_run
from superlink.page.state import SILENT_AFTER_S, state_of
from tests.superlink.page.made_runs import (
    BEGAN,
    NEWEST,
    OTHER,
    events,
    facts,
    line,
    two_runs,
    write,
)


def test_a_run_at_work_is_told_as_its_last_events_have_it(tmp_path: Path) -> None:
    run = read_run(two_runs(tmp_path), NEWEST)
    state = state_of(run, BEGAN + timedelta(seconds=400))
    assert (state.status, state.done, state.total) == ("running", 2, 10)
    assert state.phase == "round 3 of 10: training at 3 sites"
    assert state.ready_in == BEGAN + timedelta(seconds=300 + 2400)
    assert {name: site.state for name, site in state.sites.items()} == {
        "site-00": "ready",
        "site-01": "answered",
        "site-02": "training",
        "site-03": "late",
        "site-04": "left out",
    }
    assert (state.sites["site-03"].share, state.sites["site-03"].alpha) == (0.75, 0.9934)
    assert state.sites["site-01"].rounds == 2
    assert state.sites["site-04"].why == "no answer"


@pytest.mark.parametrize(
    ("last", "phase"),
    [
        (1, "starting"),
        (2, "3 of 20 sites are online"),
        (3, "all sites have answered"),
        (5, "round 2 of 10 is complete"),
    ],
)
def test_each_phase_has_its_words(last: int, phase: str) -> None:
    run = Run("1", facts("1", sites={}, left_out={}), [], events()[:last])
    assert state_of(run, BEGAN).phase == phase


def test_a_run_that_says_it_runs_and_has_long_said_nothing_is_silent() -> None:
    run = Run("1", facts("1"), [], events())
    patience_s = run.config["strategy.round-timeout-s"] + SILENT_AFTER_S
    heard = BEGAN + timedelta(seconds=360)
    assert state_of(run, heard + timedelta(seconds=patience_s - 1)).status == "running"
    silent = state_of(run, heard + timedelta(seconds=patience_s + 1))
    assert silent.status == "silent"
    assert silent.phase.endswith(", and nothing since")


def test_a_run_that_is_over_has_nobody_at_work_and_no_time_left(tmp_path: Path) -> None:
    over = facts(
        "1", status="failed", error="round 3: 0 usable replies", finished=events()[-1]["time"]
    )
    state = state_of(Run("1", over, [line(1), line(2)], events()))
    assert (state.status, state.phase) == ("failed", "ended after round 2")
    assert state.ready_in is None
    assert {s.state for s in state.sites.values()} == {"took part", "not asked", "left out"}


def test_a_run_of_before_there_were_events_is_shown_by_its_other_files(tmp_path: Path) -> None:
    state = state_of(read_run(two_runs(tmp_path), OTHER))
    assert (state.status, state.done, state.phase) == ("completed", 10, "all rounds are complete")
    assert state.sites["site-01"].rounds == 10


def test_a_last_line_that_is_on_its_way_is_read_when_it_has_come(tmp_path: Path) -> None:
    folder = write(tmp_path / "5", facts("5"), [line(1)], events()[:3])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "train_lo')
    assert state_of(read_run(tmp_path, "5")).done == 1
    assert read_run(tmp_path, "5").unread == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.0}\n')
    assert state_of(read_run(tmp_path, "5")).done == 2
