"""The container suite needs a Docker engine with compose v2; elsewhere it is skipped.

REQUIRE_DOCKER=1 (as in .ci/run) makes a missing engine a failure instead.
"""

import io
import os
import secrets
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.common.constant import HEARTBEAT_PATIENCE
from xdist.scheduler import LoadScopeScheduling

from superlink.control import Control
from superlink.onehost.processes import free_port

REPOSITORY = Path(__file__).parents[2]
CPU = ("compose.yaml", "docker/compose.cpu.yaml")
NODES = [f"supernode-{n:02d}" for n in range(20)]
LONG_RUNNING = ["superlink", "serverapp", "page", *NODES]
RUN_CONFIG = (
    "num-server-rounds=1 train.training-arguments.max-steps=2 strategy.fraction-evaluate=0.05 "
    "strategy.min-evaluate-nodes=1"
)
RUN_TIMEOUT_S, ONLINE_TIMEOUT_S = 1200, 600
# Flower gives up a ServerApp, and a SuperNode, that it has not heard of for a minute.
GIVEN_UP_AFTER_S = 65
CONNECT = """
import socket, sys
for target in {targets!r}:
    host, port = target.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 5).close()
        print(target, "open")
    except OSError as err:
        print(target, "closed", err)
"""
OUTSIDE = ("192.0.2.1:443", "1.1.1.1:443")


