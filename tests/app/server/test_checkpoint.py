"""The results folder: complete or invisible, whatever happens in between."""

import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from app.server import checkpoint
from app.server.checkpoint import ResultsError, RunFolder, newest, rounds, sha256
from app.wire.adapter import Layout, initial_adapter
from tests.full_disk import full_disk
from tests.killed import kills
from tests.samples import run_config

CONFIG = run_config(lora_r=4)
LAYOUT = Layout.of({f"layers.{i}.{n}_proj": [40, 50] for i in range(2) for n in "qv"}, CONFIG)
FILES = {"adapter_model.safetensors", "adapter_config.json", "round.json"}


def save(folder: RunFolder, server_round: int, seed: int = 1) -> Path:
    return folder.save_round(
        server_round, LAYOUT, initial_adapter(LAYOUT, seed), CONFIG, {"alphas": [1.0]}
    )


def link_of(results: Path) -> str:
    return str((results / "latest").readlink())


def test_a_saved_round_holds_the_adapter_and_a_manifest_that_proves_it(tmp_path: Path) -> None:
    path = save(RunFolder(tmp_path, 7), 3, seed=5)
    assert path == tmp_path / "7" / "peft_3"
    assert {p.name for p in path.iterdir()} == FILES
    arrays = load_file(path / "adapter_model.safetensors")
    assert LAYOUT.join(arrays).tobytes() == initial_adapter(LAYOUT, 5).tobytes()
    manifest = json.loads((path / "round.json").read_text())
    weights = (path / "adapter_model.safetensors").read_bytes()
    assert manifest["sha256"] == hashlib.sha256(weights).hexdigest()
    assert (manifest["round"], manifest["layout"], manifest["alphas"]) == (3, LAYOUT.hash, [1.0])


def test_the_rounds_are_listed_by_number_not_by_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    for number in (10, 2, 1, 9):
        save(folder, number)
    assert list(rounds(folder.path)) == [1, 2, 9, 10]
    assert rounds(folder.path)[10] == folder.path / "peft_10"


