"""Another process: where it listens, whether a proxy lies between, and why it cannot be reached.

The one module of this package that the SuperLink's side has too (docker/Dockerfile).
"""

import ipaddress
import re
import socket
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # names of Docker's services have a _
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_BROADCAST = ipaddress.ip_address("255.255.255.255")
PROBE_TIMEOUT_S = 5
# OpenSSL's X509_V_ERR_…
_NOT_YET_VALID, _EXPIRED, _OTHER_NAME, _OTHER_IP = 9, 10, 62, 64
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_GRPC_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # so written, and no others


class AddressError(ValueError):
    """Not an address; the message is one line that says why, and what one looks like."""


def parsed(text: str) -> tuple[str, int]:
    """Host, an IPv6 address without its brackets, and port of ``text``.

    Raises:
        AddressError: it is not the form host:port, [IPv6]:port with a port from 1 to 65535.
    """
    host, colon, port = text.rpartition(":")
    if "://" in text or "/" in text:
        why = "without a scheme and a path"
    elif not colon or not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        why = "with a port from 1 to 65535"
    elif _in_brackets(host) or _is_host(host):
        return host.strip("[]"), int(port)
    else:
        why = "with a name, an IPv4 address, or an IPv6 address in []"
    raise AddressError(
        f"{text!r} is no address: host:port is needed, {why}, as fed.example.org:9092"
    )


def reached(text: str) -> tuple[str, int]:
    """As ``parsed``, of an address that a site is to connect to.

    Raises:
        AddressError: it is none, or one at which no host is reached.
    """
    host, port = parsed(text)
    ip = ipaddress.ip_address(host) if _is_ip(host, 4) or _is_ip(host, 6) else None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    why = ""
    if ip and ip.is_unspecified:
        why = "what a server listens on"
    elif ip and (ip.is_multicast or ip == _BROADCAST):
        why = "the address of many hosts"
    if why:
        raise AddressError(f"{host} is {why}, not where sites reach it")
    return host, port


def certificate_name(text: str) -> str:
    """What a certificate can be for: a name, perhaps with *. in front, or an IP address.

    Raises:
        AddressError: it is none; a certificate for it would be for nobody.
    """
    name = text.removeprefix("*.")
    wildcard_of_ip = name != text and _is_ip(name, 4)
    if (_is_host(name) and not wildcard_of_ip) or _in_brackets(text) or _is_ip(text, 6):
        return text.strip("[]")
    raise AddressError(
        f"{text!r} is no name for a certificate: fed.example.org, *.example.org, or an IP address, "
        "without scheme, port or spaces; names in other letters as xn--…"
    )


def _in_brackets(host: str) -> bool:
    return host.startswith("[") and host.endswith("]") and _is_ip(host[1:-1], 6)


def _is_host(host: str) -> bool:
    # What has digits and dots only would be an IPv4 address.
    ip = re.fullmatch(r"[\d.]+", host)
    return _is_ip(host, 4) if ip else len(host) <= 253 and bool(_NAME.fullmatch(host))


def _is_ip(text: str, version: int) -> bool:
    try:
        return ipaddress.ip_address(text).version == version and "%" not in text
    except ValueError:
        return False


def direct(env: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """What ``env`` must hold besides, so that no proxy is asked for this host's own processes.

    Nor for those of ``hosts`` that are names without a dot: of the federation's own networks. A
    SOCKS proxy is taken out: neither gRPC nor what Flower's own processes talk with can use one.
    """
    own = [host for host in hosts if "." not in host and ":" not in host]
    said = [part.strip() for name in _both("no_proxy") for part in env.get(name, "").split(",")]
    all_of_them = ",".join(dict.fromkeys(filter(None, [*said, *_LOOPBACK, *own])))
    proxies = [name for proxy in (*_GRPC_PROXIES, "all_proxy") for name in _both(proxy)]
    socks = [name for name in proxies if env.get(name, "").lower().startswith("socks")]
    return dict.fromkeys(_both("no_proxy"), all_of_them) | dict.fromkeys(socks, "")


def proxy_for(env: Mapping[str, str], host: str) -> str:
    """The variable of ``env`` that names gRPC's proxy for ``host``; empty if there is none."""
    exempt = (env.get("no_grpc_proxy") or env.get("no_proxy", "")).split(",")
    if any(p and f".{host}".endswith(f".{p}") for p in (p.strip().lstrip(".") for p in exempt)):
        return ""
    return next((name for name in _GRPC_PROXIES if env.get(name)), "")


def _both(name: str) -> tuple[str, str]:
    return name, name.upper()


def why_not(address: str, ca_file: Path, env: Mapping[str, str]) -> str:
    """Why gRPC has no connection to ``address``, and what to do; empty if it should have one.

    Asked of the host itself; what a proxy between makes of it is not seen, so that is named.
    """
    try:
        host, port = parsed(address)
    except AddressError as err:
        return str(err)
    reason = _reason(host, port, ca_file)
    if proxy := proxy_for(env, host):
        said = reason or "it answers"
        return f"{said}; but {proxy} names a proxy, which may refuse it (no_proxy={host} goes past)"
    return reason


def _reason(host: str, port: int, ca_file: Path) -> str:
    try:
        context = ssl.create_default_context(cafile=ca_file)
        with (
            socket.create_connection((host, port), PROBE_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return ""
    except ssl.SSLCertVerificationError as err:
        return _certificate(host, port, err)
    except ssl.SSLError as err:
        return f"no TLS at port {port} ({err.reason}): is it the right one?"
    except socket.gaierror as err:
        return f"the name {host} cannot be resolved ({err.strerror}): check it, and this host's DNS"
    except ConnectionRefusedError:
        return f"nothing listens at port {port}: is it the right one, and is the SuperLink running?"
    except TimeoutError:
        return f"no answer within {PROBE_TIMEOUT_S} s: is there a firewall between?"
    except OSError as err:
        return f"{err.strerror or type(err).__name__} ({ca_file} or the network)"


def _certificate(host: str, port: int, err: ssl.SSLCertVerificationError) -> str:
    """What is wrong with the certificate that was shown, by this host's clock."""
    try:
        pem = ssl.get_server_certificate((host, port), timeout=PROBE_TIMEOUT_S)
        shown = x509.load_pem_x509_certificate(pem.encode())
        names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return f"its certificate is refused ({err.verify_message})"
    now = datetime.now(UTC)
    if err.verify_code == _NOT_YET_VALID:
        behind = _span(shown.not_valid_before_utc - now)
        return f"its certificate is not valid yet: this host's clock is at least {behind} behind"
    if err.verify_code == _EXPIRED:
        ago = _span(now - shown.not_valid_after_utc)
        return (
            f"its certificate, or its CA's, has expired ({ago} ago by this host's clock): "
            "superlink.provision renew makes a new one, if the clock is right"
        )
    if err.verify_code in (_OTHER_NAME, _OTHER_IP):
        valid = ", ".join(str(name.value) for name in names)
        return (
            f"its certificate is for {valid}, not for {host}: superlink.provision --names adds it"
        )
    return "its certificate was not issued by the CA in the file given: ask for the right CA file"


def _span(time: timedelta) -> str:
    seconds = max(0, round(time.total_seconds()))
    return str(timedelta(seconds=seconds))
