"""The folder that an evaluation writes to: there, writable, and its own until it ends."""

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eval import EvalError


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep any other evaluation out of it.

    The system itself lets go of the lock when the process ends, however it ends.

    Raises:
        EvalError: another evaluation is at work in it, or it cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o664)
    except OSError as err:
        raise _not_writable(folder, err) from None
    try:
        _lock(lock, path)
        try:
            (folder / ".probe").write_bytes(b"\0" * 4096)
            (folder / ".probe").unlink()
        except OSError as err:
            raise _not_writable(folder, err) from None
        yield
    finally:
        os.close(lock)


def _lock(lock: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        raise EvalError(f"{path} is no plain file; delete it")
    with suppress(PermissionError):  # whoever made it: the container's user, or one of this host
        os.fchmod(lock, 0o664)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        if err.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise EvalError(
                f"another evaluation is at work in {path.parent}; wait until it ends, or give --out"
            ) from None
        # Some network file systems know no locks.
        print(
            f"eval: cannot lock {path} ({err.strerror}): start no second evaluation there",
            file=sys.stderr,
        )


def _not_writable(folder: Path, err: OSError) -> EvalError:
    return EvalError(f"cannot write to {err.filename or folder}: {err.strerror}; give --out")
