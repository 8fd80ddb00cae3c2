"""Register every site's public key with a running SuperLink, before its SuperNode starts.

    python -m superlink.register

A SuperNode whose key is not registered neither works nor exits, so this comes first. The
registration lives in the SuperLink's database; doing it again is harmless.
"""

import os
import sys
from pathlib import Path

from superlink.control import Control, ControlError, public_keys


def register(control: Control, public: Path, timeout_s: float = 60) -> int:
    """Register all keys in ``public``; returns how many were new.

    Raises:
        ControlError: no keys, or the SuperLink does not answer or refuses.
    """
    keys = public_keys(public)
    if not keys:
        raise ControlError(f"no site-NN.pub in {public}; run superlink.provision first")
    control.wait_until_up(timeout_s)
    return sum(control.register(key) for key in keys.values())


def main() -> int:
    public = Path(os.environ.get("PUBLIC_DIR", "federation/public"))
    address = os.environ.get("CONTROL_ADDRESS", "localhost:9093")
    try:
        new = register(Control(address, public / "ca.crt"), public)
    except ControlError as err:
        print(f"register: {err}", file=sys.stderr)
        return 1
    print(f"register: {len(public_keys(public))} sites at {address}, {new} of them new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
