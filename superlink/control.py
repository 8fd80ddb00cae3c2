"""A small client of the SuperLink's Control API (gRPC, Flower 1.36).

``flwr`` does the same from the command line, at two seconds of start-up a call: too slow to
register 20 keys or to watch the nodes come online.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.serde import user_config_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StreamRunEventsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.supercore.grpc import create_channel
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from supernode.reach import AddressError, direct, parsed, why_not

CALL_TIMEOUT_S = 150  # above the time that the SuperLink may wait for its database
ALREADY_IN_USE = "already in use"  # in the details of Flower's error 23
UNREGISTERED = "unregistered"


class ControlError(Exception):
    """The SuperLink cannot be reached or refuses; the message is one line for the user."""


class RunLostError(ControlError):
    """The SuperLink answers and does not know the run: its database is another one."""


@dataclass(frozen=True)
class RunStatus:
    """``status``: starting, pending, running or finished:<completed|failed|stopped>.

    The bytes are Flower's own count of what its messages and apps took, framing included.
    """

    status: str
    details: str
    bytes_to_sites: int
    bytes_from_sites: int


@dataclass(frozen=True)
class KnownRun:
    """``config`` is what was given on top of pyproject.toml's, ``app`` the FAB's SHA-256."""

    run_id: int
    config: dict[str, Any]
    app: str
    state: RunStatus
    ended_s_ago: float  # by the SuperLink's clock; 0 of a run that has not ended
    app_version: str = ""  # as its pyproject.toml says


def connected(address: str, ca_file: Path) -> "Control":
    """The SuperLink at ``address``; where that is on this host or network, past any proxy.

    Raises:
        ControlError: that is no address, or there is no CA certificate.
    """
    try:
        host, _ = parsed(address)
    except AddressError as err:
        raise ControlError(f"CONTROL_ADDRESS: {err}") from None
    os.environ.update(direct(os.environ, host))
    return Control(address, ca_file)


class Control:
    """One TLS channel to the Control API at ``address`` (host:port)."""

    def __init__(self, address: str, ca_file: Path) -> None:
        try:
            ca = ca_file.read_bytes()
        except OSError as err:
            raise ControlError(f"CA certificate {ca_file}: {err.strerror}") from None
        self.address, self._ca_file = address, ca_file
        self._channel = create_channel(
            server_address=address,
            insecure=False,
            root_certificates=ca,
            interceptors=[RuntimeVersionClientInterceptor(component_name="flwr CLI")],
        )
        self._stub = ControlStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def wait_until_up(self, timeout_s: float) -> None:
        """Raises: ControlError: no TLS connection within ``timeout_s``."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            reason = why_not(self.address, self._ca_file, os.environ)
            raise ControlError(
                f"no connection to the SuperLink at {self.address} within {timeout_s:.0f} s: "
                f"{reason or 'it answers now; try again'}"
            ) from None

    def register(self, public_key: bytes) -> bool:
        """Allow the SuperNode with this key to join; False if the key is, or was, registered."""
        try:
            self._stub.RegisterNode(
                RegisterNodeRequest(public_key=public_key), timeout=CALL_TIMEOUT_S
            )
        except grpc.RpcError as err:
            if ALREADY_IN_USE in (err.details() or "").lower():
                return False
            raise self._error(err) from None
        return True

    def unregister(self, keys: Collection[bytes]) -> int:
        """Shut these keys out for ever, now and at once; returns how many had been let in.

        A SuperNode that is at work with one gets no further message. Flower keeps the key as
        unregistered and will not register it again.
        """
        let_in = [n for n in self.nodes() if n.status != UNREGISTERED and n.public_key in keys]
        for node in let_in:
            try:
                self._stub.UnregisterNode(
                    UnregisterNodeRequest(node_id=node.node_id), timeout=CALL_TIMEOUT_S
                )
            except grpc.RpcError as err:
                raise self._error(err) from None
        return len(let_in)

    def node_status(self) -> dict[bytes, str]:
        """Public key -> registered, online, offline or unregistered."""
        return {bytes(n.public_key): n.status for n in self.nodes()}

    def nodes(self) -> list[Any]:
        """Flower's NodeInfo of every node that was ever registered."""
        try:
            reply = self._stub.ListNodes(ListNodesRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as err:
            raise self._error(err) from None
        return list(reply.nodes_info)

    def run_status(self, run_id: int) -> RunStatus:
        """Where this run stands.

        Raises:
            RunLostError: no such run.
            ControlError: no answer.
        """
        lost = RunLostError(
            f"the SuperLink at {self.address} no longer knows run {run_id}: its database was lost; "
            f"--run-config 'resume=\"{run_id}\"' goes on from the results"
        )
        try:
            reply = self._stub.ListRuns(ListRunsRequest(run_id=run_id), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as err:
            gone = err.code() == grpc.StatusCode.NOT_FOUND
            raise lost if gone else self._error(err) from None
        if run_id not in reply.run_dict:
            raise lost
        return _status(reply.run_dict[run_id])

    def runs(self) -> list[KnownRun]:
        """All runs that the SuperLink knows, newest first.

        Raises:
            ControlError: no answer.
        """
        try:
            reply = self._stub.ListRuns(ListRunsRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as err:
            raise self._error(err) from None
        now = datetime.fromisoformat(reply.now)
        return [
            KnownRun(
                r.run_id,
                user_config_from_proto(r.override_config),
                r.fab_hash,
                _status(r),
                (now - datetime.fromisoformat(r.finished_at or reply.now)).total_seconds(),
                r.fab_version,
            )
            for r in sorted(reply.run_dict.values(), key=lambda r: r.pending_at, reverse=True)
        ]

    def events(self, run_id: int) -> Any:
        """A call that yields the run's events, from the first on, until the run has ended."""
        return self._stub.StreamRunEvents(StreamRunEventsRequest(run_id=run_id))

    def _error(self, err: grpc.RpcError) -> ControlError:
        return ControlError(f"SuperLink at {self.address}: {err.code().name}: {err.details()}")


def _status(run: Any) -> RunStatus:
    status = run.status
    return RunStatus(
        f"{status.status}:{status.sub_status}" if status.sub_status else status.status,
        status.details,
        run.bytes_sent,
        run.bytes_recv,
    )


def public_keys(folder: Path) -> dict[str, bytes]:
    """Site name -> public key, from ``site-NN.pub`` (OpenSSH) in ``folder``, by name.

    Raises:
        ControlError: a file there is no such key.
    """
    keys = {}
    for path in sorted(folder.glob("site-*.pub")):
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ControlError(
                f"{path} is not an elliptic-curve public key; superlink.provision writes it again "
                "when it is deleted"
            )
        keys[path.stem] = public_key_to_bytes(key)
    return keys
