"""Keys and certificates: made once, kept, renewed when they must be, and good for TLS."""

import ipaddress
import os
import shutil
import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

import superlink.certificates
from superlink.control import public_keys
from superlink.provision import ProvisionError, main, provision

ADDRESS = "superlink.example:9092"
SECRETS = {"ca.key", "server.key", "supernode.key"}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in files(folder)}


def ca_of(federation: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((federation / "public" / "ca.crt").read_bytes())


def server_of(federation: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((federation / "superlink" / "server.crt").read_bytes())


def names_of(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {
        *names.get_values_for_type(x509.DNSName),
        *(str(ip) for ip in names.get_values_for_type(x509.IPAddress)),
    }


def subject_of(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def handshake(federation: Path, name: str) -> None:
    """A TLS handshake in memory, with the files as SuperLink and SuperNode use them."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(
        federation / "superlink" / "server.crt", federation / "superlink" / "server.key"
    )
    client_context = ssl.create_default_context(
        cafile=str(federation / "site-00" / "superlink-ca.crt")
    )
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.getpeercert()


def test_a_second_call_makes_nothing_and_touches_no_file(tmp_path: Path) -> None:
    assert provision(tmp_path, 3, ADDRESS, ["10.0.0.5"])
    before = snapshot(tmp_path)
    assert provision(tmp_path, 3, ADDRESS, ["10.0.0.5"]) == []
    assert snapshot(tmp_path) == before


def test_more_sites_later_add_only_those(tmp_path: Path) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    before = snapshot(tmp_path)
    assert provision(tmp_path, 4, ADDRESS, []) == ["site-02", "site-03"]
    after = snapshot(tmp_path)
    changed = {p.relative_to(tmp_path).as_posix() for p in before if after[p] != before[p]}
    # The number of partitions is the federation's; keys and certificates stay.
    assert changed == {"site-00/site.env", "site-01/site.env"}
    for number in range(4):
        lines = (tmp_path / f"site-{number:02d}" / "site.env").read_text().splitlines()
        assert set(lines) == {
            f"SUPERLINK={ADDRESS}",
            f"PARTITION_ID={number}",
            "NUM_PARTITIONS=4",
        }


def test_private_keys_are_for_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        provision(tmp_path, 2, ADDRESS, [])
    finally:
        os.umask(old)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in files(tmp_path)}
    secret = {p for p in modes if b"PRIVATE KEY" in p.read_bytes()}
    assert {p.name for p in secret} == SECRETS
    assert {modes[p] for p in secret} == {0o600}
    assert all(mode & 0o022 == 0 for mode in modes.values()), "writable by others"


def test_a_sites_folder_holds_its_own_key_and_nothing_of_anybody_else(tmp_path: Path) -> None:
    provision(tmp_path, 3, ADDRESS, [])
    keys = public_keys(tmp_path / "public")
    assert sorted(keys) == ["site-00", "site-01", "site-02"]
    assert len(set(keys.values())) == 3
    for name in keys:
        site = tmp_path / name
        assert {p.name for p in site.iterdir()} == {
            "supernode.key",
            "superlink-ca.crt",
            "site.env",
            "data",
            "state",
        }
        key = serialization.load_ssh_private_key((site / "supernode.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        public = (tmp_path / "public" / f"{name}.pub").read_bytes()
        assert public.startswith(key.public_key().public_bytes(*form))
        ca = (tmp_path / "public" / "ca.crt").read_bytes()
        assert (site / "superlink-ca.crt").read_bytes() == ca
    assert not {p.name for p in files(tmp_path / "public")} & SECRETS


@pytest.mark.parametrize("name", ["superlink.example", "10.0.0.5", "localhost", "127.0.0.1"])
def test_the_server_certificate_verifies_against_the_ca_for_its_names(
    tmp_path: Path, name: str
) -> None:
    provision(tmp_path, 1, ADDRESS, ["10.0.0.5"])
    handshake(tmp_path, name)
    # Stricter, as Python 3.13 is by default: RFC 5280 to the letter.
    verifier = (
        PolicyBuilder().store(Store([ca_of(tmp_path)])).build_server_verifier(subject_of(name))
    )
    assert verifier.verify(server_of(tmp_path), [])


@pytest.mark.parametrize("name", ["other.example", "example", "10.0.0.6", "www.superlink.example"])
def test_the_server_certificate_does_not_verify_for_another_name(tmp_path: Path, name: str) -> None:
    provision(tmp_path, 1, ADDRESS, ["10.0.0.5"])
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tmp_path, name)
    verifier = (
        PolicyBuilder().store(Store([ca_of(tmp_path)])).build_server_verifier(subject_of(name))
    )
    with pytest.raises(VerificationError, match="subjectAltName"):
        verifier.verify(server_of(tmp_path), [])


def test_another_federations_ca_does_not_vouch_for_the_server(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        provision(tmp_path / name, 1, ADDRESS, [])
    shutil.copy(
        tmp_path / "theirs" / "public" / "ca.crt",
        tmp_path / "ours" / "site-00" / "superlink-ca.crt",
    )
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours", "superlink.example")


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("superlink:9092", "superlink"),
        ("10.1.2.3:9092", "10.1.2.3"),
        ("[2001:db8::5]:9092", "2001:db8::5"),
    ],
)
def test_the_host_of_the_address_is_in_the_certificate(
    tmp_path: Path, address: str, host: str
) -> None:
    provision(tmp_path, 1, address, [])
    assert names_of(server_of(tmp_path)) == {host, "localhost", "127.0.0.1"}
    handshake(tmp_path, host)


def test_a_new_address_gives_a_new_certificate_for_the_same_key(tmp_path: Path) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    old, key = server_of(tmp_path), (tmp_path / "superlink" / "server.key").read_bytes()
    made = provision(tmp_path, 1, "elsewhere.example:9092", [])
    new = server_of(tmp_path)
    assert len(made) == 1
    assert "elsewhere.example" in made[0]
    assert new.serial_number != old.serial_number
    assert new.public_key() == old.public_key()
    assert (tmp_path / "superlink" / "server.key").read_bytes() == key
    handshake(tmp_path, "elsewhere.example")
    env = (tmp_path / "site-00" / "site.env").read_text()
    assert "SUPERLINK=elsewhere.example:9092\n" in env


def test_a_certificate_that_soon_ends_is_renewed_and_one_that_lasts_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink.certificates, "SERVER_DAYS", 20)
    provision(tmp_path, 1, ADDRESS, [])
    short = server_of(tmp_path)
    monkeypatch.undo()
    assert len(provision(tmp_path, 1, ADDRESS, [])) == 1
    renewed = server_of(tmp_path)
    assert renewed.not_valid_after_utc - datetime.now(UTC) > timedelta(days=300)
    assert renewed.public_key() == short.public_key()
    assert provision(tmp_path, 1, ADDRESS, []) == []


@pytest.mark.parametrize("lost", ["ca/ca.key", "public/ca.crt"])
def test_half_a_ca_is_an_error_that_names_what_is_lost_and_changes_nothing(
    tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    (tmp_path / lost).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(ProvisionError, match=lost):
        provision(tmp_path, 2, ADDRESS, [])
    argv = ["superlink.provision", "--federation", str(tmp_path), "--sites", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert snapshot(tmp_path) == before


def test_a_new_ca_means_a_new_server_certificate(tmp_path: Path) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    for lost in ("ca/ca.key", "public/ca.crt"):
        (tmp_path / lost).unlink()
    provision(tmp_path, 1, ADDRESS, [])
    server_of(tmp_path).verify_directly_issued_by(ca_of(tmp_path))
    handshake(tmp_path, "superlink.example")


@pytest.mark.parametrize("lost", ["server.key", "server.crt", "ca.crt"])
def test_a_lost_file_of_the_server_is_made_again(tmp_path: Path, lost: str) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    (tmp_path / "superlink" / lost).unlink()
    provision(tmp_path, 1, ADDRESS, [])
    handshake(tmp_path, "superlink.example")


def test_a_certificate_that_is_not_of_the_servers_key_is_made_again(tmp_path: Path) -> None:
    # As an interruption between writing a new key and its certificate leaves it.
    provision(tmp_path, 1, ADDRESS, [])
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "superlink" / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    provision(tmp_path, 1, ADDRESS, [])
    handshake(tmp_path, "superlink.example")


def test_a_lost_public_key_is_derived_again_and_a_lost_private_key_is_a_new_one(
    tmp_path: Path,
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    before = public_keys(tmp_path / "public")
    (tmp_path / "public" / "site-00.pub").unlink()
    (tmp_path / "site-01" / "supernode.key").unlink()
    assert provision(tmp_path, 2, ADDRESS, []) == ["site-01"]
    after = public_keys(tmp_path / "public")
    assert after["site-00"] == before["site-00"]
    assert after["site-01"] != before["site-01"]


def test_the_ca_signs_certificates_and_the_server_cannot(tmp_path: Path) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    for certificate, is_ca in ((ca_of(tmp_path), True), (server_of(tmp_path), False)):
        extensions = certificate.extensions
        assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is is_ca
        assert extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is is_ca
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
        assert certificate.not_valid_before_utc < datetime.now(UTC)


def test_a_folder_that_cannot_be_written_is_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        sys, "argv", ["superlink.provision", "--federation", str(tmp_path / "file" / "x")]
    )
    assert main() == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(tmp_path / "file") in lines[0]


@pytest.mark.parametrize("sites", ["0", "101", "-1", "many"])
def test_an_impossible_number_of_sites_is_refused(
    tmp_path: Path, sites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["superlink.provision", "--federation", str(tmp_path), "--sites", sites]
    )
    with pytest.raises(SystemExit):
        main()
    assert not files(tmp_path)
