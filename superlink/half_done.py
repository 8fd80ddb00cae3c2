"""A restore or backup that is cut off: as little of it as can be is left, and what is, is told."""

import os
import signal
from contextlib import suppress
from pathlib import Path

UNFINISHED = "unfinished-restore"  # in FEDERATION_DIR, while superlink.restore is at work


def unfinished(federation: Path) -> str:
    """What to say of a restore that was cut off there; empty if there is none."""
    if not (federation / UNFINISHED).exists():
        return ""
    return (
        f"{federation / UNFINISHED} is there: a restore is at work, or was cut off; run "
        "superlink.restore again with the same archive and folders, or empty them all"
    )


def unwind_on_sigterm(program: str) -> None:
    """Let SIGTERM (docker stop) raise SystemExit, so that nothing half is left."""

    def stop(*_: object) -> None:
        raise SystemExit(f"{program}: stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)


def sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
