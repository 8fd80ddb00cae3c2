"""Two sites with kits, each a compose project on a network of its own, and the operator's project.

They share nothing but the SuperLink's address: one of this host, where its port is published. One
site's key is in its kit, the other one's is made at the site. Image and base model come out of a
bundle, since neither site reaches the hub or the package index: a dead proxy stands before all but
the SuperLink.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from superlink.onehost.processes import free_port
from tests.containers.conftest import CPU, ONLINE_TIMEOUT_S, REPOSITORY, Federation, wait
from tests.samples import ROWS, write_jsonl

SUPERNODE = f"fedllm-medical/supernode:{os.environ.get('TAG', '0.1.0')}"
DEAD = "http://127.0.0.1:1"  # a proxy that is not there
Ended = subprocess.CompletedProcess[str]
RUN_CONFIG = (
    "num-server-rounds=1 train.training-arguments.max-steps=1 strategy.min-nodes=2 "
    "strategy.min-train-nodes=2 strategy.fraction-evaluate=0.0"
)


def as_root(*command: str, mounts: tuple[str, ...] = ()) -> None:
    """What a hospital's sudo does, whoever runs this test."""
    given = [part for mount in mounts for part in ("-v", mount)]
    run = ["docker", "run", "--rm", "--user", "0", "--network", "none", *given, SUPERNODE]
    done = subprocess.run([*run, *command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass
class Hospital:
    """A kit that is unpacked in ``folder``; `download` meets a dead proxy there."""

    folder: Path

    def compose(self, *arguments: str, given: Path | None = None) -> Ended:
        """``given``: a file for the standard input."""
        files = ["-f", "compose.yaml", "-f", "compose.cpu.yaml"]
        env = os.environ | dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), DEAD)
        with (given or Path(os.devnull)).open("rb") as stdin:
            return subprocess.run(
                ["docker", "compose", "-p", self.project, *files, *arguments], cwd=self.folder,
                env=env, check=False, stdin=stdin, capture_output=True, text=True,
            )  # fmt: skip

    @property
    def project(self) -> str:
        return f"fedllm-{os.getpid()}-{self.folder.name}"

    def check(self) -> dict[str, dict[str, str]]:
        """The rows of its check, by name."""
        done = self.compose("run", "--rm", "-T", "--no-deps", "check", "--format", "json")
        facts: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if facts["ready"] else 1), done.stderr
        return {row["row"]: row for row in facts["rows"]}


