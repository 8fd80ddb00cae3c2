"""A federation whose device is busy: what a test does meanwhile comes before any site computes."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def device_taken(work: Path) -> Iterator[None]:
    """The sites of this federation wait for their turn; entered when none of them has it."""
    lock = work / "locks" / "device-cpu.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
