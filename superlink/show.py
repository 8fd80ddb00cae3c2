"""What is in the federation's folder, for people: superlink.provision show."""

from pathlib import Path

from superlink import site_keys
from superlink.certificates import load_certificate, names_of, time_left


def show(federation: Path) -> list[str]:
    """One line a certificate, one a site's key.

    Raises:
        CertificateError, OSError: a file is missing or not what it should be.
    """
    lines = []
    for what, file in (("CA", "public/ca.crt"), ("server", "superlink/server.crt")):
        cert = load_certificate(federation / file)
        names = ", ".join(names_of(cert)) if what == "server" else cert.subject.rfc4514_string()
        days = time_left(cert).days
        left = f"{days} days left" if days >= 0 else "EXPIRED: run superlink.provision renew"
        lines.append(f"{what:7} {names}; ends {cert.not_valid_after_utc:%Y-%m-%d}, {left}")
    retired = site_keys.retired_files(federation)
    public = (federation / "public").glob("site-*.pub")
    for path in sorted([*public, *retired], key=lambda p: p.name):
        mark = " revoked" if path in retired else ""
        lines.append(f"{path.stem[:7]} {site_keys.fingerprint(path)}{mark}")
    return lines