@dataclass
class Scene:
    operator: Federation
    host: str
    hospitals: list[Hospital]
    work: Path

    def provision(self, *arguments: str, given: str = "") -> bytes:
        """What the operator's superlink.provision prints; ``given`` is its standard input."""
        command = ["python3", "-m", "superlink.provision", *arguments]
        files = [part for file in CPU for part in ("-f", file)]
        done = subprocess.run(
            ["docker", "compose", "-p", self.operator.project, *files, "run", "--rm", "-T",
             "provision", *command],
            env=os.environ | self.operator.env, check=False, input=given.encode(),
            capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def unpack(self, site: str, archive: bytes) -> Hospital:
        (self.work / f"{site}.tar.gz").write_bytes(archive)
        as_root("tar", "-C", "/kit", "-xzf", f"/kit/{site}.tar.gz", mounts=(f"{self.work}:/kit",))
        proxies = f"https_proxy={DEAD}\\nno_proxy={self.host}\\n"
        settings = f"printf '{proxies}' >> /kit/{site}/site/site.env"
        as_root("sh", "-c", settings, mounts=(f"{self.work}:/kit",))
        return Hospital(self.work / site)


def bundled(scene: Scene) -> Path:
    """The folder of `make bundle`, its image loaded."""
    bundle = scene.work / "bundle"
    env = os.environ | scene.operator.env | {"COMPOSE_PROJECT_NAME": scene.operator.project}
    for command, folder in (
        (["make", "bundle", f"BUNDLE={bundle}"], REPOSITORY),
        (["sha256sum", "--check", "--quiet", "SHA256SUMS"], bundle),
        (["docker", "load", "--input", "supernode.tar"], bundle),
    ):
        done = subprocess.run(
            command, cwd=folder, env=env, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert f"Loaded image: {SUPERNODE}" in done.stdout
    return bundle


@pytest.fixture(scope="module")
def scene(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The operator's SuperLink, and two kits without rows; models as a bundle would bring them."""
    bridge = ["docker", "network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}"]
    host = subprocess.run(bridge, check=True, capture_output=True, text=True).stdout.strip()
    ports = {"FLEET_PORT": str(free_port()), "CONTROL_PORT": str(free_port())}
    env = ports | {"FLEET_BIND": host, "SUPERLINK_NAMES": host}
    operator = Federation(f"fedllm-kit-{os.getpid()}", env)
    made = Scene(operator, host, [], tmp_path_factory.mktemp("hospitals"))
    try:
        up = operator.compose("up", "-d", "serverapp", "register", "prepare")
        assert up.returncode == 0, up.stderr[-3000:]
        assert operator["prepare"].wait(timeout=ONLINE_TIMEOUT_S)["StatusCode"] == 0
        bundle = bundled(made)
        kit = ("--address", f"{host}:{ports['FLEET_PORT']}", "--output", "-")
        for arguments in (("site-00",), ("site-01", "--key-at-site")):
            archive = made.provision("kit", *arguments, *kit)
            hospital = made.unpack(arguments[0], archive)
            made.hospitals.append(hospital)
            unpack = ("run", "--rm", "-T", "--no-deps", "prepare", "tar", "-C", "/models", "-x")
            done = hospital.compose(*unpack, given=bundle / "models.tar")
            assert done.returncode == 0, done.stderr
        yield made
    finally:
        for hospital in made.hospitals:
            hospital.compose("--profile", "keygen", "down", "-v")
        operator.compose("down", "-v")
        as_root("sh", "-c", "rm -rf /kit/*", mounts=(f"{made.work}:/kit",))


def test_two_hospitals_join_with_their_kits_train_and_stop(scene: Scene, tmp_path: Path) -> None:
    operator, (first, second) = scene.operator, scene.hospitals
    # No rows yet: the gate is shut, by the row that says so.
    up = first.compose("up", "-d")
    assert up.returncode != 0
    assert 'service "check" didn\'t complete successfully: exit 1' in up.stderr
    assert first.compose("ps", "-q", "supernode").stdout == ""
    told = first.check()
    assert {n for n, r in told.items() if r["status"] == "error"} == {"rows"}, told

    for number, hospital in enumerate(scene.hospitals):
        given = write_jsonl(tmp_path / f"{number}.jsonl", ROWS[number * 10 : number * 10 + 10])
        to = "/kit/site/data/train.jsonl"
        as_root(
            "install", "--owner=10001", "--mode=0400", f"/from/{given.name}", to,
            mounts=(f"{tmp_path}:/from:ro", f"{hospital.folder}:/kit"),
        )  # fmt: skip
    assert {n for n, r in first.check().items() if r["status"] != "ok"} == set()

    # The other one makes its key, and is let in when the operator has admitted that.
    assert second.check()["key"]["status"] == "error"
    made = second.compose("run", "--rm", "-T", "keygen")
    assert made.returncode == 0, made.stderr
    assert {n for n, r in second.check().items() if r["status"] == "error"} == {"registered"}
    fingerprint = second.check()["key"]["what"].split(",")[0]
    assert fingerprint.encode() in scene.provision("admit", "site-01", "-", given=made.stdout)
    registered = operator.compose("run", "--rm", "-T", "register")
    assert registered.returncode == 0, registered.stderr
    assert {n for n, r in second.check().items() if r["status"] != "ok"} == set()

    for hospital in scene.hospitals:
        up = hospital.compose("up", "-d")
        assert up.returncode == 0, up.stderr + hospital.compose("logs", "check").stdout
    control = operator.control(operator.public(tmp_path / "public"))

    def online() -> int:
        return sum(n.status == "online" for n in control.nodes())

    assert wait(lambda: online() == 2, ONLINE_TIMEOUT_S)
    assert first.check()["registered"]["status"] == "ok"  # beside its SuperNode, which stays online
    done = operator.compose("run", "--rm", "-T", "--no-deps", "submit", RUN_CONFIG=RUN_CONFIG)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = json.loads(operator.shell("superlink", "cat /results/latest/metrics.jsonl"))
    assert (line["partitions"], line["rejected"]) == ([0, 1], {})

    stopped = first.compose("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert wait(lambda: online() == 1)
    assert "SuperNode terminated gracefully" in first.compose("logs", "supernode").stdout
