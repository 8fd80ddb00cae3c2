"""Make the list of sites that a running SuperLink lets in that of the folder ``public``.

    python -m superlink.register

Every site-NN.pub may join, no key in public/revoked/ may. A SuperNode whose key is not registered
neither works nor exits, so this comes before the SuperNodes. The list lives in the SuperLink's
database; doing it again is harmless. A key that Flower has unregistered never comes back.

SITES_DIR/sites.json then says which of the SuperLink's nodes is which site: a ServerApp asks nobody
else, least of all the nodes.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from superlink.certificates import write
from superlink.control import UNREGISTERED, Control, ControlError, connected, public_keys


@dataclass(frozen=True)
class Registered:
    """``sites`` may join, ``new`` of them could not before; ``shut_out`` keys could, before."""

    sites: int
    new: int
    shut_out: int
    warnings: list[str]


def register(control: Control, public: Path, sites_dir: Path, timeout_s: float = 60) -> Registered:
    """Register all keys in ``public``, unregister those in ``public``/revoked, write sites.json.

    Raises:
        ControlError: no keys, one is both, or two sites have one key; the SuperLink does not
            answer or refuses; or ``sites_dir`` cannot be written.
    """
    keys, revoked = public_keys(public), public_keys(public / "revoked")
    if not keys and not revoked:
        raise ControlError(f"no site-NN.pub in {public}; run superlink.provision first")
    _check_names(keys, public)
    file_of = {key: public / "revoked" / f"{name}.pub" for name, key in revoked.items()}
    for site, key in keys.items():
        if key in file_of:
            raise ControlError(
                f"{public / site}.pub is a revoked key ({file_of[key]}); delete it in {public}; "
                f"let the site in with a new key: superlink.provision rotate {site}"
            )
    control.wait_until_up(timeout_s)
    shut_out = control.unregister(revoked.values())
    status = control.node_status()  # Flower logs an error for a key that it knows already
    new = sum(control.register(key) for key in keys.values() if key not in status)
    warnings = [
        f"the SuperLink has unregistered the key in {public / site}.pub, and that is for ever: "
        f"{site} cannot join; run superlink.provision rotate {site}"
        for site, key in keys.items()
        if status.get(key) == UNREGISTERED
    ]
    _write_site_list(control, keys, sites_dir)
    known = {*keys.values(), *revoked.values()}
    if strangers := [s for k, s in status.items() if s != UNREGISTERED and k not in known]:
        warnings.append(
            f"{len(strangers)} more keys may join that are not in {public}; "
            "flwr supernode list shows them, flwr supernode unregister shuts one out"
        )
    return Registered(len(keys), new, shut_out, warnings)


def _check_names(keys: dict[str, bytes], public: Path) -> None:
    """Each file is one site's: a number as provision writes it, and a key of its own."""
    site_of: dict[bytes, str] = {}
    for site, key in keys.items():
        if not re.fullmatch(r"site-(\d\d|[1-9]\d\d+)", site):
            raise ControlError(f"{public / site}.pub: a site is called site-00, site-01, …")
        if key in site_of:
            raise ControlError(
                f"{public / site}.pub is the key of {site_of[key]}; give each site its own: "
                "superlink.provision"
            )
        site_of[key] = site


def _write_site_list(control: Control, keys: dict[str, bytes], sites_dir: Path) -> None:
    node_of = {bytes(n.public_key): n.node_id for n in control.nodes() if n.status != UNREGISTERED}
    listed = {str(node_of[key]): site for site, key in keys.items() if key in node_of}
    try:
        write(sites_dir / "sites.json", (json.dumps(listed, indent=1) + "\n").encode())
    except OSError as err:
        raise ControlError(
            f"cannot write {sites_dir / 'sites.json'}: {err.strerror}; set SITES_DIR"
        ) from None


def main() -> int:
    public = Path(os.environ.get("PUBLIC_DIR", "federation/public"))
    sites_dir = Path(os.environ.get("SITES_DIR", "federation/sites"))
    address = os.environ.get("CONTROL_ADDRESS", "localhost:9093")
    try:
        done = register(connected(address, public / "ca.crt"), public, sites_dir)
    except ControlError as err:
        print(f"register: {err}", file=sys.stderr)
        return 1
    for warning in done.warnings:
        print(f"register: WARNING: {warning}", file=sys.stderr)
    out = f"; {done.shut_out} revoked keys shut out" if done.shut_out else ""
    print(f"register: {done.sites} sites at {address}, {done.new} of them new{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
