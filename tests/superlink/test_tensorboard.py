"""A run's curves for TensorBoard, read back by its own reader."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from tests.samples import REPOSITORY
from tests.superlink.page.made_runs import BEGAN, NEWEST, events, facts, line, two_runs, write


def written(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "superlink.tensorboard", str(folder)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, round(float(make_ndarray(e.tensor_proto)), 4)) for e in read.Tensors(tag)]
        for tag in read.Tags()["tensors"]
    }


def test_its_own_reader_finds_each_curve_of_a_run_once(tmp_path: Path) -> None:
    run = two_runs(tmp_path) / NEWEST
    lines = [line(n) | {"train_site_losses": [3.0 / n, 4.0 / n]} for n in (1, 2)]
    write(run, facts(NEWEST), lines, events())
    for _ in range(2):  # the second time in the place of the first
        done = written(run)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{run}/tensorboard\n"
    assert curves(run / "tensorboard") == {
        "loss/training": [(1, 3.7), (2, 1.85)],
        "loss/held out": [(0, 3.75), (1, 3.6), (2, 1.8)],
        "MiB sent": [(0, 0.0), (1, 208.0), (2, 416.0)],
        "loss of site/site-01": [(1, 3.0), (2, 1.5)],
        "loss of site/site-03": [(1, 4.0), (2, 2.0)],
        "weight/site-01": [(1, 0.25), (2, 0.25)],
        "weight/site-03": [(1, 0.75), (2, 0.75)],
        "alpha/site-01": [(1, 1.0661), (2, 1.0661)],
        "alpha/site-03": [(1, 0.9934), (2, 0.9934)],
    }
    last = EventAccumulator(str(run / "tensorboard")).Reload().Tensors("loss/training")[-1]
    assert last.wall_time == BEGAN.timestamp() + 300  # when that round was complete


def test_a_line_that_is_none_is_told_and_the_others_are_there(tmp_path: Path) -> None:
    rounds = json.dumps(line(1)) + "\nnone\n" + json.dumps(line(3) | {"alphas": ["x"]}) + "\n"
    done = written(write(tmp_path / "5", facts("5"), rounds))
    assert done.returncode == 0
    assert done.stderr == ("tensorboard: not readable, left out: metrics.jsonl: 1 of 3 lines\n")
    found = curves(tmp_path / "5" / "tensorboard")
    assert [step for step, _ in found["loss/training"]] == [1, 3]
    assert [step for step, _ in found["alpha/site-01"]] == [1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("7", "7 is no run's folder; give one, results/<run-id>"),
        ("peft_1", "peft_1 is no run's folder; give one, results/<run-id>"),
        ("5", "5/metrics.jsonl holds no round yet; try again later"),
        ("6", "6/tensorboard: Not a directory"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "peft_1").mkdir()
    write(tmp_path / "5", facts("5"))
    write(tmp_path / "6", facts("6"), [line(1)])
    (tmp_path / "6" / "tensorboard").write_text("mine")
    done = written(tmp_path / name)
    assert done.returncode == 1
    assert done.stderr == f"tensorboard: ERROR: {tmp_path}/{words}\n"
