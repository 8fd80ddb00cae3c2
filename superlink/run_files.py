"""What ServerApps have written of their runs: run.json and metrics.jsonl.

A ServerApp is code that came with a run: its files may hold anything. They are neither followed to
another file nor waited for, read up to a limit, and what is shown of them is one printable line.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

MOST_BYTES = 4 * 2**20  # of a run.json; that of 100 sites has a tenth
_MOST_LINES_BYTES = 64 * 2**20  # of a metrics.jsonl; its end counts
_TEXT = 160


def facts(results: Path, run: str) -> dict[str, Any]:
    """The run.json of this run; empty if there is none that can be read."""
    try:
        found = json.loads(_read(results / run / "run.json", MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def lines(results: Path, run: str) -> list[dict[str, Any]]:
    """The rounds of this run's metrics.jsonl that can be read, in their order."""
    try:
        text = _read(results / run / "metrics.jsonl", _MOST_LINES_BYTES)
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):  # the first of a cut file, or the last while it grows
            continue
        if isinstance(one, dict) and isinstance(one.get("round"), int):
            found.append(one)
    return found


def _read(path: Path, most_bytes: int) -> bytes:
    """Its last ``most_bytes``. Raises OSError: no regular file, or none that can be read."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with os.fdopen(os.open(path, flags), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is no file")
        file.seek(max(0, facts.st_size - most_bytes))
        return file.read(most_bytes)


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
