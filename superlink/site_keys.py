"""The sites' keys: the private one in the site's folder, the public one for the SuperLink.

    site-07/supernode.key                  private, OpenSSH, where it was made here
    site-07/supernode.pub                  instead: the public part of one that was made at the site
    public/site-07.pub                     may join
    public/revoked/site-07-HASH.pub        must not come back; one file a key that the site had

What a site may do is decided by these files alone, each written or moved in one step: whatever an
interruption leaves is completed by the next superlink.provision.
"""

import base64
import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from superlink.certificates import CertificateError, load_key, write, write_key


def public_file(federation: Path, site: str) -> Path:
    return federation / "public" / f"{site}.pub"


def retired_files(federation: Path, site: str = "site") -> list[Path]:
    return sorted((federation / "public" / "revoked").glob(f"{site}-*.pub"))


def is_revoked(federation: Path, site: str) -> bool:
    """It has revoked keys and no other."""
    retired = [_blob(p) for p in retired_files(federation, site)]
    if not retired or public_file(federation, site).exists():
        return False
    own = _own(federation, site)
    return own is None or _blob_of(own) in retired


def _own(federation: Path, site: str) -> bytes | None:
    """The public key that goes with the site's private one, wherever that is."""
    folder = federation / site
    if (pub := folder / "supernode.pub").exists():
        return _line(_admissible(pub.read_bytes(), str(pub)))
    private = folder / "supernode.key"
    return _line(load_key(private).public_key()) if private.exists() else None


def revoke(federation: Path, site: str) -> None:
    """The site must not come back; from now on provision leaves it alone.

    Raises:
        CertificateError: no such site, or it is revoked already.
    """
    pub = public_file(federation, site)
    if not pub.exists():
        gone = is_revoked(federation, site)
        why = "is revoked already" if gone else f"has no key: {pub} is missing"
        raise CertificateError(f"{site} {why}; superlink.provision show lists the keys")
    _retire(pub)


def rotate(federation: Path, site: str) -> None:
    """A new key pair; the old public key is revoked. A revoked site comes back that way.

    Raises:
        CertificateError: no such site.
    """
    pub = public_file(federation, site)
    if not pub.exists() and not retired_files(federation, site):
        raise CertificateError(
            f"{site} has no key: {pub} is missing; run superlink.provision first"
        )
    renew(federation, site)


def renew(federation: Path, site: str) -> None:
    """A new key pair; the public key that the site had is retired."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_key(federation / site / "supernode.key", key, openssh=True)
    (federation / site / "supernode.pub").unlink(missing_ok=True)
    publish(federation, site)


def publish(federation: Path, site: str) -> bool:
    """The public key is that of the private one; another that the site had is retired.

    False where the site has no key, neither here nor by what was admitted.
    """
    pub, line = public_file(federation, site), _own(federation, site)
    if line is None:
        return False
    if (federation / site / "supernode.pub").exists():  # the one that was made here is no more
        (federation / site / "supernode.key").unlink(missing_ok=True)
    if pub.exists() and _blob(pub) != _blob_of(line):
        _retire(pub)
    write(pub, line + f" {site}\n".encode())
    return True


def admit(federation: Path, site: str, given: bytes, called: str) -> None:
    """The site's key is the one that was made there, of which ``given`` is the public part.

    Args:
        called: as messages call what was given.

    Raises:
        CertificateError: no such site, no such key, or it is revoked or another site's.
    """
    if not (federation / site / "site.env").exists():
        raise CertificateError(
            f"{site} is not one of this federation's; superlink.provision --sites N makes more"
        )
    line = _line(_admissible(given, called))
    if _blob_of(line) in map(_blob, retired_files(federation)):
        raise CertificateError(f"{called} is a revoked key; have the site make another")
    for other in sorted((federation / "public").glob("site-*.pub")):
        if other.stem != site and _blob(other) == _blob_of(line):
            raise CertificateError(f"{called} is the key of {other.stem}; each site has its own")
    write(federation / site / "supernode.pub", line + b"\n")
    publish(federation, site)


def _admissible(content: bytes, called: str) -> ec.EllipticCurvePublicKey:
    """Raises CertificateError: it is no public key of a site; a private one is named as such."""
    if b"PRIVATE KEY" in content:
        raise CertificateError(
            f"{called} is a private key, which nobody but the site should have: have it made anew "
            "there, and send the public part alone"
        )
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertificateError(
            f"{called} is not an elliptic-curve public key in one line (ecdsa-sha2-nistp384 …), as "
            "supernode.keygen prints it"
        )
    return key


def fingerprint(pub: Path) -> str:
    """As ssh-keygen -l shows it."""
    return _fingerprint(_blob(pub))


def fingerprint_of_pem(key: bytes) -> str:
    """The same of a public key as Flower sends it. Raises ValueError: it is none."""
    loaded = serialization.load_pem_public_key(key)
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    try:
        return _fingerprint(_blob_of(loaded.public_bytes(*form)))
    except (ValueError, UnsupportedAlgorithm):  # a curve that OpenSSH does not know
        return "no site's key"


def _fingerprint(blob: bytes) -> str:
    return f"SHA256:{base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip('=')}"


def _retire(pub: Path) -> None:
    unique = hashlib.sha256(_blob(pub)).hexdigest()[:12]
    target = pub.parent / "revoked" / f"{pub.stem}-{unique}.pub"
    target.parent.mkdir(exist_ok=True)
    pub.replace(target)


def _line(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def _blob_of(line: bytes) -> bytes:
    return base64.b64decode(line.split()[1], validate=True)


def _blob(pub: Path) -> bytes:
    try:
        return _blob_of(pub.read_bytes())
    except (IndexError, ValueError):
        raise CertificateError(
            f"{pub} is not an OpenSSH public key: delete it and run superlink.provision"
        ) from None
