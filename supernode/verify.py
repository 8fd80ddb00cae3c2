"""Are the prepared base models what ``supernode.prepare`` wrote? Seen from their SHA-256.

Sizes do not show a flipped bit, and 6 GB take too long for a preflight. So a thread of the
SuperNode's entrypoint reads every file once when the SuperNode starts, and again when one has
changed; the ClientApp reads the outcome from the file that MODELS_VERIFIED names:
{folder: {"files": {name: [bytes, mtime in ns, inode]}, "wrong": {name: its SHA-256, or why not}}}
"""

import atexit
import hashlib
import json
import os
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from supernode.own_folder import own_folder

LOOK_AGAIN_S = 5.0
LOWEST_PRIORITY = 19


def start(models: Path) -> Path:
    """Begin to verify, now and at every change; returns the file with the outcome."""
    until_the_end = ExitStack()
    atexit.register(until_the_end.close)
    outcome = until_the_end.enter_context(own_folder()) / "models-verified.json"
    threading.Thread(target=_keep_verified, args=(models, outcome), daemon=True).start()
    return outcome


def _keep_verified(models: Path, outcome: Path) -> None:
    # On Linux a thread has a priority of its own: starting the SuperNode comes first.
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
    known: dict[str, Any] = {}
    while True:
        try:
            verify(models, outcome, known)
        except (OSError, ValueError) as err:  # ValueError: a name that no file can have
            print(f"supernode: ERROR: base models not verified: {err}", file=sys.stderr, flush=True)
            time.sleep(60)
        time.sleep(LOOK_AGAIN_S)


def verify(models: Path, outcome: Path, known: dict[str, Any]) -> None:
    """Verify each model that is new or changed since ``known``; the newest first.

    ``known`` is the outcome so far, and is kept up to date together with its file.
    """
    found = sorted(models.glob("*/base.json"), key=_mtime, reverse=True)
    for path in found:
        folder = path.parent
        try:
            base = json.loads(path.read_text())
            name, expected = base["name"], dict(base["sha256"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # the ClientApp says what is wrong with it
        files = {n: stamp(folder / n) for n in ("base.json", *expected)}
        if known.get(folder.name, {}).get("files") == files:
            continue
        started = time.monotonic()
        sums = {n: _sha256(folder / n) for n in expected}
        wrong = {n: found for n, found in sums.items() if found != expected[n]}
        if wrong:
            print(
                f"supernode: ERROR: base model {name}: {', '.join(wrong)} in {folder} is not what "
                "supernode.prepare wrote",
                file=sys.stderr,
                flush=True,
            )
        else:
            size_mib = sum(f[0] for f in files.values() if f) / 2**20
            took_s = time.monotonic() - started
            print(
                f"supernode: base model {name} is what supernode.prepare wrote "
                f"({size_mib:.0f} MiB read in {took_s:.0f} s)",
                flush=True,
            )
        outcomes = known | {folder.name: {"files": files, "wrong": wrong}}
        _write(outcome, outcomes)
        known.update(outcomes)  # only now: what cannot be written is to be found again


def stamp(path: Path) -> list[int] | None:
    """Bytes, time of the last change in ns, and inode: another file has others. None: no file."""
    try:
        there = path.stat()
    except OSError:
        return None
    return [there.st_size, there.st_mtime_ns, there.st_ino]


def _mtime(path: Path) -> int:
    return (stamp(path) or [0, 0, 0])[1]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        return err.strerror or type(err).__name__


def _write(outcome: Path, known: dict[str, Any]) -> None:
    part = outcome.with_suffix(".part")
    part.write_text(json.dumps(known))
    part.replace(outcome)
