"""Calls that gRPC refuses before Flower sees them: Flower's own Fleet server and client."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import grpc
import pytest
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import NOOP_FLWR_AID
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import (
    NodeAuthServerInterceptor,
)
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.grpc import create_channel
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager

from superlink.certificates import Key, new_key
from superlink.fleet_door import MAX_CALL_BYTES
from superlink.onehost.processes import free_port
from superlink.site_keys import fingerprint_of_pem
from superlink.unread_calls import telling_unread_calls
from tests.federation.drill import until

flower_superlink = import_module("flwr.superlink.cli.flower_superlink")  # a function has its name
LARGE_BYTES = 150 * 10**6
PUSH = "/flwr.proto.Fleet/PushObject"


@dataclass
class Port:
    address: str
    states: LinkStateFactory
    lines: list[str] = field(default_factory=list)

    def channel(self, key: Key | None = None) -> grpc.Channel:
        auth = [NodeAuthClientInterceptor(key, key.public_key())] if key else []
        return create_channel(self.address, insecure=True, interceptors=auth)


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Port]:
    database = str(tmp_path / "superlink.db")
    store = ObjectStoreFactory(database)
    states = LinkStateFactory(database, NoOpFederationManager(), store)
    states.state()  # makes the tables
    port = Port(f"127.0.0.1:{free_port()}", states)
    create = telling_unread_calls(flower_superlink.generic_create_grpc_server, port.lines.append)
    monkeypatch.setattr(flower_superlink, "generic_create_grpc_server", create)
    monkeypatch.setattr(flower_superlink, "GRPC_MAX_MESSAGE_LENGTH", MAX_CALL_BYTES)
    server = flower_superlink._run_fleet_api_grpc_rere(
        port.address, states, store, True, None, [NodeAuthServerInterceptor(states)]
    )
    yield port
    server.stop(None).wait()


def refused(call: grpc.UnaryUnaryMultiCallable, request: object) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=60)
    return caught.value


@pytest.mark.parametrize("known", [True, False])
def test_a_large_call_is_one_line_with_the_key_that_it_shows(port: Port, known: bool) -> None:
    key = new_key() if known else None
    large = PushObjectRequest(object_content=bytes(LARGE_BYTES))
    error = refused(FleetStub(port.channel(key)).PushObject, large)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_CALL_BYTES) in error.details()  # gRPC's own words
    until(lambda: bool(port.lines), 60, "a line")  # gRPC may have answered before
    (line,) = port.lines
    print(line)
    name = "no key"
    if key:
        name = f"{fingerprint_of_pem(public_key_to_bytes(key.public_key()))} (not checked)"
    assert line.startswith("PushObject from ipv4:127.0.0.1:")
    assert line.endswith(f" with {name} unread: refused as too large, or broken off")


def test_a_call_that_is_broken_off_is_told_of_in_words_that_are_true(port: Port) -> None:
    # Its headers are there, its message never comes: as of a SuperNode that is killed at work.
    waits = threading.Event()
    begun = port.channel().stream_unary(PUSH).future(iter(waits.wait, True))
    time.sleep(1)
    assert port.lines == []
    begun.cancel()
    until(lambda: bool(port.lines), 60, "a line")
    assert port.lines[0].endswith(" unread: refused as too large, or broken off")
    waits.set()


def test_other_calls_pass_and_fail_as_before(port: Port) -> None:
    key = new_key()
    public = public_key_to_bytes(key.public_key())
    node_id = port.states.state().create_node(NOOP_FLWR_AID, "", public, 0)
    stub = FleetStub(port.channel(key))
    activated = stub.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
    assert activated.node_id == node_id
    stub.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
    # What Flower's own interceptors make of its errors, and of a caller without a key.
    again = refused(stub.DeactivateNode, DeactivateNodeRequest(node_id=node_id))
    assert "Failed to deactivate SuperNode" in again.details()
    stranger = FleetStub(port.channel())
    unknown = refused(stranger.DeactivateNode, DeactivateNodeRequest(node_id=node_id))
    assert unknown.code() == grpc.StatusCode.UNAUTHENTICATED
    assert port.lines == []
