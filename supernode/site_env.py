"""A site's settings: its own site.env, and what its environment says over that, if anything."""

import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path

from supernode.reach import AddressError, reached

FILES = ("supernode.key", "superlink-ca.crt", "site.env")
SETTINGS = (
    "SITE_DIR", "MODELS_DIR", "DEVICE", "SUPERNODE_GPU", "DATA_COLUMNS", "LOCK_DIR", "SUPERLINK",
    "PARTITION_ID", "NUM_PARTITIONS", "RUNTIME_PORT", "HEALTH_PORT", "APP_SHA256",
    "ALLOW_APP_UPDATES", "PYTHONWARNINGS", "WARM_S",
)  # fmt: skip
_SETTING = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_QUOTES = ("'", '"')


def read_site(env: dict[str, str]) -> dict[str, str]:
    """The environment completed by the site's own site.env, beside which its files are there.

    Raises:
        SystemExit: a setting or file is missing, or cannot work; one line says which.
    """
    for name in ("SITE_DIR", "MODELS_DIR", "LOCK_DIR"):
        if not env.get(name):
            raise SystemExit(f"supernode: {name} is not set")
    for file in FILES:
        check_readable(Path(env["SITE_DIR"]) / file)
    return completed(env)


def completed(env: dict[str, str]) -> dict[str, str]:
    """The environment completed by SITE_DIR/site.env.

    An empty variable is as good as none: compose sets all that it passes on, empty or not.

    Raises:
        SystemExit: that cannot be read, or a setting cannot work; one line says which.
    """
    file = Path(env["SITE_DIR"]) / "site.env"
    check_readable(file)
    lines = _lines(file)
    for name, (_, number) in lines.items():
        # Variables of libraries are as welcome (https_proxy, HF_HOME): only what looks like a slip.
        near = get_close_matches(name.upper(), SETTINGS, n=1, cutoff=0.85)
        if near and name not in SETTINGS:
            told = f"{file}, line {number}: {name} is no setting of a site; {near[0]} is"
            print(f"supernode: WARNING: {told}", file=sys.stderr, flush=True)
    complete = env | {name: value for name, (value, _) in lines.items() if not env.get(name)}

    def see(name: str) -> str:
        there = name in lines and not env.get(name)
        return f"see {file}{f', line {lines[name][1]}' if there else ''}"

    for name in ("PARTITION_ID", "NUM_PARTITIONS"):
        value = complete.get(name, "")
        if not re.fullmatch(r"[0-9]{1,6}", value):
            raise SystemExit(f"supernode: {name}={value!r} cannot work; {see(name)}")
    if int(complete["PARTITION_ID"]) >= int(complete["NUM_PARTITIONS"]):
        raise SystemExit(
            f"supernode: PARTITION_ID={complete['PARTITION_ID']} cannot work: NUM_PARTITIONS="
            f"{complete['NUM_PARTITIONS']}, and the first is 0; {see('PARTITION_ID')}"
        )
    try:
        reached(complete.get("SUPERLINK", ""))
    except AddressError as err:
        raise SystemExit(f"supernode: SUPERLINK: {err}; {see('SUPERLINK')}") from None
    return complete


def check_readable(path: Path) -> None:
    """Raises SystemExit: there is no such file of a site, or this user cannot read it."""
    if not path.is_file():
        raise SystemExit(f"supernode: {path} is missing; is this a site's folder?")
    if not os.access(path, os.R_OK):
        raise SystemExit(
            f"supernode: {path} is not readable by user {os.getuid()}; give it to that user (chown)"
        )


def settings(path: Path) -> dict[str, str]:
    """Of a file of lines NAME=value; a byte order mark, and quotes around a value, are taken off.

    Raises:
        SystemExit: another line, by its number.
    """
    return {name: value for name, (value, _) in _lines(path).items()}


def _lines(path: Path) -> dict[str, tuple[str, int]]:
    """Name -> value, and the number of its line. Raises as settings does."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise SystemExit(f"supernode: {path} is not UTF-8; save it as that") from None
    found: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        setting = _SETTING.fullmatch(line)
        name, value = setting.groups() if setting else ("", "")
        if quoted := value.startswith(_QUOTES):
            value = value[1:-1] if len(value) > 1 and value[-1] == value[0] else " "
        # A space at an end is a slip; so is a quotation mark that nothing closes, and a comment
        # behind a value would be a part of it.
        slip = not quoted and (value != value.strip() or " #" in value)
        if not name or slip or value == " " or not value.isprintable():
            raise SystemExit(
                f"supernode: {path}, line {number} is not of the form NAME=value (no `export`, no "
                "space around =, quotes in pairs, comments on lines of their own)"
            )
        if name in found:
            raise SystemExit(
                f"supernode: {path}, lines {found[name][1]} and {number} set {name} twice; keep "
                "one of them"
            )
        found[name] = value, number
    return found
