"""The federation's CA and the SuperLink's certificate: made once, kept, renewed when it is time."""

from datetime import timedelta
from pathlib import Path

from cryptography import x509

from superlink import site_kit
from superlink.certificates import (
    SERVER_DAYS,
    Key,
    ca_certificate,
    canonical,
    issued_by,
    load_certificate,
    load_certificates,
    load_key,
    made_by_us,
    names_of,
    new_key,
    server_certificate,
    time_left,
    write_certificate,
    write_key,
)

RENEW_BEFORE = timedelta(days=30)
RENEW_CA_BEFORE = timedelta(days=SERVER_DAYS) + RENEW_BEFORE  # no server's outlives it


class ProvisionError(Exception):
    """The folder cannot be provisioned as asked; the message is one line for the user."""


def names_in(federation: Path) -> list[str]:
    cert_file = federation / "superlink" / "server.crt"
    if not cert_file.exists():
        raise ProvisionError(f"{cert_file} is missing; run superlink.provision first")
    return names_of(load_certificate(cert_file))


def authority(federation: Path, made: list[str]) -> tuple[Key, x509.Certificate]:
    key_file, cert_file = federation / "ca" / "ca.key", federation / "public" / "ca.crt"
    # The key comes first: alone, it is of a first call that was cut off. With anything that is made
    # later, the certificate is lost.
    later = ("superlink/*.*", "site-*/*.crt", "site-*/*.key", "public/**/*.pub", "public/ca.crt")
    begun = any(True for pattern in later for _ in federation.glob(pattern))
    if key_file.exists() != cert_file.exists() and begun:
        have, lost = (key_file, cert_file) if key_file.exists() else (cert_file, key_file)
        raise ProvisionError(
            f"{have} is there but {lost} is not: put it back, or delete {federation} to start "
            "anew (every site then needs a new kit)"
        )
    others: list[x509.Certificate] = []
    if cert_file.exists():
        key, cert = load_key(key_file), load_certificate(cert_file)
        others = load_certificates(cert_file)[1]
        if key.public_key() != cert.public_key():
            raise ProvisionError(
                f"{key_file} is not the key of {cert_file}: put the right one back, or, after a "
                "reset that was cut off, run superlink.provision reset"
            )
        if time_left(cert) > RENEW_CA_BEFORE:
            return key, cert
        made.append(
            f"CA certificate (same key; sites need the new superlink-ca.crt before "
            f"{cert.not_valid_after_utc:%Y-%m-%d})"
        )
    else:
        key = load_key(key_file) if key_file.exists() else new_key()
        made.append("CA")
    cert = ca_certificate(key)
    write_key(key_file, key)
    write_certificate(cert_file, cert, *others)
    return key, cert


def server(
    federation: Path,
    ca_key: Key,
    ca_cert: x509.Certificate,
    names: list[str],
    made: list[str],
    new: bool = False,
) -> None:
    folder = federation / "superlink"
    key_file, cert_file = folder / "server.key", folder / "server.crt"
    for user in ("superlink", "serverapp"):
        site_kit.write_ca(federation / user / "ca.crt", federation, made)
    if cert_file.exists() and not made_by_us(old := load_certificate(cert_file)):
        made.append(f"{cert_file} kept: {site_kit.of_another_ca(old, names)}")
        return
    if key_file.exists() and cert_file.exists() and not new:
        old = load_certificate(cert_file)
        wanted = {canonical(n) for n in names}
        lasts = time_left(old) > RENEW_BEFORE
        of_key = old.public_key() == load_key(key_file).public_key()
        if lasts and of_key and set(names_of(old)) >= wanted and issued_by(old, ca_cert):
            return
    key = load_key(key_file) if key_file.exists() and not new else new_key()
    cert = server_certificate(key, ca_key, ca_cert, names)
    write_key(key_file, key)
    write_certificate(cert_file, cert)
    made.append(f"server certificate for {', '.join(names)}")
