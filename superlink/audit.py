"""The operator's record: AUDIT_DIR/audit.jsonl, a JSON line an act, on the disk before its answer.

| field   | what                                                                                 |
|---------|--------------------------------------------------------------------------------------|
| schema  | 1; another number: a field has another meaning, or is gone                           |
| time    | ISO 8601, UTC, when the act ended                                                    |
| act     | provision, renew, rotate, revoke, reset …: superlink.provision's commands; backup,   |
|         | restore; register, unregister, submit, stop: what the SuperLink was asked for;       |
|         | anything else that would change something there by Flower's name (StartAutomation)   |
| subject | whom or what it was about: site-07, a key's fingerprint, run 123                     |
| app     | of submit the app's SHA-256, else null                                               |
| by      | the program, or the address that the SuperLink was asked from                        |
| outcome | done or failed                                                                       |
| reason  | why it failed, else null                                                             |

The file has mode 0600. Nothing here deletes from it.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from superlink.run_files import text

SCHEMA = 1
FILE = "audit.jsonl"
DONE, FAILED = "done", "failed"


class AuditError(Exception):
    """An act could not be recorded; the message is one line for the user."""


@contextmanager
def recorded(folder: Path, act: str, subject: str, by: str) -> Iterator[dict[str, Any]]:
    """Record what is done while this lasts; ``subject`` and others may be filled in meanwhile.

    Raises:
        AuditError: the record cannot be written.
    """
    line = {"schema": SCHEMA, "time": "", "act": act, "subject": subject, "app": None, "by": by}
    line |= {"outcome": DONE, "reason": None}
    try:
        yield line
    except BaseException as err:
        line |= {"outcome": FAILED, "reason": text(str(err)) or type(err).__name__}
        raise
    finally:
        line["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        _append(folder, json.dumps(line).encode() + b"\n")


def command(federation: Path, act: str, subject: str) -> AbstractContextManager[object]:
    """``recorded`` for a command of superlink.provision; a wrong folder is not made for it.

    AUDIT_DIR is the folder's audit/ where the environment says nothing.
    """
    if act == "show" or not (federation.is_dir() or act == "provision"):
        return nullcontext()
    folder = Path(os.environ.get("AUDIT_DIR") or federation / "audit")
    return recorded(folder, act, subject, "superlink.provision")


def _append(folder: Path, line: bytes) -> None:
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "rb+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            whole = not end or os.pread(handle, 1, end - 1) == b"\n"  # or a power cut has left it
            line = line if whole else b"\n" + line
            if file.write(line) < len(line):
                os.ftruncate(handle, end)
                raise OSError(None, "No space left on device")
            os.fsync(handle)
    except OSError as err:
        raise AuditError(f"the act is not recorded: {path}: {err.strerror}; AUDIT_DIR") from None
