"""The parts of the federation's folder that exist because a container sees no more than its own."""

import secrets
from pathlib import Path

from superlink.certificates import write

_FILE = "runtime.secret"


def runtime_secret(federation: Path, made: list[str], new: bool = False) -> None:
    """What the ServerApps' container shows the SuperLink, so that nobody else gets their work."""
    own = federation / "superlink" / _FILE
    new = new or not own.exists()
    secret = secrets.token_hex(32).encode() if new else own.read_bytes()
    if new:
        made.append("secret of the ServerApps")
    write(own, secret, 0o600)
    write(federation / "serverapp" / _FILE, secret, 0o640)  # another user of this group


def manifest_folder(federation: Path) -> None:
    """The folder of supernode.prepare's list of files, which was beside the keys once."""
    old, now = federation / "data.json", federation / "prepared" / "data.json"
    now.parent.mkdir(exist_ok=True)
    if old.exists():
        old.replace(now)
