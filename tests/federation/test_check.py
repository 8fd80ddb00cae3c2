"""What a real SuperLink says to a site's check, and that nothing changes by asking."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from flwr.client.grpc_rere_client import node_auth_client_interceptor
from flwr.supercore.date import now

from superlink import site_keys
from superlink.certificates import Key, load_key
from superlink.control import Control
from superlink.onehost.processes import LocalFederation
from superlink.register import register
from supernode.superlink_check import LinkError, ask
from tests.connect_proxy import connect_proxy
from tests.federation.drill import until


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalFederation, Control]]:
    """A SuperLink that nobody is registered at yet."""
    work = tmp_path_factory.mktemp("check")
    with LocalFederation(work, work / "models", work / "results", 2) as federation:
        federation.provision()
        control = federation.start_superlink()
        # Its processes have said what they say of themselves.
        until(lambda: "Starting Flower SuperExec" in log(federation), 120, "the SuperExec")
        yield federation, control


def key(federation: LocalFederation, number: int) -> Key:
    return load_key(federation.federation / f"site-{number:02d}" / "supernode.key")


def asked(federation: LocalFederation, number: int) -> bool | None:
    ca, address = federation.public / "ca.crt", f"127.0.0.1:{federation.fleet_port}"
    return ask(address, ca, key(federation, number)).registered


def log(federation: LocalFederation) -> str:
    return (federation.work / "logs" / "superlink.log").read_text(errors="replace")


def test_whether_a_key_may_join_is_told_without_joining(
    scene: tuple[LocalFederation, Control], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, control = scene
    assert asked(federation, 0) is False
    register(control, federation.public, federation.sites_dir)
    before = sorted((n.node_id, n.status, n.last_activated_at) for n in control.nodes())
    said = log(federation)
    assert asked(federation, 0) is True
    assert log(federation) == said  # no line that would look like a fault
    for moved, answer in ((timedelta(minutes=4), True), (timedelta(minutes=-1), None),
                          (timedelta(minutes=6), None)):  # fmt: skip
        with monkeypatch.context() as clock:
            clock.setattr(node_auth_client_interceptor, "now", lambda m=moved: now() - m)
            assert asked(federation, 0) is answer
    assert sorted((n.node_id, n.status, n.last_activated_at) for n in control.nodes()) == before
    site_keys.revoke(federation.federation, "site-01")
    register(control, federation.public, federation.sites_dir)
    assert asked(federation, 1) is False


def test_a_node_that_is_online_stays_so(scene: tuple[LocalFederation, Control]) -> None:
    from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.proto.fleet_pb2_grpc import FleetStub
    from flwr.supercore.grpc import create_channel
    from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    federation, control = scene
    register(control, federation.public, federation.sites_dir)
    own = key(federation, 0)
    public = public_key_to_bytes(own.public_key())
    channel = create_channel(
        server_address=f"127.0.0.1:{federation.fleet_port}",
        insecure=False,
        root_certificates=(federation.public / "ca.crt").read_bytes(),
        interceptors=[
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(own, own.public_key()),
        ],
    )
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=1800)
    FleetStub(channel).ActivateNode(request, timeout=60)
    online = [n for n in control.nodes() if n.public_key == public]
    assert [n.status for n in online] == ["online"]
    assert asked(federation, 0) is True
    assert [n for n in control.nodes() if n.public_key == public] == online
    channel.close()


def test_the_question_goes_through_the_proxy_in_force(
    scene: tuple[LocalFederation, Control], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, control = scene
    register(control, federation.public, federation.sites_dir)
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with connect_proxy() as proxy, connect_proxy(refuses=True) as refuses:
        monkeypatch.setenv("https_proxy", proxy.url)
        assert asked(federation, 0) is True
        assert proxy.asked[0].startswith(f"CONNECT 127.0.0.1:{federation.fleet_port} ")
        monkeypatch.setenv("https_proxy", refuses.url)
        with pytest.raises(LinkError, match="UNAVAILABLE"):
            asked(federation, 0)
