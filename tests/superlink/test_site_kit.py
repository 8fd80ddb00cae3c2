"""What others have made in the federation's folder is kept, and said; what is ours is kept new."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

import superlink.provision
from superlink import certificates
from superlink.certificates import Key, ca_certificate, new_key, server_certificate
from superlink.provision import ProvisionError, provision
from superlink.show import show
from tests.superlink.test_provision import ADDRESS, handshake, snapshot


def authority(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Key, x509.Certificate]:
    """A hospital's own CA."""
    key = new_key()
    with monkeypatch.context() as named:
        named.setattr(certificates, "OUR_CA", name)
        return key, ca_certificate(key)


LACKS = ", is not for superlink.example, localhost, 127.0.0.1"


def pem(*certs: x509.Certificate) -> bytes:
    return b"".join(c.public_bytes(Encoding.PEM) for c in certs)


@pytest.mark.parametrize(
    "edited",
    [
        "SUPERLINK=10.9.8.7:9092\nPARTITION_ID=0\nNUM_PARTITIONS=2\n",
        "# our way in\nSUPERLINK=superlink.example:9092\nPARTITION_ID=0\nNUM_PARTITIONS=2\n",
        "SUPERLINK=superlink.example:9092\nPARTITION_ID=0\nNUM_PARTITIONS=2\nWARM_S=60\n",
    ],
    ids=["another way to the SuperLink", "a comment", "a setting more"],
)
def test_an_edited_site_env_is_kept_and_named_and_the_others_follow_the_address(
    tmp_path: Path, edited: str
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    file = tmp_path / "site-00" / "site.env"
    file.write_text(edited)
    for address in (ADDRESS, "elsewhere.example:9092", "elsewhere.example:9092"):
        made = provision(tmp_path, 2, address, [])
        assert [m for m in made if str(file) in m] == [
            f"{file} kept: it was edited; delete it to have it written anew"
        ]
        assert file.read_text() == edited
        assert f"SUPERLINK={address}\n" in (tmp_path / "site-01" / "site.env").read_text()
    file.unlink()
    assert provision(tmp_path, 2, address, []) == []
    assert "SUPERLINK=elsewhere.example:9092\n" in file.read_text()


def test_a_server_certificate_of_a_hospitals_own_ca_with_its_chain_is_used_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    root_key, root = authority(monkeypatch, "Hospital Root")
    key = new_key()
    server = server_certificate(key, root_key, root, ["superlink.example"])
    folder = tmp_path / "superlink"
    certificates.write_key(folder / "server.key", key)
    (folder / "server.crt").write_bytes(pem(server, root))
    ours = (tmp_path / "public" / "ca.crt").read_bytes()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, "superlink.example")

    (tmp_path / "public" / "ca.crt").write_bytes(ours + pem(root))
    for renewed in (False, True):
        before = snapshot(folder)
        renew = superlink.provision.renew
        made = renew(tmp_path) if renewed else provision(tmp_path, 2, ADDRESS, [])
        assert any("server.crt kept: it is of another CA" in m and "in 364 days" in m for m in made)
        assert snapshot(folder)[folder / "server.crt"] == before[folder / "server.crt"]
        assert snapshot(folder)[folder / "server.key"] == before[folder / "server.key"]
        for copy in (
            "superlink/ca.crt",
            "serverapp/ca.crt",
            "site-00/superlink-ca.crt",
            "site-01/superlink-ca.crt",
        ):
            assert (tmp_path / copy).read_bytes() == ours + pem(root)
        handshake(tmp_path, "superlink.example")

    made = superlink.provision.reset(tmp_path)
    anew = (tmp_path / "public" / "ca.crt").read_bytes()
    assert anew != ours + pem(root)
    assert anew.endswith(pem(root))
    assert (tmp_path / "site-01" / "superlink-ca.crt").read_bytes() == anew
    handshake(tmp_path, "superlink.example")


def test_it_is_said_which_name_such_a_certificate_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    root_key, root = authority(monkeypatch, "Hospital Root")
    server = server_certificate(new_key(), root_key, root, ["superlink.example", "localhost"])
    (tmp_path / "superlink" / "server.crt").write_bytes(pem(server))
    (said,) = provision(tmp_path, 1, ADDRESS, ["fed.example.org"])
    assert "is not for fed.example.org, 127.0.0.1, and ends" in said


