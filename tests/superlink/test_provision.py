"""Keys and certificates: made once, kept, renewed when they must be, and good for TLS."""

import ipaddress
import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

import superlink.certificates
import superlink.provision
import superlink.show
from superlink import site_keys
from superlink.control import public_keys
from superlink.provision import ProvisionError, main, provision
from supernode.partitions import Split, prepare_data
from tests.killed import kills

ADDRESS = "superlink.example:9092"
SECRETS = {"ca.key", "server.key", "supernode.key"}


def files(folder: Path) -> list[Path]:
    """All but the record of what was done."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "audit.jsonl")


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


def test_a_key_that_came_back_from_a_backup_is_for_its_owner_only_again(tmp_path: Path) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    key = tmp_path / "site-01" / "supernode.key"
    key.chmod(0o644)
    assert provision(tmp_path, 2, ADDRESS, []) == [f"{key} readable by its owner only"]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert provision(tmp_path, 2, ADDRESS, []) == []


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


def run(
    federation: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: str,
    sites: int = 2,
) -> tuple[int, list[str]]:
    """The command's exit code and lines."""
    options = ["--federation", str(federation), "--sites", str(sites), "--address", ADDRESS]
    monkeypatch.setattr(sys, "argv", ["superlink.provision", *options, *words])
    code = main()
    printed = capsys.readouterr()
    return code, (printed.out + printed.err).splitlines()


def test_show_says_what_there_is_until_when_and_what_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(tmp_path, 2, ADDRESS, ["10.0.0.5"])
    site_keys.revoke(tmp_path, "site-00")
    site_keys.rotate(tmp_path, "site-01")
    before = snapshot(tmp_path)
    code, lines = run(tmp_path, monkeypatch, capsys, "show")
    assert code == 0
    assert snapshot(tmp_path) == before
    ends = f"{server_of(tmp_path).not_valid_after_utc:%Y-%m-%d}"
    names = "superlink.example, 10.0.0.5, localhost, 127.0.0.1"
    assert lines[2].split(maxsplit=1) == ["server", f"{names}; ends {ends}, 364 days left"]
    assert lines[1].split()[:2] == ["CA", "CN=fedllm-medical"]
    marks = [(line.split()[0], line.endswith(" revoked")) for line in lines[3:]]
    assert sorted(marks) == [("site-00", True), ("site-01", False), ("site-01", True)]


def test_a_sites_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    pub = tmp_path / "public" / "site-00.pub"
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("no ssh-keygen here")
    listed = subprocess.run(
        [keygen, "-lf", str(pub)], capture_output=True, text=True, check=True
    ).stdout
    assert listed.split()[1] == site_keys.fingerprint(pub)


def test_show_of_a_certificate_that_has_ended_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    later = server_of(tmp_path).not_valid_after_utc - datetime.now(UTC) + timedelta(hours=1)
    left = superlink.certificates.time_left
    monkeypatch.setattr(superlink.show, "time_left", lambda cert: left(cert) - later)
    _, lines = run(tmp_path, monkeypatch, capsys, "show")
    assert lines[2].endswith("EXPIRED: run superlink.provision renew")
    assert "days left" in lines[1]


def test_renew_makes_a_new_server_certificate_and_leaves_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(tmp_path, 2, ADDRESS, ["10.0.0.5"])
    before, old = snapshot(tmp_path), server_of(tmp_path)
    code, lines = run(tmp_path, monkeypatch, capsys, "renew")
    assert (code, len(lines)) == (0, 1)
    assert "restart the SuperLink" in lines[0]
    after = snapshot(tmp_path)
    changed = {p.relative_to(tmp_path).as_posix() for p in before if after[p] != before[p]}
    assert changed == {"superlink/server.crt", "superlink/server.key"}
    new = server_of(tmp_path)
    assert names_of(new) == names_of(old)
    assert new.public_key() != old.public_key()
    handshake(tmp_path, "superlink.example")
    assert provision(tmp_path, 2, ADDRESS, ["10.0.0.5"]) == []


