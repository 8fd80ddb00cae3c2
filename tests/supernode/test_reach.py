"""Addresses, proxies, and why there is no connection; against real sockets and real TLS."""

import ipaddress
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from superlink import certificates
from superlink.certificates import Key, ca_certificate, new_key, server_certificate
from supernode.reach import AddressError, direct, parsed, proxy_for, why_not
from tests.samples import REPOSITORY

PORT = st.integers(1, 65535)


@given(
    st.ip_addresses(v=4).map(str)
    | st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True),
    PORT,
)
def test_a_name_and_an_ipv4_address_are_taken_as_they_stand(host: str, port: int) -> None:
    assert parsed(f"{host}:{port}") == (host, port)


@given(st.ip_addresses(v=6), PORT)
def test_an_ipv6_address_stands_in_brackets(host: ipaddress.IPv6Address, port: int) -> None:
    assert parsed(f"[{host}]:{port}") == (str(host), port)
    with pytest.raises(AddressError):
        parsed(f"{host}:{port}")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://fed.example.org:9092", "without a scheme"),
        ("fed.example.org:9092/", "without a scheme and a path"),
        ("fed.example.org", "with a port"),
        ("fed.example.org:", "with a port"),
        ("fed.example.org:99999", "with a port from 1 to 65535"),
        ("fed.example.org:0", "with a port from 1 to 65535"),
        ("fed.example.org:٩", "with a port"),
        ("fed.example.org:" + "9" * 5000, "with a port"),
        (":9092", "with a name"),
        (" fed.example.org:9092", "with a name"),
        ('"fed.example.org:9092"', "with a port"),
        ("'fed.example.org':9092", "with a name"),
        ("fed..example.org:9092", "with a name"),
        ("-fed.example.org:9092", "with a name"),
        ("256.1.1.1:9092", "with a name"),
        ("::1:9092", "in []"),
        ("[::1:9092", "in []"),
        ("[fed]:9092", "in []"),
        ("", "with a port"),
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(AddressError, match=r"host:port is needed") as refused:
        parsed(text)
    assert why in str(refused.value)
    assert repr(text) in str(refused.value)


def test_own_processes_are_reached_past_any_proxy_and_other_hosts_are_not() -> None:
    env = {
        "https_proxy": "http://proxy.example.org:3128", "no_proxy": "intranet.example.org, ",
        "NO_PROXY": "10.0.0.0/8",
    }  # fmt: skip
    env |= direct(env, "superlink", "fed.example.org")
    assert env["no_proxy"] == env["NO_PROXY"]
    assert env["no_proxy"].split(",") == [
        "intranet.example.org", "10.0.0.0/8", "localhost", "127.0.0.1", "::1", "superlink",
    ]  # fmt: skip
    assert [proxy_for(env, h) for h in ("localhost", "127.0.0.1", "superlink")] == [""] * 3
    assert proxy_for(env, "fed.example.org") == "https_proxy"
    assert proxy_for(env, "a.intranet.example.org") == ""


def test_every_client_goes_past_the_proxy() -> None:
    """Python's own, httpx (Flower's processes) and gRPC, each in a process with these variables."""
    with listening() as port:
        dead = f"http://127.0.0.1:{port}"
        for socks in (False, True):
            proxy = dead.replace("http", "socks5") if socks else dead
            names = ("http_proxy", "https_proxy", "all_proxy")
            env = dict.fromkeys([*names, *map(str.upper, names)], proxy)
            code = """if True:
                import httpx, urllib.request as own
                print(sorted(own.getproxies()), own.proxy_bypass("localhost"))
                with httpx.Client() as client:
                    way = client._transport_for_url(httpx.URL("http://127.0.0.1:1/x"))
                    print(type(way._pool).__name__)
            """
            told = subprocess.run(
                [sys.executable, "-c", code],
                env={"PATH": os.environ["PATH"]} | env | direct(env), cwd=REPOSITORY,
                capture_output=True, text=True, check=True,
            ).stdout.splitlines()  # fmt: skip
            assert told[1] == "ConnectionPool"  # not HTTPProxy
            assert told[0].startswith("['no']" if socks else "['all', 'http', 'https', 'no'] True")


