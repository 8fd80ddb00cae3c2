"""Who has not the right key or certificate stays out, and is told so in one line.

One SuperLink for all attempts. Every stranger is a real SuperNode process; only what it is given is
wrong. The attempts run side by side, as most of their time is waiting.
"""

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.node_pb2 import Node
from flwr.supercore.grpc import create_channel
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from superlink.certificates import Key, load_certificate, load_key, new_key, server_certificate
from superlink.control import Control, ControlError
from superlink.onehost.processes import LocalFederation, free_port
from superlink.provision import provision
from superlink.register import register
from superlink.site_keys import revoke, rotate
from supernode.entrypoint import EX_TEMPFAIL, HOPELESS, NOT_ACTIVATED, REFUSED
from tests.samples import REPOSITORY

pytestmark = pytest.mark.faults

SITES = 4  # 00 and 01 are online, 02 gets a new key, 03 lends its kit to strangers
WITHIN_S = 60
ENTRYPOINT = "import sys, supernode.entrypoint as e; e.ACTIVATION_TIMEOUT_S = 0; sys.exit(e.main())"
UNTRUSTED, EXPIRED = "was not issued by the CA in the file given", "its CA's, has expired (1 day, "
UNKNOWN = HOPELESS[NOT_ACTIVATED]


@dataclass
class Scene:
    """A running federation, and those that try to get in."""

    federation: LocalFederation
    control: Control
    attempts: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.federation.federation

    def log(self, name: str) -> str:
        return (self.federation.work / "logs" / f"{name}.log").read_text(errors="replace")

    def kit(self, name: str, site: str = "site-03") -> Path:
        """A copy of a site's folder, to be falsified."""
        target = self.federation.work / "strangers" / name
        shutil.copytree(self.folder / site, target)
        return target

    def attempt(self, name: str, kit: Path, **settings: str) -> None:
        """A SuperNode that tries to join once, with this kit."""
        (self.federation.work / "locks").mkdir(exist_ok=True)
        env = {
            "SITE_DIR": str(kit),
            "MODELS_DIR": str(self.federation.models),
            "LOCK_DIR": str(self.federation.work / "locks"),
            "DEVICE": "cpu",
            "RUNTIME_PORT": str(free_port()),
            "FLWR_HOME": str(self.federation.work / "flwr" / name),
            "APP_SHA256": "0" * 64,  # no run comes here
        }
        self.attempts[name] = subprocess.Popen(
            [sys.executable, "-c", ENTRYPOINT],
            env={**os.environ, **env, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def answer(self, name: str) -> tuple[int, str]:
        """Exit code and output of that attempt, which must have ended in time."""
        if name not in self.answers:
            process = self.attempts[name]
            output, _ = process.communicate(timeout=WITHIN_S)
            self.answers[name] = process.returncode, output
        return self.answers[name]

    def status(self, site: str) -> str:
        """As the SuperLink lists the key that the site has in its folder."""
        key = load_key(self.folder / site / "supernode.key")
        return self.control.node_status().get(public_key_to_bytes(key.public_key()), "unknown")

    def wait_until(self, site: str, status: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while (now := self.status(site)) != status:
            assert time.monotonic() < deadline, f"{site} is {now}:\n{self.log(site)}"
            time.sleep(0.5)

    def end_strangers(self) -> None:
        for process in self.attempts.values():
            process.terminate()
        for process in self.attempts.values():
            process.communicate(timeout=30)


def tls_server(key: Key, certificate: x509.Certificate) -> tuple[grpc.Server, str]:
    """A gRPC server with this certificate on a free port of localhost."""
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    chain = certificate.public_bytes(serialization.Encoding.PEM)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(pem, chain)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, f"localhost:{port}"


def expired(good: x509.Certificate, ca_key: Key) -> x509.Certificate:
    """That certificate, had it been issued a year and a day ago."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        good.issuer,
        good.subject,
        good.public_key(),
        x509.random_serial_number(),
        now - timedelta(days=366),
        now - timedelta(days=1),
        list(good.extensions),
    )
    return builder.sign(ca_key, hashes.SHA256())


def self_made(key: Key) -> x509.Certificate:
    """For localhost, vouched for by nobody."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """site-00 and site-01 are online; five strangers have begun to knock."""
    work = tmp_path_factory.mktemp("strangers")
    models = work / "models"
    models.mkdir()
    with LocalFederation(work, models, work / "results", 1) as federation:
        folder, address = federation.federation, f"localhost:{federation.fleet_port}"
        provision(folder, SITES, address, [])
        scene = Scene(federation, federation.start())
        federation.start_node(1, HEALTH_PORT=str(free_port()))
        servers = knock_at_impostors(scene)
        kit = scene.kit("wrong-ca")
        provision(work / "theirs", 1, address, [])
        shutil.copy(work / "theirs" / "public" / "ca.crt", kit / "superlink-ca.crt")
        scene.attempt("wrong-ca", kit)
        kit = scene.kit("unregistered")
        shutil.copy(work / "theirs" / "site-00" / "supernode.key", kit / "supernode.key")
        scene.attempt("unregistered", kit)
        try:
            scene.wait_until("site-01", "online")
            scene.attempt("twin", scene.kit("twin", "site-01"), PARTITION_ID="3")
            scene.wait_until("site-00", "online")
            yield scene
        finally:
            scene.end_strangers()
            for server in servers:
                server.stop(None)


def knock_at_impostors(scene: Scene) -> list[grpc.Server]:
    """SuperNodes with a right kit, at servers that they must not trust."""
    ca_key = load_key(scene.folder / "ca" / "ca.key")
    ca_cert = load_certificate(scene.folder / "public" / "ca.crt")
    key, own = new_key(), new_key()
    old = expired(server_certificate(key, ca_key, ca_cert, ["localhost"]), ca_key)
    servers = []
    for name, server_key, certificate in (
        ("expired", key, old),
        ("self-made", own, self_made(own)),
    ):
        server, address = tls_server(server_key, certificate)
        servers.append(server)
        scene.attempt(name, scene.kit(name), SUPERLINK=address)
    return servers


def told(output: str) -> list[str]:
    """What our entrypoint says to the hospital."""
    return [x.removeprefix("supernode: ERROR: ") for x in output.splitlines() if "supernode:" in x]


@pytest.mark.parametrize(
    ("name", "why"), [("wrong-ca", UNTRUSTED), ("expired", EXPIRED), ("self-made", UNTRUSTED)]
)
def test_a_server_that_the_ca_does_not_vouch_for_is_not_talked_to(
    scene: Scene, name: str, why: str
) -> None:
    code, output = scene.answer(name)
    lines = told(output)  # one while Flower tries, maybe, and the error
    assert all("no connection to the SuperLink at localhost:" in x and why in x for x in lines)
    assert code == len([x for x in lines if "trying on" not in x]) == 1, output


@pytest.mark.parametrize("name", ["unregistered", "twin"])
def test_an_unknown_key_and_one_that_is_at_work_already_do_not_get_in(
    scene: Scene, name: str
) -> None:
    code, output = scene.answer(name)
    assert (code, told(output)) == (EX_TEMPFAIL, [UNKNOWN]), output
    assert_refused_in_the_log(scene, name)


def assert_refused_in_the_log(scene: Scene, name: str) -> None:
    """The SuperLink's operator sees which key it was."""
    key = load_key(scene.federation.work / "strangers" / name / "supernode.key")
    lines = [x for x in scene.log("superlink").splitlines() if "ActivateNode][ApiError" in x]
    assert any(repr(public_key_to_bytes(key.public_key())) in x for x in lines), lines


def test_the_site_whose_key_was_used_a_second_time_goes_on(scene: Scene) -> None:
    scene.answer("twin")
    assert scene.status("site-01") == "online"
    assert scene.federation.processes["site-01"].poll() is None
    assert pull(scene, "site-01") == grpc.StatusCode.OK


def pull(scene: Scene, site: str, kit: Path | None = None) -> grpc.StatusCode:
    """Ask for messages as this site's SuperNode does; what the SuperLink answers."""
    key = load_key((kit or scene.folder / site) / "supernode.key")
    channel = create_channel(
        server_address=f"localhost:{scene.federation.fleet_port}",
        insecure=False,
        root_certificates=(scene.folder / "public" / "ca.crt").read_bytes(),
        interceptors=[
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(key, key.public_key()),
        ],
    )
    public = public_key_to_bytes(key.public_key())
    node_id = next(n.node_id for n in scene.control.nodes() if n.public_key == public)
    with channel:
        try:
            FleetStub(channel).PullMessages(PullMessagesRequest(node=Node(node_id=node_id)))
        except grpc.RpcError as err:
            code: grpc.StatusCode = err.code()
            return code
    return grpc.StatusCode.OK


def test_who_calls_the_fleet_without_a_key_gets_nothing(scene: Scene) -> None:
    ca = (scene.folder / "public" / "ca.crt").read_bytes()
    address = f"localhost:{scene.federation.fleet_port}"
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            FleetStub(channel).PullMessages(PullMessagesRequest(node=Node(node_id=1)), timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("port", ["fleet_port", "control_port"])
def test_plaintext_gets_no_answer(scene: Scene, port: str) -> None:
    address = ("127.0.0.1", getattr(scene.federation, port))
    with grpc.insecure_channel("{}:{}".format(*address)) as channel:
        fleet = port == "fleet_port"
        call = FleetStub(channel).PullMessages if fleet else ControlStub(channel).ListNodes
        with pytest.raises(grpc.RpcError) as caught:
            call(PullMessagesRequest() if fleet else ListNodesRequest(), timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with socket.create_connection(address, timeout=60) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        with suppress(ConnectionResetError):
            while part := plain.recv(4096):
                answer += part
    # No HTTP status; at most TLS's own alert that this was no TLS.
    assert answer == b"" or answer[0] == 21, answer


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses on which a process and its children listen."""
    top = psutil.Process(pid)
    return {
        (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)  # gRPC's sockets are of both kinds
        for process in [top, *top.children(recursive=True)]
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM
    }


def test_runtime_and_health_ports_are_on_the_loopback_and_nothing_else_listens(
    scene: Scene,
) -> None:
    federation = scene.federation
    for name in ("superlink", "site-00", "site-01"):
        process = federation.processes[name]
        env = psutil.Process(process.pid).environ()
        ports = {int(env[n]) for n in ("RUNTIME_PORT", "HEALTH_PORT") if n in env}
        assert len(ports) == (1 if name == "site-00" else 2)
        if name == "superlink":
            ports |= {federation.fleet_port, federation.control_port}
        assert listening(process.pid) == {("127.0.0.1", p) for p in ports}, name


def test_every_private_key_is_for_its_owner_only(scene: Scene) -> None:
    keys = [
        p
        for p in scene.federation.work.rglob("*")
        if p.is_file() and b"PRIVATE KEY-----" in p.read_bytes()
    ]
    assert {p.name for p in keys} == {"ca.key", "server.key", "supernode.key"}
    assert {stat.S_IMODE(p.stat().st_mode) for p in keys} == {0o600}


@pytest.fixture(scope="module")
def after(scene: Scene) -> Scene:
    """site-00 was revoked at work, site-02 has a new key; all commands of an ``up`` ran again."""
    for name in ("wrong-ca", "expired", "self-made", "unregistered", "twin"):
        scene.answer(name)
    old = scene.kit("old-key", "site-02")
    assert pull(scene, "site-00") == grpc.StatusCode.OK
    revoke(scene.folder, "site-00")
    rotate(scene.folder, "site-02")
    address = f"localhost:{scene.federation.fleet_port}"
    assert provision(scene.folder, SITES, address, []) == []
    done = register(scene.control, scene.folder / "public", scene.federation.sites_dir)
    assert (done.sites, done.new, done.shut_out, done.warnings) == (3, 1, 2, [])
    again = register(scene.control, scene.folder / "public", scene.federation.sites_dir)
    assert (again.sites, again.new, again.shut_out, again.warnings) == (3, 0, 0, [])
    scene.attempt("revoked", scene.kit("revoked", "site-00"))
    scene.attempt("old-key", old)
    scene.federation.start_node(2)
    return scene


def test_a_site_that_is_revoked_while_at_work_gets_no_message_more_and_ends(after: Scene) -> None:
    assert pull(after, "site-00") == grpc.StatusCode.UNAUTHENTICATED
    assert after.federation.processes["site-00"].wait(WITHIN_S) == 1
    assert told(after.log("site-00")) == [REFUSED]
    assert after.status("site-00") == "unregistered"


@pytest.mark.parametrize("name", ["revoked", "old-key"])
def test_a_revoked_key_does_not_get_in_again(after: Scene, name: str) -> None:
    code, output = after.answer(name)
    assert (code, told(output)) == (EX_TEMPFAIL, [UNKNOWN]), output
    assert_refused_in_the_log(after, name)


def test_the_site_with_the_new_key_gets_in(after: Scene) -> None:
    after.wait_until("site-02", "online")
    assert pull(after, "site-02") == grpc.StatusCode.OK
    kit = after.federation.work / "strangers" / "old-key"
    assert pull(after, "site-02", kit) == grpc.StatusCode.UNAUTHENTICATED


def test_a_revoked_key_that_is_put_back_by_hand_is_refused(after: Scene, tmp_path: Path) -> None:
    public = tmp_path / "public"
    shutil.copytree(after.folder / "public", public)
    (retired,) = public.glob("revoked/site-00-*.pub")
    shutil.copy(retired, public / "site-00.pub")
    with pytest.raises(ControlError, match=r"site-00\.pub is a revoked key .*rotate site-00"):
        register(after.control, public, after.federation.sites_dir)
    retired.unlink()
    done = register(after.control, public, after.federation.sites_dir)
    assert (done.sites, done.new, done.shut_out) == (4, 0, 0)
    assert len(done.warnings) == 1
    assert "site-00 cannot join; run superlink.provision rotate site-00" in done.warnings[0]


def test_a_key_that_the_folder_does_not_know_is_reported_and_not_touched(
    after: Scene, tmp_path: Path
) -> None:
    public = tmp_path / "public"
    shutil.copytree(after.folder / "public", public)
    (public / "site-03.pub").unlink()
    done = register(after.control, public, after.federation.sites_dir)
    assert len(done.warnings) == 1
    assert done.warnings[0].startswith("1 more keys may join")
    assert after.status("site-03") == "registered"


def test_a_site_that_is_stopped_is_not_told_that_it_was_refused(after: Scene) -> None:
    process = after.federation.processes["site-01"]
    process.terminate()  # the entrypoint alone, as docker stop does
    process.wait(WITHIN_S)
    assert "SuperNode terminated gracefully" in after.log("site-01")
    assert told(after.log("site-01")) == []
