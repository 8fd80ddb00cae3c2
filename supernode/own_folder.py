"""A folder in TMPDIR for as long as this process lives; what a killed one left is taken away.

A lock says whether its process lives: the kernel takes it off, however that one ends. The prefix is
of these folders alone, so none is touched that an older SuperNode has made without a lock.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "fedllm-supernode-"


@contextmanager
def own_folder() -> Iterator[Path]:
    """An empty folder, mode 0700; it is gone afterwards."""
    _remove_those_left()
    folder, handle = _locked()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        with suppress(FileNotFoundError):  # until it is locked, it looks like one that was left
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system without locks: there nobody removes any
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)


def _remove_those_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                there = os.fstat(handle)
                if there.st_uid == os.getuid() and stat.S_IMODE(there.st_mode) == 0o700:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its process lives
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
