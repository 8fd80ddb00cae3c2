"""A checkout is the same bytes on every machine, whatever its git is set to."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.samples import REPOSITORY


def clone(folder: Path, autocrlf: str) -> Path:
    """This repository's last commit, as a git with that ``core.autocrlf`` checks it out."""
    command = ["git", "-c", f"core.autocrlf={autocrlf}", "clone", "--quiet"]
    done = subprocess.run(
        [*command, str(REPOSITORY), str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode and not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    assert done.returncode == 0, done.stderr
    return folder


def app_hash(checkout: Path) -> str:
    command = [sys.executable, "-m", "supernode.pinned", "hash", str(checkout)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_line_ends_and_the_apps_hash_do_not_depend_on_the_settings_of_git(tmp_path: Path) -> None:
    """Sites refuse an app of another hash; with CRLF a shell script in an image does not start."""
    as_it_is = clone(tmp_path / "lf", "false")
    on_windows = clone(tmp_path / "crlf", "true")
    files = [p.relative_to(as_it_is) for p in as_it_is.rglob("*") if p.is_file()]
    tracked = [f for f in files if f.parts[0] != ".git"]
    assert Path("docker/pip-install") in tracked
    differing = [
        str(f) for f in tracked if (on_windows / f).read_bytes() != (as_it_is / f).read_bytes()
    ]
    assert differing == []
    with_cr = [str(f) for f in tracked if b"\r\n" in (on_windows / f).read_bytes()]
    assert {Path(f).suffix for f in with_cr} <= {".png"}  # pictures: these bytes are no line ends
    assert app_hash(on_windows) == app_hash(as_it_is)
