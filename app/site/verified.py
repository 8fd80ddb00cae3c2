"""Whether this site's base model is what ``supernode.prepare`` wrote, as its SuperNode found.

The SuperNode reads every file when it starts and when one has changed (supernode/verify.py), and
leaves the outcome in the file that MODELS_VERIFIED names.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from app.config import MIB
from app.site.base_model import BaseModel
from app.site.partition import SiteError

# The server waits longer for the answer to its preflight (QUERY_TIMEOUT_S).
WAIT_S, POLL_S = 100.0, 0.5


def check_verified(base: BaseModel) -> None:
    """Wait for the outcome of the files as they are now.

    Raises:
        SiteError: a file is another one than was prepared; or it is not known yet after WAIT_S, or
            never will be.
    """
    _check_known(base)
    if "MODELS_VERIFIED" not in os.environ:
        raise SiteError(
            "this SuperNode is older than the app: it verifies no base model; update it"
        )
    outcome = Path(os.environ["MODELS_VERIFIED"])
    deadline = time.monotonic() + WAIT_S
    while (found := _read(outcome).get(base.folder.name, {})).get("files") != _stamps(base):
        if time.monotonic() > deadline:
            size_mib = sum(base.files.values()) / MIB
            raise SiteError(
                f"base model {base.name}: its files are still being read ({size_mib:.0f} MiB, to "
                "compare their SHA-256); start the run again in a minute"
            )
        time.sleep(POLL_S)
    for file, seen in found["wrong"].items():
        raise _damaged(base, file, seen)


def check_contents(base: BaseModel) -> None:
    """Read every file now: for the evaluation, which has no SuperNode.

    Raises:
        SiteError: as check_verified; OSError: a file cannot be read.
    """
    _check_known(base)
    for file, expected in base.sha256.items():
        with (base.folder / file).open("rb") as content:
            seen = hashlib.file_digest(content, "sha256").hexdigest()
        if seen != expected:
            raise _damaged(base, file, seen)


def _check_known(base: BaseModel) -> None:
    if not base.sha256:
        raise SiteError(
            f"base model {base.name}: {base.folder.name} was prepared by an older version, without "
            "SHA-256; run supernode.prepare again"
        )


def _damaged(base: BaseModel, file: str, seen: str) -> SiteError:
    found = seen[:12] if len(seen) == 64 else seen  # or why it cannot be read
    return SiteError(
        f"base model {base.name}: {file} is not what supernode.prepare wrote (sha256 "
        f"{base.sha256[file][:12]} expected, {found} found); "
        f"delete {base.folder.name} and run supernode.prepare again"
    )


def _read(outcome: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(outcome.read_text()))
    except FileNotFoundError:
        return {}  # none is read yet


def _stamps(base: BaseModel) -> dict[str, list[int]]:
    """As supernode/verify.py has them."""
    there = {n: (base.folder / n).stat() for n in ("base.json", *base.sha256)}
    return {n: [s.st_size, s.st_mtime_ns, s.st_ino] for n, s in there.items()}
