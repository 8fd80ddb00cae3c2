"""A site's kit as one archive: what its hospital unpacks, gives its rows, and starts.

The same files give the same bytes. They belong to the containers' user (10001) where root unpacks.
"""

import gzip
import hashlib
import io
import os
import re
import sys
import tarfile
from pathlib import Path
from string import Template

from superlink import site_keys
from superlink.certificates import CertificateError, canonical, load_certificate, names_of
from supernode.reach import AddressError, reached

USER = 10001  # of the containers: docker/Dockerfile
_TEMPLATES = Path(__file__).with_name("kit")
PIPE = Path("-")  # in the place of a file: the standard input or output
_KEY_INSIDE = """\
It is in this archive: the archive is as secret as the key, so delete it after unpacking. `check`
shows the public part, which is to be

       $fingerprint"""
_KEY_AT_SITE = """\
It is made here, once, before the third command; the private part never leaves this host:

       docker compose run --rm -T keygen > $site.pub

Send $site.pub to the operator (it is no secret; tell the fingerprint that keygen prints by
telephone). `check` says "registered" when the operator has admitted it."""


def kit(federation: Path, site: str, address: str, key_at_site: bool) -> bytes:
    """The archive of this site, a gzipped tar of one folder of its name.

    Args:
        address: Fleet API as this site reaches it, host:port.
        key_at_site: leave the private key out; of a key that ``admit`` has taken there is none.

    Raises:
        CertificateError: no such site, it is revoked, or the server's certificate is not for that
            address; AddressError: that is none; OSError: a file cannot be read.
    """
    folder = federation / site
    try:
        host, _ = reached(address)
    except AddressError as err:
        raise AddressError(f"--address: {err}") from None
    if not site_keys.public_file(federation, site).exists():
        why = "is revoked" if site_keys.is_revoked(federation, site) else "is not there"
        raise CertificateError(f"{site} {why}; superlink.provision show lists the sites")
    server = load_certificate(federation / "superlink" / "server.crt")
    if canonical(host) not in names_of(server):
        raise CertificateError(
            f"the server's certificate is for {', '.join(names_of(server))}, not for {host}: "
            f"superlink.provision --names {host} (SUPERLINK_NAMES), and restart the SuperLink"
        )
    files = {
        "compose.yaml": (_TEMPLATES / "compose.yaml").read_bytes(),
        "compose.cpu.yaml": (_TEMPLATES / "compose.cpu.yaml").read_bytes(),
        "site/superlink-ca.crt": (folder / "superlink-ca.crt").read_bytes(),
        "site/site.env": _settings(folder / "site.env", address),
        "site/policy.toml": (_TEMPLATES / "policy.toml").read_bytes(),
    }
    inside = not key_at_site and (folder / "supernode.key").exists()
    if inside:
        files["site/supernode.key"] = (folder / "supernode.key").read_bytes()
    public = site_keys.fingerprint(site_keys.public_file(federation, site))
    about = {"site": site, "address": address, "fingerprint": public}
    about["key"] = Template(_KEY_INSIDE if inside else _KEY_AT_SITE).substitute(about)
    readme = Template((_TEMPLATES / "README").read_text(encoding="utf-8")).substitute(about)
    files["README"] = readme.encode()
    sums = (f"{hashlib.sha256(files[n]).hexdigest()}  {n}\n" for n in sorted(files))
    return _archive(site, files | {"SHA256SUMS": "".join(sums).encode()})


def _settings(path: Path, address: str) -> bytes:
    """The site's own, also those that somebody has added, but for the address."""
    text, found = re.subn(r"(?m)^SUPERLINK=.*$", f"SUPERLINK={address}", path.read_text())
    if not found:
        raise CertificateError(f"{path} has no line SUPERLINK=; delete it and provision again")
    return text.encode()


def _archive(site: str, files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    folders = dict.fromkeys(("", "eval", "site", "site/data", "site/state"))
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted((folders | files).items()):
            entry = tarfile.TarInfo(f"{site}/{name}".rstrip("/"))
            entry.uid = entry.gid = USER
            entry.mode = 0o600 if name.endswith(".key") else 0o644
            if content is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            entry.size = len(content or b"")
            tar.addfile(entry, io.BytesIO(content or b""))
    return gzip.compress(packed.getvalue(), mtime=0)


def write(archive: bytes, path: Path) -> None:
    """Never over another file; readable by its owner only. ``-`` is the standard output.

    Raises:
        CertificateError: there is one; OSError: it cannot be written.
    """
    if path == PIPE:
        sys.stdout.buffer.write(archive)
        sys.stdout.buffer.flush()
        return
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(archive)
    except FileExistsError:
        raise CertificateError(f"{path} is there already; delete it, or name another") from None
