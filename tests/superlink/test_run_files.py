"""What a ServerApp has written: read without following it anywhere."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from superlink.run_files import MOST_BYTES, facts, lines


def written(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"status": "completed"}')
    (folder / "metrics.jsonl").write_text('{"round": 1}\n[]\n{"round": "1"}\n{"rou')


def test_what_can_be_read_is_and_the_rest_is_left_out(tmp_path: Path) -> None:
    written(tmp_path / "results" / "7")
    assert facts(tmp_path / "results", "7") == {"status": "completed"}
    assert lines(tmp_path / "results", "7") == [{"round": 1}]


@pytest.mark.parametrize("name", ["7", "7/run.json", "7/metrics.jsonl"])
def test_no_link_below_the_results_is_followed(tmp_path: Path, name: str) -> None:
    written(tmp_path / "elsewhere" / "7")
    written(tmp_path / "results" / "7")
    link = tmp_path / "results" / name
    link.rename(tmp_path / "away")
    link.symlink_to(tmp_path / "elsewhere" / name)
    found = {
        "run.json": facts(tmp_path / "results", "7"),
        "lines": lines(tmp_path / "results", "7"),
    }
    gone = {"7": 2, "7/run.json": 1, "7/metrics.jsonl": 1}
    assert sum(not value for value in found.values()) == gone[name]


def test_the_results_themselves_may_be_a_link(tmp_path: Path) -> None:
    written(tmp_path / "disk" / "7")
    (tmp_path / "results").symlink_to(tmp_path / "disk")
    assert facts(tmp_path / "results", "7") == {"status": "completed"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_or_too_large_is_as_if_it_were_not_there(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    (tmp_path / "7").mkdir()
    make(tmp_path / "7" / "run.json")
    (tmp_path / "7" / "metrics.jsonl").write_text(json.dumps({"round": 1}) + "\n")
    os.truncate(tmp_path / "7" / "metrics.jsonl", MOST_BYTES + 1)
    assert facts(tmp_path, "7") == {}
    assert lines(tmp_path, "7") == []
