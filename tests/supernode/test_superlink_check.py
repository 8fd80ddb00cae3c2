"""The server's certificate as it is seen through the proxy settings in force; real TLS."""

from base64 import b64encode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from superlink import certificates
from superlink.certificates import Key, ca_certificate, new_key, server_certificate
from supernode.superlink_check import LinkError, certificate_end
from tests.connect_proxy import connect_proxy
from tests.supernode.test_reach import listening, server_context

Authority = tuple[Key, x509.Certificate, Path]


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    key = new_key()
    certificate = ca_certificate(key)
    certificates.write_certificate(tmp_path / "ca.crt", certificate)
    return key, certificate, tmp_path / "ca.crt"


def test_the_end_is_read_off_the_certificate_directly_and_through_a_proxy(
    ca: Authority, tmp_path: Path
) -> None:
    key, (ca_key, ca_cert, ca_file) = new_key(), ca
    certificate = server_certificate(key, ca_key, ca_cert, ["127.0.0.1"])
    with listening(server_context(tmp_path, key, certificate)) as port, connect_proxy() as proxy:
        address = f"127.0.0.1:{port}"
        ends = certificate.not_valid_after_utc
        assert ends > datetime.now(UTC) + timedelta(days=300)
        assert certificate_end(address, ca_file, {}) == ends
        assert proxy.asked == []
        named = {"https_proxy": proxy.url.replace("//", "//site%40h:p%3Aw@")}
        assert certificate_end(address, ca_file, named) == ends
        assert certificate_end(address, ca_file, named | {"no_proxy": "127.0.0.1"}) == ends
        (asked,) = proxy.asked
        assert asked.startswith(f"CONNECT {address} HTTP/1.")
        assert f"Proxy-Authorization: Basic {b64encode(b'site@h:p:w').decode()}\r\n" in asked


def test_a_proxy_that_refuses_is_away_or_inspects_tls_is_told_from_the_superlink(
    ca: Authority, tmp_path: Path
) -> None:
    key, (ca_key, ca_cert, ca_file), other = new_key(), ca, new_key()
    own = server_certificate(key, ca_key, ca_cert, ["127.0.0.1"])
    inspects = server_certificate(key, other, ca_certificate(other), ["127.0.0.1"])
    with (
        listening(server_context(tmp_path, key, own)) as port,
        listening(server_context(tmp_path, key, inspects)) as between,
        connect_proxy(refuses=True) as refuses,
        connect_proxy(leads_to=between) as inspecting,
    ):
        address = f"127.0.0.1:{port}"
        for url, why in (
            (refuses.url, r"names gives no way to .*\(Tunnel connection failed: 403 Forbidden\)"),
            ("http://127.0.0.1:1", r"gives no way to .*\(ConnectionRefusedError\)"),
            (inspecting.url, "is refused .*: does it inspect TLS"),
        ):
            with pytest.raises(LinkError, match=f"{why}.*no_proxy=127.0.0.1"):
                certificate_end(address, ca_file, {"https_proxy": url})


@pytest.mark.parametrize(
    "url",
    [f"http://user:{password}@127.0.0.1:1" for password in ("Zq/9", "1/Zq", "Zq#9", "1?Zq", "[Zq")]
    + ["user:Zq@127.0.0.1:1"],
)
def test_a_proxy_that_is_no_url_is_named_without_its_password(ca: Authority, url: str) -> None:
    with pytest.raises(LinkError, match="the proxy in https_proxy is no URL, as http") as caught:
        certificate_end("127.0.0.1:1", ca[2], {"https_proxy": url})
    assert "Zq" not in str(caught.value)


def test_without_a_proxy_the_reason_is_that_of_the_superlinks_own_address(
    ca: Authority, tmp_path: Path
) -> None:
    key, (ca_key, ca_cert, ca_file) = new_key(), ca
    elsewhere = server_certificate(key, ca_key, ca_cert, ["fed.example.org"])
    with (
        listening(server_context(tmp_path, key, elsewhere)) as port,
        pytest.raises(LinkError, match=r"is for fed.example.org, not for 127.0.0.1"),
    ):
        certificate_end(f"127.0.0.1:{port}", ca_file, {})
    with pytest.raises(LinkError, match="nothing listens"):
        certificate_end(f"127.0.0.1:{port}", ca_file, {})
