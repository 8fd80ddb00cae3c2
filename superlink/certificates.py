"""The federation's X.509 certificates and private keys, as files. Private keys have mode 0600."""

import ipaddress
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS, SERVER_DAYS = 3650, 365
OUR_CA = "fedllm-medical CA"
Key = ec.EllipticCurvePrivateKey


class CertificateError(Exception):
    """A key or certificate file cannot be used; the message is one line for the user."""


def new_key() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def ca_certificate(key: Key) -> x509.Certificate:
    """Self-signed. A later one of the same key is as good: it vouches for the same servers."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, OUR_CA)])
    return (
        _certificate(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def server_certificate(
    key: Key, ca_key: Key, ca_cert: x509.Certificate, names: list[str]
) -> x509.Certificate:
    """For the host names and IP addresses ``names``, of which there is at least one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    return (
        _certificate(subject, ca_cert.subject, key.public_key(), SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
        .add_extension(  # RFC 5280; Python 3.13 refuses a certificate without it
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )


def names_of(certificate: x509.Certificate) -> list[str]:
    """Those that it is for; none where it has a common name only, which nobody looks at."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(n.value) for n in names]


def is_for(certificate: x509.Certificate, name: str) -> bool:
    """Whether a client that calls this host ``name`` takes it, by a * in front as well."""
    names = [n.casefold() for n in names_of(certificate)]
    wanted = canonical(name).casefold()
    return wanted in names or f"*.{wanted.partition('.')[2]}" in names


def canonical(name: str) -> str:
    """``name`` as names_of gives it back."""
    return str(_general(name).value)


def time_left(certificate: x509.Certificate) -> timedelta:
    return certificate.not_valid_after_utc - datetime.now(UTC)


def issued_by(certificate: x509.Certificate, ca_cert: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca_cert)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def load_certificate(path: Path) -> x509.Certificate:
    """Our CA's, where there are several; else the first, which in a chain is the server's.

    Raises:
        CertificateError: not a certificate; OSError: cannot be read.
    """
    ours, others = load_certificates(path)
    return (ours or others)[0]


def load_certificates(path: Path) -> tuple[list[x509.Certificate], list[x509.Certificate]]:
    """The file's certificates: those of a CA that ``provision`` has made, and others.

    Raises:
        CertificateError: not certificates; OSError: cannot be read.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError:
        raise CertificateError(
            f"{path} is not a PEM certificate: put the right file back from a backup"
        ) from None
    ours = [certificate for certificate in found if _common_name(certificate.subject) == OUR_CA]
    return ours, [certificate for certificate in found if certificate not in ours]


def made_by_us(certificate: x509.Certificate) -> bool:
    """Whether it was issued by a CA that ``provision`` has made, this one or one before it."""
    return _common_name(certificate.issuer) == OUR_CA


def _common_name(name: x509.Name) -> str:
    return "".join(str(part.value) for part in name.get_attributes_for_oid(NameOID.COMMON_NAME))


def load_key(path: Path) -> Key:
    """From PKCS#8 or OpenSSH.

    Raises:
        CertificateError: not an EC private key; OSError: cannot be read.
    """
    content = path.read_bytes()
    openssh = content.startswith(b"-----BEGIN OPENSSH")
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        key = load(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(
            f"{path} is not an elliptic-curve private key: put the right file back from a backup"
        )
    return key


def write_certificate(path: Path, *certificates: x509.Certificate) -> None:
    pem = serialization.Encoding.PEM
    write(path, b"".join(certificate.public_bytes(pem) for certificate in certificates))


def write_key(path: Path, key: Key, openssh: bool = False) -> None:
    form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    write(path, pem, 0o600)


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write atomically; the file has its mode before it has its content."""
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the name without the content
    part.replace(path)


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


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def keys_of_their_owner(federation: Path) -> list[str]:
    """Mode 0600 for every private key, which one from a backup may have lost; says of which."""
    open_keys = [
        key
        for key in sorted(federation.glob("*/*.key"))
        if stat.S_IMODE(key.stat().st_mode) & 0o077
    ]
    for key in open_keys:
        key.chmod(0o600)
    return [f"{key} readable by its owner only" for key in open_keys]
