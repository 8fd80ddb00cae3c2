"""SIGKILL at every step that a piece of code takes on the disk, one after the other."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What Python reports before it does it; "open" only where it may write.
_STEPS = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink"}
_ENOUGH = 2000
TORN_BYTES = 10


def kills(action: Callable[[Path], object], copies: Iterator[Path]) -> Iterator[Path]:
    """Each of ``copies`` as ``action`` leaves it when it is killed, at one step after the other.

    Killed before its first, second, … step in that folder, until it gets to its end; and, where a
    step opens a file, also when ``TORN_BYTES`` of it are written.
    """
    for step in range(1, _ENOUGH):
        for torn in (False, True):
            folder = next(copies)
            if not _killed(action, folder, step, torn):
                if torn:
                    continue  # that step wrote less
                assert step > 1, "no step on the disk at all"
                return
            yield folder
    raise AssertionError(f"no end after {_ENOUGH} steps")


def _killed(action: Callable[[Path], object], folder: Path, step: int, torn: bool) -> bool:
    """Run in a child; False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(_hook(str(folder), step, torn))
            action(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
        return True
    assert os.WEXITSTATUS(status) == 0, "the action failed by itself"
    return False


def _hook(folder: str, step: int, torn: bool) -> Callable[[str, Any], None]:
    seen = 0

    def hook(event: str, args: Any) -> None:
        nonlocal seen
        opens = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not opens and event not in _STEPS:
            return
        path = os.fspath(args[0]) if not isinstance(args[0], int) else ""
        if path.startswith("/") and not path.startswith(folder):
            return  # a library's cache; what is relative comes from shutil
        seen += 1
        if seen != step:
            return
        if not torn:
            os.kill(os.getpid(), signal.SIGKILL)
        if not opens:
            os._exit(0)  # nothing to tear
        # The kernel kills whoever writes beyond the limit, behind the last byte that fits.
        appends = args[2] & os.O_APPEND and Path(args[0]).exists()
        limit = TORN_BYTES + (Path(args[0]).stat().st_size if appends else 0)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return hook