def compose(
    *arguments: str, files: Sequence[str] = ("compose.yaml",), project: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``docker compose`` in the repository; never raises."""
    command = ["docker", "compose", *(["-p", project] if project else [])]
    for file in files:
        command += ["-f", file]
    return subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env={**os.environ, **env}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def wait(condition: Callable[[], Any], timeout_s: float = 120) -> bool:
    """Whether ``condition`` came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def online_since(control: Control, moment: float) -> int:
    """How many nodes are online and were heard of after ``moment`` (of time.time()).

    Flower counts a node that is gone as online for HEARTBEAT_PATIENCE heartbeats: what it calls
    online may be what was so before.
    """
    return sum(
        n.status == "online" and n.online_until - HEARTBEAT_PATIENCE * n.heartbeat_interval > moment
        for n in control.nodes()
    )


@dataclass
class Federation:
    """One compose project on the CPU."""

    project: str
    env: dict[str, str]
    files: tuple[str, ...] = CPU
    token: str = field(default_factory=lambda: f"hf_{secrets.token_hex(17)}")

    def compose(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return compose(*arguments, files=self.files, project=self.project, **(self.env | env))

    def containers(self) -> dict[str, Any]:
        """As they are now, by service, those that have ended as well."""
        import docker

        label = f"com.docker.compose.project={self.project}"
        found = docker.from_env().containers.list(all=True, filters={"label": label})
        return {c.labels["com.docker.compose.service"]: c for c in found}

    def __getitem__(self, service: str) -> Any:
        return self.containers()[service]

    def shell(self, service: str, script: str) -> str:
        """What ``script`` prints in this service's container, errors as well."""
        output: bytes = self[service].exec_run(["sh", "-c", script]).output
        return output.decode()

    def python(self, service: str, script: str) -> str:
        output: bytes = self[service].exec_run(["python3", "-ISc", script]).output
        return output.decode()

    def logs(self, *services: str) -> str:
        """All that these services, or all of them, have written. (Compose adds control codes.)"""
        containers = self.containers()
        return "".join(containers[s].logs().decode() for s in services or containers)

    def public(self, folder: Path) -> Path:
        """The CA's certificate and the sites' public keys, copied to ``folder``."""
        stream, _ = self["register"].get_archive("/federation/public")
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
            archive.extractall(folder, filter="data")
        return folder / "public"

    def control(self, public: Path) -> Control:
        """The Control API as the host reaches it."""
        return Control(f"localhost:{self.env['CONTROL_PORT']}", public / "ca.crt")


def addresses(container: Any) -> dict[str, dict[str, str]]:
    """The container's networks by their name in compose.yaml."""
    networks = container.attrs["NetworkSettings"]["Networks"]
    return {name.rsplit("_", 1)[1]: facts for name, facts in networks.items()}


def crash(federation: Federation, service: str) -> None:
    """kill -9 what init started; init itself cannot be killed from within."""
    kill = "for p in /proc/[0-9]*; do read -r _ _ _ parent _ < $p/stat; "
    kill += '[ "$parent" = 1 ] && tr "\\0" " " < $p/cmdline | grep -q entrypoint '
    kill += "&& kill -9 ${p#/proc/}; done"
    federation[service].exec_run(["sh", "-c", kill])


def restarts(federation: Federation, service: str) -> tuple[int, str]:
    attrs = federation[service].attrs
    return attrs["RestartCount"], attrs["State"]["Status"]


def is_back(federation: Federation, service: str) -> bool:
    return restarts(federation, service) == (1, "running")


@pytest.fixture(scope="session")
def images() -> None:
    built = compose("--profile", "eval", "build", files=CPU)
    assert built.returncode == 0, built.stderr[-3000:]


@pytest.fixture(scope="session")
def federation(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """`up -d` of all services but the evaluation, once for all tests; the job has ended."""
    token_file = tmp_path_factory.mktemp("token") / "hf-token"
    ports = {n: str(free_port()) for n in ("FLEET_PORT", "CONTROL_PORT", "PAGE_PORT")}
    env = {"RUN_CONFIG": RUN_CONFIG, "HF_TOKEN_FILE": str(token_file), **ports}
    made = Federation(f"fedllm-test-{os.getpid()}", env)
    token_file.write_text(made.token)
    token_file.chmod(0o644)
    try:
        started = time.monotonic()
        up = made.compose("up", "-d")
        assert up.returncode == 0, up.stderr[-3000:] + made.logs("download", "prepare")[-3000:]
        print(f"up -d: {time.monotonic() - started:.0f} s")
        made["submit"].wait(timeout=RUN_TIMEOUT_S)
        print(f"job ended after {time.monotonic() - started:.0f} s")
        yield made
    finally:
        made.compose("--profile", "*", "down", "-v")


# Each has a federation of its own, and so a worker; all others share that of twenty sites.
APART = ("test_kit.py", "test_two_sites.py")


class ByFederation(LoadScopeScheduling):  # type: ignore[misc]
    """A worker for each federation.

    Not by the marker ``xdist_group``: pytest 9.2 passes it over in silence
    (https://github.com/pytest-dev/pytest-xdist/issues/1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        return next((name for name in APART if f"/{name}::" in nodeid), "twenty sites")


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByFederation(config, log)


def ended(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that says to the other workers that this one of APART has ended."""
    return tmp_path_factory.getbasetemp().parent / f"{name}-has-ended"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The last ones end the federation that all share, stop most of its SuperNodes, and change the
    # others.
    last = [
        "test_inside.py", "test_reach.py", "test_secrets.py", "test_two_sites.py",
        "test_volumes.py", "test_stops.py", "test_reboot.py", "test_gpu_host.py",
    ]  # fmt: skip
    items.sort(key=lambda i: last.index(i.path.name) if i.path.name in last else -1)
    here = [i for i in items if Path(__file__).parent in Path(i.path).parents]
    for item in here:
        item.add_marker(pytest.mark.docker)
    if here and not os.environ.get("REQUIRE_DOCKER"):
        try:
            reason = subprocess.run(
                ["docker", "version"], capture_output=True, text=True, check=False
            )
            missing = reason.stderr.strip() if reason.returncode else ""
        except OSError as err:
            missing = str(err)
        if missing:
            for item in here:
                item.add_marker(pytest.mark.skip(reason=f"no Docker engine: {missing[:120]}"))
