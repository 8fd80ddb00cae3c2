"""Make the list of sites that a running SuperLink lets in that of the folder ``public``.

    python -m superlink.register

Every site-NN.pub may join, no key in public/revoked/ may. A SuperNode whose key is not registered
neither works nor exits, so this comes before the SuperNodes. The list lives in the SuperLink's
database; doing it again is harmless. A key that Flower has unregistered never comes back.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from superlink.control import UNREGISTERED, Control, ControlError, public_keys


@dataclass(frozen=True)
class Registered:
    """``sites`` may join, ``new`` of them could not before; ``shut_out`` keys could, before."""

    sites: int
    new: int
    shut_out: int
    warnings: list[str]


def register(control: Control, public: Path, timeout_s: float = 60) -> Registered:
    """Register all keys in ``public`` and unregister those in ``public``/revoked.

    Raises:
        ControlError: no keys, or one is both; or the SuperLink does not answer or refuses.
    """
    keys, revoked = public_keys(public), public_keys(public / "revoked")
    if not keys and not revoked:
        raise ControlError(f"no site-NN.pub in {public}; run superlink.provision first")
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
    known = {*keys.values(), *revoked.values()}
    if strangers := [s for k, s in status.items() if s != UNREGISTERED and k not in known]:
        warnings.append(
            f"{len(strangers)} more keys may join that are not in {public}; "
            "flwr supernode list shows them, flwr supernode unregister shuts one out"
        )
    return Registered(len(keys), new, shut_out, warnings)


def main() -> int:
    public = Path(os.environ.get("PUBLIC_DIR", "federation/public"))
    address = os.environ.get("CONTROL_ADDRESS", "localhost:9093")
    try:
        done = register(Control(address, public / "ca.crt"), public)
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
