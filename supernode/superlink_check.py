"""What the SuperLink shows and says to a site that has not joined yet; nothing changes by asking.

Both ways go through the proxy settings in force, as the SuperNode's own connection will.
"""

import http.client
import json
import ssl
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from supernode.reach import PROBE_TIMEOUT_S, parsed, proxy_for, why_not

CALL_TIMEOUT_S = 60
# An interval that Flower never takes. It looks up the key first: the answer of a key that may join
# is the first of these codes, of any other the second, and no node is activated by either.
NO_INTERVAL_S = 0.0
KNOWN, UNKNOWN = 2003, 2004  # FLEET_INVALID_HEARTBEAT_INTERVAL, FLEET_NODE_ACTIVATION_FAILED
_WRONG_TIME = "Invalid timestamp"


class LinkError(Exception):
    """There is no connection, or no answer that is understood; one line with the cure."""


def certificate_end(address: str, ca_file: Path, env: Mapping[str, str]) -> datetime:
    """Until when the SuperLink's certificate is valid, after a whole TLS handshake with it.

    Raises:
        LinkError: there is none; the message says why.
    """
    host, port = parsed(address)
    proxy = proxy_for(env, host)
    at = _proxy(env, proxy) if proxy else None
    try:
        link = _tunnel(at, host, port, ca_file) if at else _direct(host, port, ca_file)
        link.connect()
        shown = link.sock.getpeercert(binary_form=True)
        link.close()
    except ssl.SSLCertVerificationError as err:
        if proxy:
            raise LinkError(
                f"through the proxy that {proxy} names, the certificate shown is refused "
                f"({err.verify_message}): does it inspect TLS? no_proxy={host} goes past it"
            ) from None
        raise LinkError(why_not(address, ca_file, env) or "it answers now; try again") from None
    except (OSError, http.client.HTTPException) as err:
        if proxy:
            said = str(err) if type(err) is OSError else type(err).__name__
            raise LinkError(
                f"the proxy that {proxy} names gives no way to {address} ({said}): have it let "
                f"this address through, or go past it with no_proxy={host}"
            ) from None
        raise LinkError(why_not(address, ca_file, env) or "it answers now; try again") from None
    return x509.load_der_x509_certificate(shown or b"").not_valid_after_utc


def _direct(host: str, port: int, ca_file: Path) -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=ca_file)
    return http.client.HTTPSConnection(host, port, timeout=PROBE_TIMEOUT_S, context=context)


def _proxy(env: Mapping[str, str], name: str) -> SplitResult:
    """Raises LinkError: it is no URL. Nothing of it is told: a password may be anywhere in it."""
    with suppress(ValueError):
        at = urlsplit(env[name])
        if at.hostname and at.port != 0 and "@" not in at.path + at.query + at.fragment:
            return at
    raise LinkError(
        f"the proxy in {name} is no URL, as http://proxy.example.org:3128; percent-encode / # ? @ "
        "in its password"
    )


def _tunnel(at: SplitResult, host: str, port: int, ca_file: Path) -> http.client.HTTPSConnection:
    """As gRPC asks a proxy: CONNECT, with the user's name and password where the URL has them."""
    link = _direct(at.hostname or "", at.port or 443, ca_file)
    user = f"{unquote(at.username or '')}:{unquote(at.password or '')}"
    said = {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"}
    link.set_tunnel(host, port, said if at.username else {})
    return link


@dataclass(frozen=True)
class Told:
    """What the SuperLink says of this site's key; ``registered`` is None if it did not get so far
    because of the time that this host's clock has.
    """

    registered: bool | None


def ask(address: str, ca_file: Path, key: ec.EllipticCurvePrivateKey) -> Told:
    """Whether this key may join, without joining.

    The environment's proxies are gRPC's. A SuperNode that is online with this key stays so.

    Raises:
        LinkError: no connection, or another answer than these.
    """
    from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.supercore.grpc import create_channel
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    public = key.public_key()
    channel = create_channel(
        server_address=address,
        insecure=False,
        root_certificates=ca_file.read_bytes(),
        interceptors=[
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(key, public),
        ],
    )
    question = ActivateNodeRequest(
        public_key=public_key_to_bytes(public), heartbeat_interval=NO_INTERVAL_S
    )
    try:
        FleetStub(channel).ActivateNode(question, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as err:
        return _told(err.code(), err.details() or "")
    finally:
        channel.close()
    raise LinkError("the SuperLink took a question for a node; install the same version as it has")


def _told(status: grpc.StatusCode, details: str) -> Told:
    if status == grpc.StatusCode.UNAUTHENTICATED and details == _WRONG_TIME:
        return Told(registered=None)
    try:
        code = json.loads(details)["code"]
    except (ValueError, TypeError, KeyError):
        code = None
    if code not in (KNOWN, UNKNOWN):
        said = "".join(c if c.isprintable() else " " for c in details)[:200]
        raise LinkError(f"the SuperLink answers {status.name}: {said}")
    return Told(registered=code == KNOWN)
