"""What a SIGKILL would leave, at every step that a piece of code takes on the disk.

A process that is killed loses what it holds; what the kernel has stays. So the folder as it is
before a step is what a kill there leaves, and no process is needed for it: a child of a test's
process, forked beside the threads of gRPC and torch, died of other causes now and then.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What Python reports before it does it; "open" only where it may write.
_STEPS = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
TORN_BYTES = 10
_watching: list["_Watch"] = []  # the hook is for good: Python takes none out


def kills(action: Callable[[Path], object], folder: Path) -> Iterator[Path]:
    """``folder`` as ``action`` leaves it when it is killed, at one step after the other.

    Killed before its first, second, … step in that folder, until it gets to its end; and, where a
    step opens a file, also when ``TORN_BYTES`` of it are written.
    """
    with tempfile.TemporaryDirectory() as states:
        watch = _Watch(folder, Path(states))
        first, _watching[:] = not _watching, [watch]
        if first:
            sys.addaudithook(lambda event, args: _watching[0].see(event, args))
        try:
            action(folder)
        finally:
            watch.looking = False
        watch.tear()
        assert watch.states, "no step on the disk at all"
        for state in watch.states:
            shutil.rmtree(folder, ignore_errors=True)
            if state.exists():
                _copy(state, folder)
            yield folder


class _Watch:
    def __init__(self, folder: Path, into: Path) -> None:
        self.folder, self.into = folder, into
        self.states: list[Path] = []
        self.looking = True
        self._opened: tuple[Path, int] | None = None  # and its size, where the step appends

    def see(self, event: str, args: Any) -> None:
        """Keep the folder's state if this is one of Python's reports of a step in it."""
        opens = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not self.looking or not (opens or event in _STEPS):
            return
        path = Path("" if isinstance(args[0], int) else os.fsdecode(args[0]))
        if path.is_absolute() and not path.is_relative_to(self.folder):
            return  # a library's cache; what is relative comes from shutil
        self.looking = False  # its own steps
        self.tear()
        self._keep()
        if opens and path.is_absolute():
            appends = args[2] & os.O_APPEND and path.exists()
            self._opened = path, path.stat().st_size if appends else 0
        self.looking = True

    def tear(self) -> None:
        """Keep the state behind the first bytes of the file that the last step has opened."""
        (path, size), self._opened = self._opened or (Path(), 0), None
        if path.is_file() and path.stat().st_size > size + TORN_BYTES:
            os.truncate(self._keep() / path.relative_to(self.folder), size + TORN_BYTES)

    def _keep(self) -> Path:
        state = self.into / str(len(self.states))
        self.states.append(state)
        if self.folder.exists():
            _copy(self.folder, state)
        return state


def _copy(state: Path, to: Path) -> None:
    shutil.copytree(state, to, symlinks=True)