def test_a_half_written_round_is_invisible(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    complete = save(folder, 1)
    for name in (".peft_2.part", "peft_3"):
        shutil.copytree(complete, folder.path / name)
    (folder.path / "peft_3" / "round.json").unlink()
    assert list(rounds(folder.path)) == [1]
    save(folder, 2)  # what was left behind is in nobody's way
    save(folder, 3)
    assert list(rounds(folder.path)) == [1, 2, 3]
    assert not list(folder.path.glob(".peft*"))


def test_a_copy_that_somebody_put_beside_the_rounds_disturbs_nobody(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    shutil.copytree(save(folder, 1), folder.path / "peft_1.bak")
    shutil.copytree(folder.path / "peft_1", folder.path / "peft_best")
    assert list(rounds(folder.path)) == [1]


def test_saving_a_round_again_replaces_it_as_a_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    stale = save(folder, 1, seed=1) / "stale.txt"
    stale.touch()
    path = save(folder, 1, seed=2)
    assert {p.name for p in path.iterdir()} == FILES
    arrays = load_file(path / "adapter_model.safetensors")
    assert LAYOUT.join(arrays).tobytes() == initial_adapter(LAYOUT, 2).tobytes()


def test_killed_at_any_step_only_whole_checkpoints_are_listed(tmp_path: Path) -> None:
    """Also of a round that is saved again."""
    for number in (1, 2):
        save(RunFolder(tmp_path, 7), number)
    for results in kills(lambda results: save(RunFolder(results, 7), 2, seed=2), tmp_path):
        assert 1 in rounds(results / "7")
        for path in rounds(results / "7").values():
            assert {p.name for p in path.iterdir()} == FILES
            assert json.loads((path / "round.json").read_text())["sha256"] == sha256(path)
        assert link_of(results) == "7"


@pytest.mark.parametrize("room", [0, 4096])
def test_a_full_disk_is_a_results_error_and_the_last_round_stays(tmp_path: Path, room: int) -> None:
    folder = RunFolder(tmp_path, 7)
    save(folder, 1)
    with full_disk(room), pytest.raises(ResultsError, match="round 2"):
        save(folder, 2)
    assert list(rounds(folder.path)) == [1]
    assert not list(folder.path.glob(".peft*")), "the half-written round takes room"
    assert link_of(tmp_path) == "7"


def test_a_full_disk_is_noticed_at_the_start_of_a_run(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(ResultsError, match=str(tmp_path / "7")):
        RunFolder(tmp_path, 7)


def test_results_that_cannot_be_written_are_a_results_error(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(ResultsError, match="RESULTS_DIR") as caught:
        RunFolder(in_the_way / "results", 7)
    assert str(in_the_way / "results" / "7") in str(caught.value)


def test_a_results_folder_that_vanishes_is_a_results_error_naming_the_round(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "results", 7)
    shutil.rmtree(tmp_path / "results")
    with pytest.raises(ResultsError, match="round 4"):
        save(folder, 4)


def test_a_run_whose_checkpoints_do_not_fit_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    free = shutil.disk_usage(tmp_path).free
    folder.reserve(3, free // 1000)
    with pytest.raises(ResultsError, match="RESULTS_DIR"):
        folder.reserve(3, free)


def test_latest_is_a_relative_link_to_the_newest_run_with_a_round(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "results", 7)
    assert not (tmp_path / "results" / "latest").is_symlink()
    save(first, 1)
    second = RunFolder(tmp_path / "results", 12)
    assert link_of(tmp_path / "results") == "7"  # 12 has nothing to show yet
    save(second, 1)
    assert link_of(tmp_path / "results") == "12"
    moved = (tmp_path / "results").rename(tmp_path / "elsewhere")
    assert (moved / "latest" / "peft_1" / "round.json").is_file()
    assert {p.name for p in moved.iterdir()} == {"7", "12", "latest"}


def test_latest_is_there_at_every_moment(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path, 1), RunFolder(tmp_path, 2)]
    save(folders[0], 1)
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            try:
                seen.add(link_of(tmp_path))
            except OSError:
                seen.add("nothing")

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(25):
        save(folders[number % 2], 1)
    done.set()
    watcher.join()
    assert seen
    assert seen <= {"1", "2"}


def test_metrics_grow_by_a_line_and_run_json_is_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    for number in (1, 2):
        folder.write_run({"status": "x" * 100 if number == 1 else "y"})
        folder.add_metrics({"round": number, "loss": np.float64(1.5)})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    assert json.loads((folder.path / "run.json").read_text()) == {"status": "y"}
    assert {p.name for p in folder.path.iterdir()} == {"eval", "metrics.jsonl", "run.json"}


def test_the_group_may_write_to_the_eval_folder_and_nowhere_else(tmp_path: Path) -> None:
    """The evaluation container runs as another user of the ServerApp's group."""
    run = RunFolder(tmp_path, 7).path
    assert (run / "eval").stat().st_mode & 0o7777 == 0o2775
    assert run.stat().st_mode & 0o022 == 0


# --- File systems that lack something -------------------------------------------------------------


def lacking(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """From now on this call fails, as on FUSE, CIFS or FAT; others are the system's own."""
    sync, replace, opened = os.fsync, Path.replace, Path.open

    def refuse(path: object) -> OSError:
        return OSError(number, os.strerror(number), str(path))

    def no_link(self: Path, *_: Any, **__: Any) -> None:
        raise refuse(self)

    def files_are_synced(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise refuse(handle)
        sync(handle)

    def files_are_renamed(self: Path, target: Path) -> Path:
        if self.is_dir() and not self.is_symlink():
            raise refuse(self)
        return replace(self, target)

    def nothing_is_synced(handle: int) -> None:
        raise refuse(handle)

    def only_new_names(self: Path, target: Path) -> Path:
        if target.exists() and not target.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        return replace(self, target)

    def nothing_is_added(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            raise refuse(self)
        return opened(self, mode, *args, **kwargs)

    others = {
        "sync": (os, "fsync", nothing_is_synced),
        "modes": (Path, "chmod", no_link),
        "rename to a name that is there": (Path, "replace", only_new_names),
        "adding to a file": (Path, "open", nothing_is_added),
    }
    if what in others:
        monkeypatch.setattr(*others[what])
    elif what == "links":
        monkeypatch.setattr(Path, "symlink_to", no_link)
    elif what == "sync of folders":
        monkeypatch.setattr(os, "fsync", files_are_synced)
    else:
        monkeypatch.setattr(Path, "replace", files_are_renamed)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize(
    "what",
    ["links", "sync of folders", "rename of folders", "sync", "modes",
     "rename to a name that is there"],
)  # fmt: skip
def test_rounds_are_saved_whole_also_where_the_file_system_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    told: list[str] = []
    monkeypatch.setattr(checkpoint.logger, "warning", lambda text, *_: told.append(text))
    lacking(monkeypatch, what, number)
    for run in (1, 2):
        folder = RunFolder(tmp_path, run)
        for server_round in (1, 2, 2):
            path = save(folder, server_round, seed=run)
        assert {p.name for p in path.iterdir()} == FILES
        assert sha256(path) == json.loads((path / "round.json").read_text())["sha256"]
        assert list(rounds(folder.path)) == [1, 2]
        assert newest(tmp_path) == folder.path
        for status in ("running", "completed"):
            folder.write_run({"status": status})
        assert json.loads((folder.path / "run.json").read_text())["status"] == "completed"
        (folder.path / "run.json").unlink()
        assert {p.name for p in folder.path.iterdir()} == {"peft_1", "peft_2", "eval"}
    assert {p.name for p in tmp_path.iterdir()} - {"latest"} == {"1", "2"}
    assert len(told) == (2 if what == "links" else 0)  # once a run


@pytest.mark.parametrize("what", ["links", "sync of folders", "rename of folders"])
def test_a_disk_that_fails_is_no_file_system_that_lacks_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    folder = RunFolder(tmp_path, 1)
    lacking(monkeypatch, what, errno.EIO)
    with pytest.raises(ResultsError, match="Input/output error"):
        save(folder, 1)


def test_what_no_round_could_do_without_is_noticed_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking(monkeypatch, "adding to a file", errno.EOPNOTSUPP)
    with pytest.raises(
        ResultsError, match=r"cannot write results to .*/1: Operation not supported"
    ):
        RunFolder(tmp_path, 1)
    assert list((tmp_path / "1").iterdir()) == []


def test_a_mount_that_does_not_know_how_large_it_is_takes_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (0, 0, 0))
    folder.reserve(3, 10**9)


def test_a_file_that_is_called_latest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("mine")
    save(RunFolder(tmp_path, 1), 1)
    assert (tmp_path / "latest").read_text() == "mine"
    assert newest(tmp_path) == tmp_path / "1"
    assert {p.name for p in tmp_path.iterdir()} == {"1", "latest"}


def test_a_folder_that_is_called_latest_is_kept_and_is_no_run(tmp_path: Path) -> None:
    results = tmp_path / "copied"
    shutil.copytree(save(RunFolder(tmp_path / "first", 1), 1).parent, results / "latest")
    save(RunFolder(results, 2), 1, seed=2)
    assert newest(results) == results / "2"
    assert not (results / "latest").is_symlink()
    assert list(rounds(results / "latest")) == [1]
