"""Files of a run, as its ServerApp has written them into the results folder.

A ServerApp is code that came with a run: its files may hold anything. No link below the results is
followed, nothing is waited for, and what is too large is not read.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20  # of a file; a run of 100 rounds at 200 sites has 2 MiB of lines
_TEXT = 160


@contextmanager
def opened(folder: Path, *inner: str) -> Iterator[int]:
    """A handle of a run's folder, or of one in it: what is there when it is used, not before.

    Raises:
        OSError: there is none, or it is behind a link.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY
    handle = os.open(folder.parent, flags)  # the results themselves: the operator may link them
    try:
        for name in (folder.name, *inner):
            outer, handle = handle, os.open(name, flags | os.O_NOFOLLOW, dir_fd=handle)
            os.close(outer)
        yield handle
    finally:
        os.close(handle)


def read(folder: Path, name: str, after: int = 0) -> bytes | None:
    """A file's bytes from ``after`` on; None where there is none, or a link, a pipe, too much."""
    *inner, last = name.split("/")
    try:
        with opened(folder, *inner) as at:
            handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=at)
    except OSError:
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            return None
        with os.fdopen(handle, "rb", closefd=False) as file:
            file.seek(after)
            return file.read(MOST_BYTES)
    except OSError:
        return None
    finally:
        os.close(handle)


def parsed(data: bytes) -> Any:
    """What this JSON holds; None where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def facts(results: Path, run: str) -> dict[str, Any]:
    """The run.json of this run; empty if there is none that can be read."""
    return table(parsed(read(results / run, "run.json") or b""))


def lines(results: Path, run: str) -> list[dict[str, Any]]:
    """The rounds of this run's metrics.jsonl that can be read, in their order."""
    found = map(parsed, (read(results / run, "metrics.jsonl") or b"").splitlines())
    return [one for one in found if isinstance(table(one).get("round"), int)]


def text(value: object) -> str:
    """``value`` as one printable line, or nothing if it is no text."""
    if not isinstance(value, str):
        return ""
    plain = "".join(c if c.isprintable() else " " for c in value[: 4 * _TEXT])
    words = " ".join(plain.split())
    return words if len(words) <= _TEXT else words[: _TEXT - 1] + "…"


def table(value: object) -> dict[str, Any]:
    """``value``, if it is an object; else an empty one."""
    return value if isinstance(value, dict) else {}
