"""Make the federation's certificates and keys: one CA, one server, one key pair a site.

    python -m superlink.provision --sites 20 --address superlink:9092

Writes, under FEDERATION_DIR (default ``federation``); what is there and valid is kept:

    ca/ca.key                              signs the server certificate; for this command only
    public/ca.crt, public/site-NN.pub      no secrets: for submitting and registering
    superlink/{ca.crt,server.crt,server.key}
    site-NN/{supernode.key,superlink-ca.crt,site.env,data/,state/}   all that site NN receives

Private keys have mode 0600.
"""

import argparse
import ipaddress
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS, SERVER_DAYS = 3650, 365
RENEW_BEFORE = timedelta(days=30)
Key = ec.EllipticCurvePrivateKey


class ProvisionError(Exception):
    """The folder cannot be provisioned as asked; the message is one line for the user."""


def provision(federation: Path, sites: int, address: str, names: list[str]) -> list[str]:
    """Complete the folder ``federation`` and say what was made.

    Args:
        sites: number of partitions; sites 00 .. sites-1.
        address: Fleet API as the sites reach it, host:port.
        names: host names and IP addresses in the server certificate, beside address's host.

    Raises:
        ProvisionError: the CA's key or certificate alone is missing, or a file cannot be written.
    """
    made: list[str] = []
    try:
        ca_key, ca_cert = _authority(federation, made)
        host = address.rsplit(":", 1)[0].strip("[]")  # [::1]:9092
        wanted = list(dict.fromkeys([host, *names, "localhost", "127.0.0.1"]))
        _server(federation / "superlink", ca_key, ca_cert, wanted, made)
        for number in range(sites):
            _site(federation, number, sites, address, ca_cert, made)
    except OSError as err:
        raise ProvisionError(f"{err.filename}: {err.strerror}") from None
    return made


def _authority(federation: Path, made: list[str]) -> tuple[Key, x509.Certificate]:
    key_file, cert_file = federation / "ca" / "ca.key", federation / "public" / "ca.crt"
    if key_file.exists() and cert_file.exists():
        return _load_key(key_file), x509.load_pem_x509_certificate(cert_file.read_bytes())
    if key_file.exists() or cert_file.exists():
        have, lost = (key_file, cert_file) if key_file.exists() else (cert_file, key_file)
        raise ProvisionError(
            f"{have} is there but {lost} is not: put it back, or delete {federation} to start "
            "anew (every site then needs a new kit)"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedllm-medical CA")])
    cert = (
        _certificate(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(key_file, key)
    _write(cert_file, cert.public_bytes(serialization.Encoding.PEM))
    made.append("CA")
    return key, cert


def _server(
    folder: Path, ca_key: Key, ca_cert: x509.Certificate, names: list[str], made: list[str]
) -> None:
    key_file, cert_file = folder / "server.key", folder / "server.crt"
    ca_pem = ca_cert.public_bytes(serialization.Encoding.PEM)
    _write(folder / "ca.crt", ca_pem)
    alternatives = x509.SubjectAlternativeName([_general_name(n) for n in names])
    if key_file.exists() and cert_file.exists():
        old = x509.load_pem_x509_certificate(cert_file.read_bytes())
        has = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        lasts = old.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE
        of_key = old.public_key() == _load_key(key_file).public_key()
        if lasts and of_key and set(has) >= set(alternatives) and _issued_by(old, ca_cert):
            return
    key = _load_key(key_file) if key_file.exists() else ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    cert = (
        _certificate(subject, ca_cert.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(  # RFC 5280; Python 3.13 refuses a certificate without it
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    _write_key(key_file, key)
    _write(cert_file, cert.public_bytes(serialization.Encoding.PEM))
    made.append(f"server certificate for {', '.join(names)}")


def _issued_by(certificate: x509.Certificate, ca_cert: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca_cert)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _site(
    federation: Path,
    number: int,
    sites: int,
    address: str,
    ca_cert: x509.Certificate,
    made: list[str],
) -> None:
    name = f"site-{number:02d}"
    folder = federation / name
    for part in ("data", "state"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    key_file = folder / "supernode.key"
    if key_file.exists():
        key = serialization.load_ssh_private_key(key_file.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101  (we wrote it)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        _write_key(key_file, key, serialization.PrivateFormat.OpenSSH)
        made.append(name)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write(federation / "public" / f"{name}.pub", public + f" {name}\n".encode())
    _write(folder / "superlink-ca.crt", ca_cert.public_bytes(serialization.Encoding.PEM))
    settings = f"SUPERLINK={address}\nPARTITION_ID={number}\nNUM_PARTITIONS={sites}\n"
    _write(folder / "site.env", settings.encode())


def _certificate(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # sites' clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(
    digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _load_key(path: Path) -> Key:
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101  (we wrote it)
    return key


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write atomically; the file has its mode before it has its content."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    part.replace(path)


def _write_key(
    path: Path,
    key: Key,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    _write(path, pem, 0o600)


def main() -> int:
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
    args = parser.parse_args()
    if not 1 <= args.sites <= 100:
        parser.error(f"--sites {args.sites}: 1 to 100")
    names = [n.strip() for n in args.names.split(",") if n.strip()]
    try:
        made = provision(args.federation, args.sites, args.address, names)
    except ProvisionError as err:
        print(f"provision: {err}", file=sys.stderr)
        return 1
    print(
        f"provision: {', '.join(made) if made else 'everything was there'}; "
        f"{args.sites} sites in {args.federation}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