def test_reset_leaves_nothing_that_was_good_before_and_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(tmp_path, 3, ADDRESS, ["10.0.0.5"])
    run(tmp_path, monkeypatch, capsys, "revoke", "site-02", sites=3)
    old_keys, old_ca, before = public_keys(tmp_path / "public"), ca_of(tmp_path), snapshot(tmp_path)
    with monkeypatch.context() as cut:
        cut.setattr(superlink.provision, "ca_certificate", lambda key: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # the new CA's key is there, its certificate not
            superlink.provision.reset(tmp_path)
    code, lines = run(tmp_path, monkeypatch, capsys, "reset", sites=3)
    assert (code, len(lines)) == (0, 1)
    for words in ("CA, server certificate", "site-00, site-01;", "new database", "its new kit"):
        assert words in lines[0]
    assert "site-02" not in lines[0]
    after = snapshot(tmp_path)
    same = {p.name for p in before if p in after and after[p][0] == before[p][0]}
    assert same - {p.name for p in files(tmp_path / "site-02")} <= {"site.env", "address"} | {
        p.name for p in files(tmp_path / "public" / "revoked")
    }
    keys, revoked = public_keys(tmp_path / "public"), public_keys(tmp_path / "public" / "revoked")
    assert set(keys) == {"site-00", "site-01"}
    assert not set(keys.values()) & set(old_keys.values())
    assert set(old_keys.values()) <= set(revoked.values())
    assert len(revoked) == 3
    assert ca_of(tmp_path).public_key() != old_ca.public_key()
    handshake(tmp_path, "10.0.0.5")
    (tmp_path / "site-00" / "superlink-ca.crt").write_bytes(
        old_ca.public_bytes(serialization.Encoding.PEM)
    )
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, "10.0.0.5")


def test_reset_of_nothing_is_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(tmp_path, monkeypatch, capsys, "reset")
    assert (code, len(lines)) == (1, 1)
    assert "run superlink.provision first" in lines[0]


def test_the_superlink_and_the_serverapps_share_a_secret_and_no_key(tmp_path: Path) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    theirs = {p.name: p for p in files(tmp_path / "serverapp")}
    assert set(theirs) == {"ca.crt", "runtime.secret"}
    own = tmp_path / "superlink" / "runtime.secret"
    assert own.read_bytes() == theirs["runtime.secret"].read_bytes()
    assert len(own.read_bytes()) == 64
    # The ServerApps' container has another user of the same group.
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (own, theirs["runtime.secret"])]
    assert modes == [0o600, 0o640]
    provision(tmp_path / "other", 1, ADDRESS, [])
    other = tmp_path / "other" / "superlink" / "runtime.secret"
    assert other.read_bytes() != own.read_bytes()


def test_a_folder_of_an_older_version_keeps_its_prepared_rows(tmp_path: Path) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    source = tmp_path / "source.jsonl"
    rows = [{"instruction": "", "input": f"Q{n}", "output": "A"} for n in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = prepare_data(tmp_path, Split(str(source), 2))
    (tmp_path / "prepared" / "data.json").rename(tmp_path / "data.json")  # where it was once
    assert provision(tmp_path, 2, ADDRESS, []) == []
    assert not (tmp_path / "data.json").exists()
    assert prepare_data(tmp_path, Split(str(source), 2)) == lines


def test_a_ca_that_would_end_before_its_servers_is_renewed_for_the_same_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink.certificates, "CA_DAYS", 300)
    provision(tmp_path, 1, ADDRESS, [])
    monkeypatch.undo()
    old, old_server = ca_of(tmp_path), server_of(tmp_path)
    made = superlink.provision.renew(tmp_path)
    assert made[0].startswith("CA certificate (same key")
    new = ca_of(tmp_path)
    assert new.not_valid_after_utc > server_of(tmp_path).not_valid_after_utc
    assert (new.subject, new.public_key()) == (old.subject, old.public_key())
    handshake(tmp_path, "superlink.example")  # the kit in the folder has the new one
    for ca, server in ((old, server_of(tmp_path)), (new, old_server)):  # a kit that was sent out
        server.verify_directly_issued_by(ca)
    kit = tmp_path / "site-00" / "superlink-ca.crt"
    kit.write_bytes(old.public_bytes(serialization.Encoding.PEM))
    handshake(tmp_path, "superlink.example")
    assert provision(tmp_path, 1, ADDRESS, []) == []
    assert x509.load_pem_x509_certificate(kit.read_bytes()) == new


