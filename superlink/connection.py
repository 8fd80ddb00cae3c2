"""Write the SuperLink connection ``deployment`` that ``flwr run . deployment`` uses.

    python -m superlink.connection ADDRESS CA_CERTIFICATE

ADDRESS is the Control API, such as localhost:9093 at the end of an SSH tunnel. Flower keeps
its connections in $FLWR_HOME/config.toml (default ~/.flwr); they do not belong into
pyproject.toml, which ``flwr run`` would rewrite.
"""

import os
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from supernode.reach import parsed

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
_TEMPLATE = """
[superlink.deployment]
address = "{address}"
root-certificates = "{ca}"
"""


def other_flwr() -> str:
    """What to know if the flwr here is not the one that pyproject.toml pins; empty if it is.

    Flower's own words for it come late, or (of 1.37 and later, which speak HTTP) not at all. Where
    there is no checkout, pip has seen to it.
    """
    if not _PROJECT.is_file():
        return ""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    (pin,) = (need for need in project["dependencies"] if need.startswith("flwr=="))
    try:
        here = version("flwr")
    except PackageNotFoundError:
        here = "none"
    if f"flwr=={here}" == pin:
        return ""
    return f"this Python has flwr {here}, and the federation is of another: pip install {pin}"


def write_connection(flwr_home: Path, address: str, ca_file: Path) -> Path:
    """Add or replace ``[superlink.deployment]`` in ``flwr_home``/config.toml.

    Raises:
        ValueError: the file has such a section with more keys than ours, or is not TOML.
    """
    path = flwr_home / "config.toml"
    text = path.read_text() if path.exists() else '[superlink]\ndefault = "deployment"\n'
    old = tomllib.loads(text).get("superlink", {}).get("deployment")
    section = _TEMPLATE.format(address=address, ca=ca_file.resolve())
    if old is not None:
        before = _TEMPLATE.format(address=old.get("address"), ca=old.get("root-certificates"))
        if before not in text or set(old) != {"address", "root-certificates"}:
            raise ValueError(f"{path} has a [superlink.deployment] of its own; edit it by hand")
        text = text.replace(before, section)
    else:
        text += section
    flwr_home.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    home = Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr"))
    if reason := other_flwr():
        print(f"connection: {reason}", file=sys.stderr)
        return 1
    ca_file = Path(sys.argv[2])
    if not ca_file.is_file():
        print(f"connection: no CA certificate at {ca_file}", file=sys.stderr)
        return 1
    try:
        parsed(sys.argv[1])
        path = write_connection(home, sys.argv[1], ca_file)
    except ValueError as err:
        print(f"connection: {err}", file=sys.stderr)
        return 1
    print(f"connection: deployment -> {sys.argv[1]} in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
