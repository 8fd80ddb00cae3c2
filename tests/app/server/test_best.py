"""Which round is the best, and what in a run's folder says so."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.server.best import best_round, name_best
from app.server.checkpoint import ResultsError, RunFolder
from tests.full_disk import full_disk
from tests.killed import kills

ALL = (0, 1, 2)


def line(number: int, loss: float | None = None, sites: Sequence[int] = ALL) -> dict[str, Any]:
    """Of metrics.jsonl; without a loss of a round that nobody measured."""
    held_out = {"eval_loss_median": loss, "eval_loss": 0.0, "eval_partitions": list(sites)}
    return {"round": number, "train_loss": 1.0, **(held_out if loss is not None else {})}


def number(lines: list[dict[str, Any]]) -> int | None:
    best = best_round(lines)
    return best["round"] if best else None


@given(st.lists(st.none() | st.floats(0, 10), max_size=8))
def test_it_is_the_first_of_the_lowest_held_out_loss(losses: list[float | None]) -> None:
    measured = [loss for loss in losses if loss is not None]
    wanted = losses.index(min(measured)) + 1 if measured else None
    assert number([line(n, loss) for n, loss in enumerate(losses, 1)]) == wanted


def test_it_says_how_low_and_at_how_many_sites() -> None:
    lines = [line(1, 3.5), line(2, 3.25), line(3, 3.75)]
    assert best_round(lines) == {"round": 2, "held_out_loss": 3.25, "sites": 3}


@pytest.mark.parametrize(
    ("of", "best"),
    [
        ([(3.0, ALL), (1.0, (0, 1)), (2.0, ALL)], 3),  # that site's rows may be the hard ones
        ([(1.0, ALL), (3.0, (0, 1)), (2.0, (0, 1))], 3),  # a site that is gone for good
        ([(1.0, (0, 1)), (2.0, ALL)], 2),
        ([(1.0, (0, 1)), (2.0, (0, 2))], 2),
    ],
)
def test_rounds_that_were_measured_at_other_sites_do_not_count(
    of: list[tuple[float, tuple[int, ...]]], best: int
) -> None:
    assert number([line(n, *measured) for n, measured in enumerate(of, 1)]) == best


def a_run(results: Path, *losses: float | None) -> RunFolder:
    folder = RunFolder(results, 7)
    for n, loss in enumerate(losses, 1):
        (folder.path / f"peft_{n}").mkdir()
        folder.add_metrics(line(n, loss))
        name_best(folder, {})
    return folder


def test_after_each_round_run_json_and_a_relative_link_name_it(tmp_path: Path) -> None:
    for losses, best in (((2.0,), 1), ((2.0, 1.0), 2), ((2.0, 1.0, 1.5), 2)):
        folder = a_run(tmp_path / str(len(losses)), *losses)
        facts = json.loads((folder.path / "run.json").read_text())
        assert facts["best"] == {"round": best, "held_out_loss": losses[best - 1], "sites": 3}
        moved = folder.path.rename(tmp_path / f"moved-{len(losses)}")
        assert (moved / "best").resolve() == moved / f"peft_{best}"
        assert str((moved / "best").readlink()) == f"peft_{best}"


def test_where_nobody_measures_nothing_is_called_the_best(tmp_path: Path) -> None:
    folder = a_run(tmp_path, None, None)
    assert not os.path.lexists(folder.path / "best")
    assert not (folder.path / "run.json").exists()


def test_killed_at_any_step_the_link_is_there_and_leads_to_a_round(tmp_path: Path) -> None:
    a_run(tmp_path, 2.0)

    def second(results: Path) -> None:
        folder = RunFolder(results, 7)
        (folder.path / "peft_2").mkdir(exist_ok=True)
        folder.write_metrics([line(1, 2.0)])
        folder.add_metrics(line(2, 1.0))
        name_best(folder, {})

    seen = {str((folder / "7" / "best").readlink()) for folder in kills(second, tmp_path)}
    assert seen == {"peft_1"}  # the new one takes its place in the last step
    second(tmp_path)
    assert str((tmp_path / "7" / "best").readlink()) == "peft_2"


def test_a_folder_of_that_name_is_kept(tmp_path: Path) -> None:
    mine = RunFolder(tmp_path, 7).path / "best"
    mine.mkdir()
    folder = a_run(tmp_path, 2.0)
    assert not mine.is_symlink()
    assert json.loads((folder.path / "run.json").read_text())["best"]["round"] == 1


def test_a_full_disk_is_a_results_error(tmp_path: Path) -> None:
    folder = a_run(tmp_path, 2.0)
    folder.lines.append(line(2, 1.0))
    with full_disk(0), pytest.raises(ResultsError, match=r"run\.json"):
        name_best(folder, {})
