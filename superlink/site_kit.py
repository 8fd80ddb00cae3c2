"""What a site receives beside its key, and what stays as somebody else has made it.

Certificates of a hospital's own CA and settings that somebody has edited are kept, and named.
"""

import re
from pathlib import Path

from cryptography import x509

from superlink import site_keys
from superlink.certificates import (
    is_for,
    load_certificates,
    time_left,
    write,
    write_certificate,
)

# The address that sites were last told; a site.env with another one was edited.
_ADDRESS = "address"
_FORM = re.compile(r"SUPERLINK=(?P<address>\S*)\nPARTITION_ID=\d+\nNUM_PARTITIONS=\d+\n")


def complete(federation: Path, number: int, sites: int, address: str, made: list[str]) -> None:
    """The folder of a site; of one that was revoked nothing is made again."""
    name = f"site-{number:02d}"
    folder = federation / name
    for part in ("data", "state"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if site_keys.is_revoked(federation, name):
        return
    if not site_keys.publish(federation, name):
        site_keys.renew(federation, name)  # a lost private key may be somebody's now
        made.append(name)
    write_ca(folder / "superlink-ca.crt", federation, made)
    wanted = f"SUPERLINK={address}\nPARTITION_ID={number}\nNUM_PARTITIONS={sites}\n"
    _write_settings(folder / "site.env", wanted, federation, made)


def write_ca(path: Path, federation: Path, made: list[str]) -> None:
    """The certificates of public/ca.crt, unless others than those are there."""
    ours, others = load_certificates(federation / "public" / "ca.crt")
    if path.exists():
        foreign = [c for c in load_certificates(path)[1] if c not in others]
        if foreign:
            made.append(
                f"{path} kept: it holds certificates that are not in public/ca.crt (what is there, "
                "all sites and the SuperLink get)"
            )
            return
    write_certificate(path, *ours, *others)


def _write_settings(path: Path, wanted: str, federation: Path, made: list[str]) -> None:
    """Unless somebody has edited it."""
    if path.exists():
        there = path.read_bytes().decode(errors="replace")
        form, told = _FORM.fullmatch(there), federation / "public" / _ADDRESS
        own = form and (not told.exists() or form["address"] == told.read_text().strip())
        if there != wanted and not own:
            made.append(f"{path} kept: it was edited; delete it to have it written anew")
            return
    write(path, wanted.encode())


def note_address(federation: Path, address: str) -> None:
    """To be called when all sites have been told."""
    write(federation / "public" / _ADDRESS, address.encode())


def of_another_ca(server: x509.Certificate, names: list[str]) -> str:
    """What to know of a server certificate that provision has not made."""
    lacks = [name for name in names if not is_for(server, name)]
    without = f", is not for {', '.join(lacks)}" if lacks else ""
    return (
        f"it is of another CA (to be trusted, that belongs into public/ca.crt){without}, and ends "
        f"{server.not_valid_after_utc:%Y-%m-%d}, in {time_left(server).days} days"
    )