# --- Why there is no connection -------------------------------------------------------------------


@contextmanager
def listening(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A port of 127.0.0.1 that takes connections: with TLS, or never saying a word of it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    peer, _ = server.accept()
                except OSError:
                    return
                with peer:
                    try:
                        if context:
                            context.wrap_socket(peer, server_side=True).close()
                        else:
                            peer.sendall(b"SSH-2.0-x\r\n")
                    except OSError:
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def server_context(folder: Path, key: Key, certificate: x509.Certificate) -> ssl.SSLContext:
    certificates.write_key(folder / "server.key", key)
    certificates.write_certificate(folder / "server.crt", certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    return context


@pytest.fixture
def ca(tmp_path: Path) -> tuple[Key, x509.Certificate, Path]:
    key = new_key()
    certificate = ca_certificate(key)
    certificates.write_certificate(tmp_path / "ca.crt", certificate)
    return key, certificate, tmp_path / "ca.crt"


def moved_clock(monkeypatch: pytest.MonkeyPatch, moved: timedelta) -> None:
    """The clock of whoever makes certificates from now on."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + moved

    monkeypatch.setattr(certificates, "datetime", Clock)


@pytest.mark.parametrize(
    ("moved", "names", "why"),
    [
        (timedelta(0), ["127.0.0.1"], ""),
        (timedelta(0), ["fed.example.org"], "is for fed.example.org, not for 127.0.0.1"),
        (timedelta(hours=2), ["127.0.0.1"], "clock is at least 1:5"),
        (timedelta(days=-400), ["127.0.0.1"], "has expired (35 days"),
    ],
    ids=["good", "another name", "a clock behind", "expired"],
)
def test_a_certificate_is_told_apart_by_what_is_wrong_with_it(
    ca: tuple[Key, x509.Certificate, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    moved: timedelta, names: list[str], why: str,
) -> None:  # fmt: skip
    moved_clock(monkeypatch, moved)
    key, (ca_key, ca_cert, ca_file) = new_key(), ca
    context = server_context(tmp_path, key, server_certificate(key, ca_key, ca_cert, names))
    with listening(context) as port:
        told = why_not(f"127.0.0.1:{port}", ca_file, {})
        assert (why in told) if why else told == ""


def test_another_ca_no_tls_nobody_there_and_no_such_name(
    ca: tuple[Key, x509.Certificate, Path], tmp_path: Path
) -> None:
    other, key = new_key(), new_key()
    foreign = server_certificate(key, other, ca_certificate(other), ["127.0.0.1"])
    with listening(server_context(tmp_path, key, foreign)) as port:
        assert "not issued by the CA" in why_not(f"127.0.0.1:{port}", ca[2], {})
    assert "nothing listens" in why_not(f"127.0.0.1:{port}", ca[2], {})
    with listening() as port:
        assert "no TLS at port" in why_not(f"127.0.0.1:{port}", ca[2], {})
    assert "cannot be resolved" in why_not("no-such-host.invalid:9092", ca[2], {})
    assert "host:port is needed" in why_not("fed.example.org", ca[2], {})
    proxied = why_not(f"127.0.0.1:{port}", ca[2], {"https_proxy": "http://proxy:3128"})
    assert "https_proxy names a proxy" in proxied
    assert proxied.endswith("(no_proxy=127.0.0.1 goes past)")
    assert "proxy" not in why_not(f"127.0.0.1:{port}", ca[2], {"HTTPS_PROXY": "http://proxy:3128"})


def test_where_it_answers_but_a_proxy_is_named_the_proxy_is_told(
    ca: tuple[Key, x509.Certificate, Path], tmp_path: Path
) -> None:
    key, (ca_key, ca_cert, ca_file) = new_key(), ca
    context = server_context(tmp_path, key, server_certificate(key, ca_key, ca_cert, ["127.0.0.1"]))
    with listening(context) as port:
        env = {"http_proxy": "http://proxy.example.org:3128"}
        assert why_not(f"127.0.0.1:{port}", ca_file, env).startswith("it answers; but http_proxy")
        assert why_not(f"127.0.0.1:{port}", ca_file, env | direct(env)) == ""
