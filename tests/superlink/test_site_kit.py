"""What others have made in the federation's folder is kept, and said; what is ours is kept new."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import superlink.provision
from superlink import certificates
from superlink.certificates import Key, ca_certificate, new_key, server_certificate
from superlink.provision import ProvisionError, provision
from tests.superlink.test_provision import ADDRESS, handshake, snapshot


def authority(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[Key, x509.Certificate]:
    """A hospital's own CA."""
    key = new_key()
    with monkeypatch.context() as named:
        named.setattr(certificates, "OUR_CA", name)
        return key, ca_certificate(key)


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
