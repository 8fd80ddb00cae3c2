"""Make the federation's certificates and keys: one CA, one server, one key pair a site.

    python -m superlink.provision --sites 20 --address superlink:9092
    python -m superlink.provision --help           show, renew, rotate, revoke, reset

Writes, under FEDERATION_DIR (default ``federation``); what is there and valid is kept:

    ca/ca.key                              signs the server certificate; for this command only
    public/{ca.crt,address,site-NN.pub}    no secrets: for submitting and registering
    public/revoked/site-NN-HASH.pub        keys that must not come back
    superlink/{ca.crt,server.crt,server.key,runtime.secret}    a server.crt of another CA is kept
    serverapp/{ca.crt,runtime.secret}      for the ServerApps' container
    prepared/                              supernode.prepare's list of what it made
    site-NN/{supernode.key,superlink-ca.crt,site.env,data/,state/}   all that site NN receives

Private keys have mode 0600. The SuperLink learns of keys from superlink.register only.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from cryptography import x509

from superlink import audit, site_keys, site_kit
from superlink.certificates import (
    SERVER_DAYS,
    CertificateError,
    Key,
    ca_certificate,
    canonical,
    issued_by,
    keys_of_their_owner,
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
from superlink.container_files import manifest_folder, runtime_secret
from superlink.show import show
from supernode.reach import AddressError, certificate_name, parsed

RENEW_BEFORE = timedelta(days=30)
RENEW_CA_BEFORE = timedelta(days=SERVER_DAYS) + RENEW_BEFORE  # no server's outlives it


class ProvisionError(Exception):
    """The folder cannot be provisioned as asked; the message is one line for the user."""


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except CertificateError as err:
        raise ProvisionError(str(err)) from None
    except OSError as err:
        raise ProvisionError(f"{err.filename}: {err.strerror}") from None


@_one_line()
def provision(federation: Path, sites: int, address: str, names: list[str]) -> list[str]:
    """Complete the folder ``federation`` and say what was made; revoked sites stay revoked.

    Args:
        sites: number of partitions; sites 00 .. sites-1.
        address: Fleet API as the sites reach it, host:port.
        names: host names and IP addresses in the server certificate, beside address's host.

    Raises:
        ProvisionError: the CA's key or certificate alone is missing, a file there is not what it
            should be, or one cannot be written.
    """
    try:
        host, _ = parsed(address)
    except AddressError as err:
        raise ProvisionError(f"--address: {err}") from None
    try:
        names = [certificate_name(name) for name in names]
    except AddressError as err:
        raise ProvisionError(f"--names: {err}") from None
    made: list[str] = []
    for torn in federation.glob("*/.*.part"):  # of a call that was killed; maybe half a key
        torn.unlink(missing_ok=True)
    ca_key, ca_cert = _authority(federation, made)
    wanted = list(dict.fromkeys([host, *names, "localhost", "127.0.0.1"]))
    _server(federation, ca_key, ca_cert, wanted, made)
    runtime_secret(federation, made)
    for number in range(sites):
        site_kit.complete(federation, number, sites, address, made)
    site_kit.note_address(federation, address)
    manifest_folder(federation)
    return made + keys_of_their_owner(federation)


def renew(federation: Path) -> list[str]:
    """A new server key and certificate for the same names, and a CA certificate if it is time.

    Raises:
        ProvisionError, CertificateError, OSError: there is none to renew; or as for provision.
    """
    names, made = _names(federation), list[str]()
    ca_key, ca_cert = _authority(federation, made)
    for folder in sorted(federation.glob("site-*")):
        site_kit.write_ca(folder / "superlink-ca.crt", federation, made)
    _server(federation, ca_key, ca_cert, names, made, new=True)
    return made


def reset(federation: Path) -> list[str]:
    """Everything anew: CA, server certificate, secret, a key pair for every site that has one.

    What was revoked stays so. To be called again if interrupted. Raises as renew does.
    """
    _names(federation)  # before anything is overwritten
    key, cert_file = new_key(), federation / "public" / "ca.crt"
    others = load_certificates(cert_file)[1] if cert_file.exists() else []
    write_key(federation / "ca" / "ca.key", key)
    write_certificate(cert_file, ca_certificate(key), *others)
    made = ["CA", *renew(federation)]
    runtime_secret(federation, made, new=True)
    for pub in sorted((federation / "public").glob("site-*.pub")):
        site_keys.renew(federation, pub.stem)
        made.append(pub.stem)
    return made


def _names(federation: Path) -> list[str]:
    cert_file = federation / "superlink" / "server.crt"
    if not cert_file.exists():
        raise ProvisionError(f"{cert_file} is missing; run superlink.provision first")
    return names_of(load_certificate(cert_file))


def _authority(federation: Path, made: list[str]) -> tuple[Key, x509.Certificate]:
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


def _server(
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


def main() -> int:
    args = _arguments()
    try:
        subject = getattr(args, "site", f"{args.sites} sites")
        with audit.command(args.federation, args.command or "provision", subject):
            print(f"provision: {_do(args)}")
    except (ProvisionError, audit.AuditError) as err:
        print(f"provision: {err}", file=sys.stderr)
        return 1
    return 0


@_one_line()
def _do(args: argparse.Namespace) -> str:
    """The command; what to tell the user."""
    then = "run superlink.register"
    if args.command == "show":
        return "\n  ".join([str(args.federation), *show(args.federation)])
    if args.command == "renew":
        renewed = ", ".join(renew(args.federation))
        return f"{renewed}; restart the SuperLink; registered sites are unaffected"
    if args.command == "reset":
        return (
            f"{', '.join(reset(args.federation))}; start the SuperLink with a new database, "
            f"{then}, then give each site its new kit, {args.federation}/site-NN"
        )
    if args.command == "revoke":
        site_keys.revoke(args.federation, args.site)
        return f"{args.site} is revoked; {then} to shut it out of a running SuperLink too"
    if args.command == "rotate":
        site_keys.rotate(args.federation, args.site)
        key_file = args.federation / args.site / "supernode.key"
        return (
            f"{args.site} has a new key, its old one is revoked; {then}, then give the site "
            f"{key_file} and restart its SuperNode"
        )
    names = [n.strip() for n in args.names.split(",") if n.strip()]
    made = provision(args.federation, args.sites, args.address, names)
    every = [f"site-{n:02d}" for n in range(args.sites)]
    out = [s for s in every if not (args.federation / "public" / f"{s}.pub").exists()]
    return (
        f"{', '.join(made) if made else 'everything was there'}; {args.sites} sites in "
        f"{args.federation}{', revoked: ' + ', '.join(out) if out else ''}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="superlink.provision", description=__doc__.split("\n")[0])
    env = os.environ.get
    parser.add_argument("--federation", type=Path, default=env("FEDERATION_DIR", "federation"))
    parser.add_argument("--sites", type=int, default=env("SITES", "20"))
    parser.add_argument(
        "--address",
        default=env("SUPERLINK_ADDRESS", "superlink:9092"),
        help="Fleet API as the sites reach it, host:port",
    )
    parser.add_argument(
        "--names",
        default=env("SUPERLINK_NAMES", ""),
        help="more names for the server certificate, comma-separated",
    )
    commands = parser.add_subparsers(dest="command", title="instead of completing the folder")
    for name, what in (
        ("show", "certificates and keys, and until when they are valid"),
        ("renew", "a new server key and certificate now"),
        ("rotate", "a new key pair for a site; its old key is revoked"),
        ("revoke", "a site must not come back"),
        ("reset", "everything anew, after somebody had what he should not: CA and all keys"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--federation", type=Path, default=argparse.SUPPRESS)
        if name in ("rotate", "revoke"):
            command.add_argument("site", help="site-07")
    args = parser.parse_args()
    if not 1 <= args.sites <= 100:
        parser.error(f"--sites {args.sites}: 1 to 100")
    if not re.fullmatch(r"site-\d\d+", getattr(args, "site", "site-00")):
        parser.error(f"{args.site}: a site is named like site-07")
    return args


if __name__ == "__main__":
    sys.exit(main())
