"""Make this site's key pair here: the private part stays, the public one goes to the operator.

    python -m supernode.keygen > site-07.pub        (SITE_DIR)

Writes SITE_DIR/supernode.key (mode 0600), never over another one, and prints the public key alone
on the standard output; where a key is there already, that one's. The operator's part is
``superlink.provision admit site-07 site-07.pub``.
"""

import base64
import hashlib
import os
import sys
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def make_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Write a new private key to ``path`` in one step; returns its public part.

    Raises:
        FileExistsError: there is one already; OSError: it cannot be written.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(part, path)  # unlike a rename, not over another
    finally:
        part.unlink()
    return key.public_key()


def loaded(path: Path) -> ec.EllipticCurvePrivateKey | None:
    """The private key in this file; None: it is no site's. Raises OSError."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    """As ssh-keygen -l and superlink.provision show it."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    blob = base64.b64decode(public.public_bytes(*form).split()[1])
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def main() -> int:
    site = os.environ.get("SITE_DIR")
    if not site:
        print("keygen: ERROR: SITE_DIR is not set", file=sys.stderr)
        return 1
    path = Path(site) / "supernode.key"
    done = "is made and stays here"
    try:
        try:
            public = make_key(path)
        except FileExistsError:  # the shell has emptied the file that the public part is for
            if not (there := loaded(path)):
                print(
                    f"keygen: ERROR: {path} is there already, and is no private key of a site; "
                    "move it away",
                    file=sys.stderr,
                )
                return 1
            public = there.public_key()
            done = "was there already, and stays: move it away to have another"
    except OSError as err:
        print(f"keygen: ERROR: {path}: {err.strerror}", file=sys.stderr)
        return 1
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    print(public.public_bytes(*form).decode())
    print(
        f"keygen: {path} {done}; the line above goes to the operator, and this by another way: "
        f"{fingerprint(public)}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
