"""Who reaches what: attempts from every side at what is not for it."""

import ipaddress
import socket
import ssl
from pathlib import Path

import docker
import pytest

from tests.containers.conftest import (
    CONNECT,
    OUTSIDE,
    Federation,
    addresses,
)


def _reached(federation: Federation, service: str, *targets: str) -> list[str]:
    """The host:port of ``targets`` that a TCP connection from this container reaches."""
    answers = federation.python(service, CONNECT.format(targets=targets)).splitlines()
    assert [a.split()[0] for a in answers] == list(targets), answers
    return [a.split()[0] for a in answers if a.split()[1] == "open"]


def _gateway(federation: Federation, network: str) -> str:
    """This host's address on one of the federation's networks, or what it would be."""
    made = docker.from_env().networks.get(f"{federation.project}_{network}")
    config = made.attrs["IPAM"]["Config"][0]
    first = next(ipaddress.ip_network(config["Subnet"]).hosts())
    return str(config.get("Gateway") or first)


def test_a_supernode_reaches_the_fleet_api_and_no_other_service(federation: Federation) -> None:
    superlink, node = addresses(federation["superlink"]), addresses(federation["supernode-01"])
    assert set(superlink) == {"federation", "control", "runtime"}
    assert set(node) == {"federation"}
    ports = federation.env
    other = [f"supernode-00:{port}" for port in (9092, 9094, 9300)]
    private = [f"superlink:{port}" for port in (9091, 9093, 9190)]
    control, runtime = superlink["control"], superlink["runtime"]["IPAddress"]
    elsewhere = ["control:9093", *(f"{control['IPAddress']}:{p}" for p in (9092, 9093))]
    elsewhere += ["runtime:9091", "serverapp:9195", *(f"{runtime}:{p}" for p in (9091, 9092))]
    elsewhere += [f"{control['Gateway']}:{p}" for p in (ports["CONTROL_PORT"], 22, 80)]
    gateway = _gateway(federation, "federation")
    host = [f"{gateway}:{ports[p]}" for p in ("CONTROL_PORT", "FLEET_PORT")]
    targets = ("superlink:9092", *private, *other, *elsewhere, *host, *OUTSIDE)
    assert _reached(federation, "supernode-01", *targets) == ["superlink:9092"]
    # The same ports do answer where they may.
    own = ["runtime:9091", "127.0.0.1:9190", "control:9093"]
    unserved = ["127.0.0.1:9093", "127.0.0.1:9091"]
    assert _reached(federation, "superlink", *own, *unserved) == own
    own = ["127.0.0.1:9094", "127.0.0.1:9300"]
    assert _reached(federation, "supernode-00", *own) == own


def test_a_serverapp_reaches_the_superlinks_two_apis_for_it_and_the_sites(
    federation: Federation,
) -> None:
    superlink, app = addresses(federation["superlink"]), addresses(federation["serverapp"])
    assert set(app) == {"runtime"}
    open_to_it = ["superlink:9091", "superlink:9092"]
    closed = ["superlink:9093", "superlink:9190", "control:9093", "supernode-00:9094"]
    for network in ("federation", "control"):
        closed += [f"{superlink[network]['IPAddress']}:{port}" for port in (9091, 9092, 9093)]
    gateway = _gateway(federation, "runtime")
    closed += [f"{gateway}:{federation.env[p]}" for p in ("CONTROL_PORT", "FLEET_PORT")]
    assert _reached(federation, "serverapp", *open_to_it, *closed, *OUTSIDE) == open_to_it


ASK = """
import ssl, urllib.request
context = ssl.create_default_context(cafile="/federation/serverapp/ca.crt")
for path in {paths!r}:
    request = urllib.request.Request("https://superlink:9091" + path, data=b"")
    request.add_header("Content-Type", "application/protobuf")
    try:
        print(path, urllib.request.urlopen(request, context=context, timeout=20).status)
    except urllib.error.HTTPError as err:
        print(path, err.code)
"""


def test_a_serverapp_finds_no_control_api_and_no_work_without_the_secret(
    federation: Federation,
) -> None:
    control = [f"/v1/control/{name}" for name in ("list-nodes", "start-run", "register-node")]
    work = [f"/v1/runtime/{name}" for name in ("pull-pending-tasks", "claim-task", "get-nodes")]
    answers = federation.python("serverapp", ASK.format(paths=[*control, *work])).splitlines()
    codes = dict(line.split() for line in answers)
    assert {codes[p] for p in control} == {"404"}, answers
    assert all(codes[p] in ("401", "403") for p in work), answers


def test_what_an_inner_network_reaches_of_this_host_is_as_the_engine_can_have_it(
    federation: Federation,
) -> None:
    """From 28 on a network can be kept from its host (README, Security); before, it can not."""
    major = int(docker.from_env().version()["Version"].split(".")[0])
    for service, network in (("supernode-01", "federation"), ("serverapp", "runtime")):
        with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104 (that is the point)
            target = f"{_gateway(federation, network)}:{listener.getsockname()[1]}"
            reached = _reached(federation, service, target)
        print(f"engine {major}: {service} reaches of this host: {reached or 'nothing'}")
        assert reached == ([target] if major < 28 else [])


def test_the_fleet_api_answers_nothing_without_tls(federation: Federation, tmp_path: Path) -> None:
    address = ("127.0.0.1", int(federation.env["FLEET_PORT"]))
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

    def answer(connection: socket.socket) -> bytes:
        connection.settimeout(20)
        connection.sendall(hello)
        try:
            return connection.recv(64)
        except ConnectionResetError:
            return b""

    with socket.create_connection(address, 20) as plain:
        assert answer(plain) in (b"", b"\x15\x03\x01\x00\x02\x02\x46")  # at most a TLS alert
    trusted = ssl.create_default_context(cafile=str(federation.public(tmp_path) / "ca.crt"))
    trusted.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(address, 20) as plain,
        trusted.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        assert answer(encrypted)[3] == 4  # a SETTINGS frame


def test_the_host_publishes_two_ports_on_the_loopback_only(
    federation: Federation, tmp_path: Path
) -> None:
    exposed = federation["superlink"].attrs["NetworkSettings"]["Ports"]
    published = {port: where for port, where in exposed.items() if where}  # the page's is not here
    ports = federation.env
    assert published == {
        "9092/tcp": [{"HostIp": "127.0.0.1", "HostPort": ports["FLEET_PORT"]}],
        "9093/tcp": [{"HostIp": "127.0.0.1", "HostPort": ports["CONTROL_PORT"]}],
    }
    gateway = addresses(federation["superlink"])["control"]["Gateway"]  # the host, from here too
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((gateway, int(ports["CONTROL_PORT"])), 5)
    public = federation.public(tmp_path)
    assert set(federation.control(public).node_status().values()) == {"online"}
