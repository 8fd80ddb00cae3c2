"""A SuperNode's folders in TMPDIR: gone with it, or with the next one if it was killed."""

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supernode import own_folder
from tests.samples import REPOSITORY

# What a SuperNode's entrypoint has of them while its SuperNode runs.
HOLDS = """
import os, sys
from pathlib import Path
from supernode import verify
from supernode.entrypoint import warm_client_apps

env = {"PATH": os.environ["PATH"]}
outcome = verify.start(Path(sys.argv[1]))
with warm_client_apps(env):
    print(outcome.parent, Path(env["WARM_SOCKET"]).parent, flush=True)
    sys.stdin.read()
"""


@contextmanager
def supernode(tmp: Path) -> Iterator[tuple[subprocess.Popen[str], set[Path]]]:
    """A process that holds its folders until its input ends, and these."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp / "models")], cwd=REPOSITORY, text=True,
        env=os.environ | {"TMPDIR": str(tmp)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        folders = set(map(Path, process.stdout.readline().split()))
        assert len(folders) == 2
        yield process, folders


def test_what_a_killed_supernode_left_goes_at_the_next_start_and_what_a_live_one_has_stays(
    tmp_path: Path,
) -> None:
    others = [tmp_path / "supernode-abc", tmp_path / f"{own_folder.PREFIX}open"]
    for folder in others:
        folder.mkdir()
    (tmp_path / f"{own_folder.PREFIX}link").symlink_to(others[0])
    others[0].chmod(0o700)
    others.append(tmp_path / f"{own_folder.PREFIX}link")
    with supernode(tmp_path) as (lives, kept):
        with supernode(tmp_path) as (killed, left):
            (next(iter(left)) / "models-verified.json").write_text("{}")
            killed.kill()
        assert all(folder.is_dir() for folder in left)
        with supernode(tmp_path) as (_, new):
            assert set(tmp_path.iterdir()) == {*others, *kept, *new}
        assert lives.poll() is None
    assert set(tmp_path.iterdir()) == {*others}


def test_a_folder_that_another_start_took_away_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    lock = fcntl.flock
    taken: list[Path] = []

    def taken_first(handle: int, how: int) -> None:
        if not taken:
            (folder,) = tmp_path.iterdir()
            folder.rmdir()
            taken.append(folder)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", taken_first)
    with own_folder.own_folder() as folder:
        assert folder.is_dir()
        assert taken != [folder]
    assert list(tmp_path.iterdir()) == []