def test_renew_without_a_certificate_is_one_error_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(tmp_path, monkeypatch, capsys, "renew")
    assert code == 1
    assert len(lines) == 1
    assert "server.crt is missing" in lines[0]
    assert not files(tmp_path)


def test_a_revoked_site_is_not_made_again_whatever_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    key = public_keys(tmp_path / "public")["site-01"]
    code, lines = run(tmp_path, monkeypatch, capsys, "revoke", "site-01")
    assert (code, len(lines)) == (0, 1)
    assert list(public_keys(tmp_path / "public")) == ["site-00"]
    assert list(public_keys(tmp_path / "public" / "revoked").values()) == [key]
    for lost in (None, "supernode.key", "superlink-ca.crt"):
        if lost:
            (tmp_path / "site-01" / lost).unlink()
        code, lines = run(tmp_path, monkeypatch, capsys)
        assert code == 0
        assert lines == [
            f"provision: everything was there; 2 sites in {tmp_path}, revoked: site-01"
        ]
    assert not (tmp_path / "site-01" / "supernode.key").exists()
    code, lines = run(tmp_path, monkeypatch, capsys, "revoke", "site-01")
    assert (code, len(lines)) == (1, 1)
    assert "site-01 is revoked already" in lines[0]


@pytest.mark.parametrize("revoked_before", [False, True])
def test_rotate_gives_a_new_key_and_revokes_the_old(
    tmp_path: Path,
    revoked_before: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    old = public_keys(tmp_path / "public")
    if revoked_before:
        site_keys.revoke(tmp_path, "site-01")
    code, lines = run(tmp_path, monkeypatch, capsys, "rotate", "site-01")
    assert (code, len(lines)) == (0, 1)
    new = public_keys(tmp_path / "public")
    assert new["site-00"] == old["site-00"]
    assert new["site-01"] != old["site-01"]
    assert list(public_keys(tmp_path / "public" / "revoked").values()) == [old["site-01"]]
    private = tmp_path / "site-01" / "supernode.key"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert (
        public_key_to_bytes(superlink.certificates.load_key(private).public_key())
        == (new["site-01"])
    )
    assert provision(tmp_path, 2, ADDRESS, []) == []


def test_a_lost_private_key_revokes_its_public_key(tmp_path: Path) -> None:
    # It may be in somebody's hands; and the SuperLink would go on letting it in.
    provision(tmp_path, 1, ADDRESS, [])
    old = public_keys(tmp_path / "public")["site-00"]
    (tmp_path / "site-00" / "supernode.key").unlink()
    provision(tmp_path, 1, ADDRESS, [])
    assert list(public_keys(tmp_path / "public" / "revoked").values()) == [old]


def first(federation: Path) -> None:
    provision(federation, 2, ADDRESS, [])


def renewed(federation: Path) -> None:
    superlink.provision.renew(federation)


def rotated(federation: Path) -> None:
    site_keys.rotate(federation, "site-00")


def lost(federation: Path) -> None:
    (federation / "site-00" / "supernode.key").unlink(missing_ok=True)
    first(federation)


def revoked(federation: Path) -> None:
    site_keys.revoke(federation, "site-00")


def readmitted(federation: Path) -> None:
    revoked(federation)
    rotated(federation)


COMPLETE = {
    "site-00/superlink-ca.crt", "site-00/site.env", "site-00/supernode.key",
    "site-01/superlink-ca.crt", "site-01/site.env", "site-01/supernode.key",
    "public/ca.crt", "public/address", "public/site-01.pub", "ca/ca.key",
    "superlink/ca.crt", "superlink/server.crt", "superlink/server.key",
    "superlink/runtime.secret", "serverapp/ca.crt", "serverapp/runtime.secret",
}  # fmt: skip


@pytest.mark.parametrize("command", [first, renewed, rotated, lost, revoked, readmitted])
def test_killed_anywhere_a_command_is_completed_by_the_next_call(
    tmp_path: Path, command: Callable[[Path], None]
) -> None:
    if command != first:
        first(tmp_path)
    before = public_keys(tmp_path / "public") if command != first else {}
    ca = ca_of(tmp_path) if command != first else None
    moments = 0
    for federation in kills(command, tmp_path):
        moments += 1
        written = {p: p.read_bytes() for p in files(federation)}
        secret = [p for p, c in written.items() if c.startswith(b"-----B") and b"CERT" not in c]
        assert {stat.S_IMODE(p.stat().st_mode) for p in secret if "crt" not in p.name} <= {0o600}
        provision(federation, 2, ADDRESS, [])
        assert provision(federation, 2, ADDRESS, []) == [], "not complete"
        handshake(federation, "superlink.example")
        if command != first:
            assert ca_of(federation) == ca
        keys = public_keys(federation / "public")
        out = public_keys(federation / "public" / "revoked")
        assert keys["site-01"] == before.get("site-01", keys["site-01"])
        there = {p.relative_to(federation).as_posix() for p in files(federation)}
        marks = {f"public/revoked/{name}.pub" for name in out}
        assert there - marks - {"public/site-00.pub"} == COMPLETE
        for site, key in keys.items():
            own = superlink.certificates.load_key(federation / site / "supernode.key")
            assert public_key_to_bytes(own.public_key()) == key
        # A key that the site had is its key still, or must not come back.
        old = before.get("site-00", keys.get("site-00"))
        assert old in (keys.get("site-00"), *out.values())
        assert len(out) == (keys.get("site-00") != old)
    assert moments > (1 if command == revoked else 4)


def refusal(federation: Path) -> str:
    try:
        provision(federation, 2, ADDRESS, [])
    except ProvisionError as err:
        return str(err)
    return ""


def test_a_reset_that_was_killed_anywhere_is_completed_by_another(tmp_path: Path) -> None:
    first(tmp_path)
    old, ca = public_keys(tmp_path / "public"), ca_of(tmp_path)
    for federation in kills(superlink.provision.reset, tmp_path):
        said = refusal(federation)  # of `docker compose up`
        assert not said or "run superlink.provision reset" in said
        superlink.provision.reset(federation)
        assert provision(federation, 2, ADDRESS, []) == []
        handshake(federation, "superlink.example")
        assert ca_of(federation) != ca
        retired = public_keys(federation / "public" / "revoked").values()
        assert not set(public_keys(federation / "public").values()) & {*retired, *old.values()}
        assert set(old.values()) <= set(retired)


@pytest.mark.parametrize("command", ["rotate", "revoke"])
def test_a_site_that_does_not_exist_is_one_error_line(
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    before = snapshot(tmp_path)
    code, lines = run(tmp_path, monkeypatch, capsys, command, "site-07")
    assert (code, len(lines)) == (1, 1)
    assert "site-07 has no key" in lines[0]
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, capsys, command, "../ca")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "file", ["ca/ca.key", "public/ca.crt", "superlink/server.crt", "site-00/supernode.key"]
)
def test_a_file_of_rubbish_is_one_error_line_that_names_it(
    tmp_path: Path,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    (tmp_path / file).write_text("rubbish")
    code, lines = run(tmp_path, monkeypatch, capsys)
    assert (code, len(lines)) == (1, 1)
    assert str(tmp_path / file) in lines[0]


def test_the_key_of_another_ca_is_refused(tmp_path: Path) -> None:
    provision(tmp_path / "ours", 1, ADDRESS, [])
    provision(tmp_path / "theirs", 1, ADDRESS, [])
    shutil.copy(tmp_path / "theirs" / "ca" / "ca.key", tmp_path / "ours" / "ca" / "ca.key")
    with pytest.raises(ProvisionError, match="is not the key of"):
        provision(tmp_path / "ours", 1, ADDRESS, [])