def test_a_certificate_for_a_whole_domain_is_for_each_name_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    root_key, root = authority(monkeypatch, "Hospital Root")
    own = ["*.Example", "localhost", "127.0.0.1"]
    server = server_certificate(new_key(), root_key, root, own)
    (tmp_path / "superlink" / "server.crt").write_bytes(pem(server))
    (said,) = provision(tmp_path, 1, ADDRESS, [])
    assert "is not for" not in said
    (said,) = provision(tmp_path, 1, ADDRESS, ["fed.north.example"])
    assert "is not for fed.north.example, and ends" in said


def test_a_certificate_with_a_common_name_only_is_kept_and_is_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision(tmp_path, 1, ADDRESS, [])
    root_key, root = authority(monkeypatch, "Hospital Root")
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "superlink.example")])
    server = certificates._certificate(subject, root.subject, new_key().public_key(), 365)
    file = tmp_path / "superlink" / "server.crt"
    file.write_bytes(pem(server.sign(root_key, hashes.SHA256())))
    before = file.read_bytes()
    (said,) = provision(tmp_path, 1, ADDRESS, [])
    assert "kept: it is of another CA" in said
    assert "is not for superlink.example, localhost, 127.0.0.1, and ends" in said
    assert superlink.provision.renew(tmp_path) == [said.replace(LACKS, "")]
    assert show(tmp_path)
    assert file.read_bytes() == before


def test_certificates_that_somebody_has_added_at_one_place_are_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provision(tmp_path, 2, ADDRESS, [])
    file = tmp_path / "site-00" / "superlink-ca.crt"
    _, root = authority(monkeypatch, "Hospital Root")
    both = file.read_bytes() + pem(root)
    file.write_bytes(both)
    (said,) = provision(tmp_path, 2, ADDRESS, [])
    assert str(file) in said
    assert "that are not in public/ca.crt" in said
    assert file.read_bytes() == both


@pytest.mark.parametrize(
    "address",
    ["https://fed.example.org:9092", "fed.example.org", "fed.example.org:99999", "::1:9092"],
)
def test_an_address_that_no_site_could_use_makes_nothing(tmp_path: Path, address: str) -> None:
    with pytest.raises(ProvisionError, match=r"--address: .*host:port is needed"):
        provision(tmp_path, 1, address, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("0.0.0.0", "is what a server listens on"),  # noqa: S104 (that is the point)
        ("[::]", "is what a server listens on"),
        ("[::ffff:0.0.0.0]", "is what a server listens on"),
        ("224.0.0.1", "is the address of many hosts"),
        ("[ff02::1]", "is the address of many hosts"),
        ("255.255.255.255", "is the address of many hosts"),
    ],
)
def test_an_address_at_which_nobody_is_reached_makes_nothing(
    tmp_path: Path, host: str, why: str
) -> None:
    with pytest.raises(ProvisionError) as refused:
        provision(tmp_path, 1, f"{host}:9092", [])
    assert str(refused.value) == f"--address: {host.strip('[]')} {why}, not where sites reach it"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "https://a.example", "a.example:9092", "a b", "spitäl.example", "10.0.0.0/24", "*",
        "*.10.0.0.1", "*.[::1]",
    ],
)  # fmt: skip
def test_a_name_that_no_certificate_can_be_for_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProvisionError, match=r"--names: .* is no name for a certificate"):
        provision(tmp_path, 1, ADDRESS, [name])
    assert not list(tmp_path.iterdir())


def test_names_of_every_form_are_in_the_certificate(tmp_path: Path) -> None:
    provision(tmp_path, 1, ADDRESS, ["*.fed.example", "10.0.0.1", "[2001:db8::1]", "host_1"])
    server = certificates.load_certificate(tmp_path / "superlink" / "server.crt")
    wanted = {"*.fed.example", "10.0.0.1", "2001:db8::1", "host_1"}
    assert wanted < set(certificates.names_of(server))
