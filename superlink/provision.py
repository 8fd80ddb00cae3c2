"""Make the federation's certificates and keys: one CA, one server, one key pair a site.

    python -m superlink.provision --sites 20 --address superlink:9092
    python -m superlink.provision --help           kit, admit, show, renew, rotate, revoke, reset

Writes, under FEDERATION_DIR (default ``federation``); what is there and valid is kept:

    ca/ca.key                              signs the server certificate; for this command only
    public/{ca.crt,address,site-NN.pub}    no secrets: for submitting and registering
    public/revoked/site-NN-HASH.pub        keys that must not come back
    superlink/{ca.crt,server.crt,server.key,runtime.secret}    a server.crt of another CA is kept
    serverapp/{ca.crt,runtime.secret}      for the ServerApps' container
    prepared/                              supernode.prepare's list of what it made
    site-NN/{supernode.key,superlink-ca.crt,site.env,data/,state/}   all that site NN receives;
                                           of a key that was made there supernode.pub instead

Private keys have mode 0600. The SuperLink learns of keys from superlink.register only.
"""

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from superlink import audit, kit_archive, site_keys, site_kit
from superlink.authority import ProvisionError as ProvisionError
from superlink.authority import authority, names_in, server
from superlink.certificates import (
    CertificateError,
    ca_certificate,
    keys_of_their_owner,
    load_certificates,
    new_key,
    write_certificate,
    write_key,
)
from superlink.container_files import manifest_folder, runtime_secret
from superlink.half_done import unfinished
from superlink.show import show
from supernode.reach import AddressError, certificate_name, reached


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (CertificateError, AddressError) as err:
        raise ProvisionError(str(err)) from None
    except OSError as err:
        raise ProvisionError(f"{err.filename}: {err.strerror}") from None


def _refuse_half(federation: Path) -> None:
    """Raises ProvisionError: keys may still be missing there that would be taken for lost."""
    if said := unfinished(federation):
        raise ProvisionError(said)


@_one_line()
def provision(federation: Path, sites: int, address: str, names: list[str]) -> list[str]:
    """Complete the folder ``federation`` and say what was made; revoked sites stay revoked.

    Args:
        sites: number of partitions; sites 00 .. sites-1.
        address: Fleet API as the sites reach it, host:port.
        names: host names and IP addresses in the server certificate, beside address's host.

    Raises:
        ProvisionError: the CA's key or certificate alone is missing, a file there is not what it
            should be, or one cannot be written; or a restore was cut off there.
    """
    _refuse_half(federation)
    try:
        host, _ = reached(address)
    except AddressError as err:
        raise ProvisionError(f"--address: {err}") from None
    try:
        names = [certificate_name(name) for name in names]
    except AddressError as err:
        raise ProvisionError(f"--names: {err}") from None
    made: list[str] = []
    for torn in federation.glob("*/.*.part"):  # of a call that was killed; maybe half a key
        torn.unlink(missing_ok=True)
    ca_key, ca_cert = authority(federation, made)
    wanted = list(dict.fromkeys([host, *names, "localhost", "127.0.0.1"]))
    server(federation, ca_key, ca_cert, wanted, made)
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
    names, made = names_in(federation), list[str]()
    ca_key, ca_cert = authority(federation, made)
    for folder in sorted(federation.glob("site-*")):
        site_kit.write_ca(folder / "superlink-ca.crt", federation, made)
    server(federation, ca_key, ca_cert, names, made, new=True)
    return made


def reset(federation: Path) -> list[str]:
    """Everything anew: CA, server certificate, secret, a key pair for every site that has one.

    What was revoked stays so. To be called again if interrupted. Raises as renew does.
    """
    names_in(federation)  # before anything is overwritten
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


def main() -> int:
    args = _arguments()
    try:
        if args.command != "show":
            _refuse_half(args.federation)  # before it is recorded: the record may not be back
        subject = getattr(args, "site", f"{args.sites} sites")
        with audit.command(args.federation, args.command or "provision", subject):
            told = _do(args)
        # Where the standard output is the kit, it holds nothing else.
        to = sys.stderr if getattr(args, "output", None) == kit_archive.PIPE else sys.stdout
        print(f"provision: {told}", file=to)
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
    if args.command == "kit":
        archive = kit_archive.kit(args.federation, args.site, args.address, args.key_at_site)
        output = args.output or Path(f"{args.site}.tar.gz")
        kit_archive.write(archive, output)
        return (
            f"{output}: the kit of {args.site}; its SHA-256, to be told by another way: "
            f"{hashlib.sha256(archive).hexdigest()}"
        )
    if args.command == "admit":
        piped = args.key == kit_archive.PIPE
        given = sys.stdin.buffer.read() if piped else args.key.read_bytes()
        called = "the standard input" if piped else str(args.key)
        site_keys.admit(args.federation, args.site, given, called)
        pub = site_keys.public_file(args.federation, args.site)
        return f"{args.site} has the key {site_keys.fingerprint(pub)}; {then}"
    if args.command == "revoke":
        site_keys.revoke(args.federation, args.site)
        return f"{args.site} is revoked; {then} to shut it out of a running SuperLink too"
    if args.command == "rotate":
        site_keys.rotate(args.federation, args.site)
        key_file = args.federation / args.site / "supernode.key"
        return (
            f"{args.site} has a new key, its old one is revoked; {then}, then give the site "
            f"{key_file}, which its SuperNode takes at its next start"
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
        ("kit", "all that a site on another host needs, as site-NN.tar.gz"),
        ("admit", "a site's public key, of a key pair that was made there"),
        ("show", "certificates and keys, and until when they are valid"),
        ("renew", "a new server key and certificate now"),
        ("rotate", "a new key pair for a site; its old key is revoked"),
        ("revoke", "a site must not come back"),
        ("reset", "everything anew, after somebody had what he should not: CA and all keys"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("--federation", type=Path, default=argparse.SUPPRESS)
        if name in ("kit", "admit", "rotate", "revoke"):
            command.add_argument("site", help="site-07")
        if name == "admit":
            command.add_argument("key", type=Path, help="FILE, as supernode.keygen prints it, or -")
        if name == "kit":
            command.add_argument(
                "--address", required=True, help="host:port, as this site reaches it"
            )
            command.add_argument("--key-at-site", action="store_true", help="it is made there")
            command.add_argument("--output", type=Path, help="FILE, or - (default: site-NN.tar.gz)")
    args = parser.parse_args()
    if not 1 <= args.sites <= 100:
        parser.error(f"--sites {args.sites}: 1 to 100")
    if not re.fullmatch(r"site-\d\d+", getattr(args, "site", "site-00")):
        parser.error(f"{args.site}: a site is named like site-07")
    return args


if __name__ == "__main__":
    sys.exit(main())
