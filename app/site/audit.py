"""A site's record of what it was asked and what it sent: state/audit.jsonl, a JSON line a message.

A line is on the disk before its reply leaves. A file that would grow beyond MOST_BYTES is kept
under another name (audit-<time>.jsonl), and a new one begins: nothing here ever deletes one, or
whoever asks often enough could have the record of yesterday deleted. The fields, which are for
other programs to rely on, are in docs/hospital.md. No line holds a text of the site's data.

The supernode's image gets this one file too (docker/Dockerfile), for what never reaches the app: a
run whose app is refused. So it imports nothing of ours.
"""

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE, LOCK = "audit.jsonl", "audit.lock"
SCHEMA = 1  # another number: a field has another meaning, or is gone
MOST_BYTES = 4 << 20
TEXT = 500  # characters of a reason that are kept
SENT, REFUSED, FAILED = "sent", "refused", "failed"
KINDS, OTHER = ("query", "train", "evaluate"), "other"


class AuditError(Exception):
    """A line of the record is none; the message says which."""


def entry(run: int, app: str, kind: str) -> dict[str, Any]:
    """A line with all its fields, of a message that has just come."""
    return {
        "schema": SCHEMA,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "run": str(run),
        "app": app,
        "kind": kind if kind in KINDS else OTHER,  # a run may call its messages anything
        "round": None,
        "rows": 0,
        "steps": 0,
        "bytes_received": 0,
        "bytes_sent": 0,
        "change_norm": None,
        "clip_norm": 0.0,
        "noise_multiplier": 0.0,
        "policy": None,
        "outcome": None,
        "reason": None,
    }


def append(folder: Path, line: dict[str, Any]) -> None:
    """Put a line, as ``entry`` makes it, behind the others, and onto the disk.

    Raises:
        OSError: it is not there; then the file is as it was.
    """
    if line["reason"]:
        told = "".join(c if c.isprintable() else " " for c in line["reason"])
        line = line | {"reason": " ".join(told.split())[:TEXT]}
    line = {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in line.items()}
    written = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        path = folder / FILE
        new = not path.exists()
        if not new and path.stat().st_size + len(written) > MOST_BYTES:
            path.rename(folder / f"audit-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.jsonl")
            new = True
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if new:
                _sync_names(folder)
            _add(file, written)
        finally:
            os.close(file)


def since(folder: Path, start: datetime) -> list[dict[str, Any]]:
    """The lines from ``start`` on, those that were written last first.

    A clock that was set back leaves earlier times behind later ones: none of them ends the search.

    Raises:
        AuditError: one of them is none; OSError: the files cannot be read.
    """
    found: list[dict[str, Any]] = []
    for path in (folder / FILE, *reversed(_older(folder))):
        if path.name < f"audit-{start.astimezone(UTC):%Y%m%dT%H%M%S.%fZ}.jsonl":
            break  # it was full before; FILE's own name comes behind all of these
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, text in reversed(list(enumerate(lines, 1))):
            try:
                line = json.loads(text)
                if datetime.fromisoformat(line["time"]) < start:
                    continue
            except (ValueError, KeyError, TypeError):
                raise AuditError(
                    f"{folder.name}/{path.name}, line {number} is no record; move that file away"
                ) from None
            found.append(line)
    return found


def _older(folder: Path) -> list[Path]:
    return sorted(folder.glob("audit-*.jsonl"))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else adds or renames; not on a file system without locks."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _sync_names(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as err:  # some file systems cannot sync a folder
        if err.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
    finally:
        os.close(directory)


def _add(file: int, written: bytes) -> None:
    """All of it or nothing. A last line without its end goes: the reply to it has never left."""
    end = os.fstat(file).st_size
    start = max(0, end - MOST_BYTES)
    whole = start + os.pread(file, end - start, start).rfind(b"\n") + 1 if end else 0
    try:
        os.ftruncate(file, whole)
        left = written
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, whole)
        raise
