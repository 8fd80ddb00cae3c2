"""A hospital with its kit, and the operator beside it, as test_kit.py has them."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.benchmarks import BENCHMARKS
from tests.containers.conftest import CPU, REPOSITORY, Federation
from tests.eval.test_hub_cache import into_cache

TAG = os.environ.get("TAG", "0.1.0")
SUPERNODE, EVAL = f"fedllm-medical/supernode:{TAG}", f"fedllm-medical/eval:{TAG}"
DEAD = "http://127.0.0.1:1"  # a proxy that is not there
Ended = subprocess.CompletedProcess[str]


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
        """``given``: a file for the standard input. The images' tag is that in .env."""
        files = ["-f", "compose.yaml", "-f", "compose.cpu.yaml"]
        env = os.environ | dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), DEAD)
        env.pop("TAG", None)
        with (given or Path(os.devnull)).open("rb") as stdin:
            return subprocess.run(
                ["docker", "compose", "-p", self.project, *files, *arguments], cwd=self.folder,
                env=env, check=False, stdin=stdin, capture_output=True, text=True,
            )  # fmt: skip

    @property
    def project(self) -> str:
        return f"fedllm-{os.getpid()}-{self.folder.name}"

    def use(self, tag: str) -> None:
        """The images' tag from now on."""
        as_root("sh", "-c", f"echo TAG={tag} > /kit/.env", mounts=(f"{self.folder}:/kit",))

    def check(self) -> dict[str, dict[str, str]]:
        """The rows of its check, by name."""
        done = self.compose("run", "--rm", "-T", "--no-deps", "check", "--format", "json")
        facts: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if facts["ready"] else 1), done.stderr
        return {row["row"]: row for row in facts["rows"]}

    def supernode(self) -> Any:
        """Its container."""
        import docker

        found = self.compose("ps", "--all", "--quiet", "supernode").stdout.strip()
        return docker.from_env().containers.get(found)

    def log(self, **since: str) -> str:
        return self.compose("logs", *(f"--{k}={v}" for k, v in since.items()), "supernode").stdout

    def node(self) -> str:
        """The SuperLink's id of its SuperNode; empty if that has not joined since its start."""
        started = self.supernode().attrs["State"]["StartedAt"]
        return "".join(re.findall(r"SuperNode ID: (\d+)", self.log(since=started))[-1:])


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

    def kit(self, site: str, *arguments: str) -> bytes:
        address = f"{self.host}:{self.operator.env['FLEET_PORT']}"
        return self.provision("kit", site, *arguments, "--address", address, "--output", "-")

    def unpack(self, site: str, archive: bytes, *members: str) -> None:
        """All of a kit, or these of its files alone."""
        (self.work / f"{site}.tar.gz").write_bytes(archive)
        unpack = ("tar", "-C", "/kit", "-xzf", f"/kit/{site}.tar.gz", *members)
        as_root(*unpack, mounts=(f"{self.work}:/kit",))

    def register(self) -> str:
        done = self.operator.compose("run", "--rm", "-T", "register")
        assert done.returncode == 0, done.stderr
        return done.stdout


def bundled(scene: Scene) -> Path:
    """The folder of `make bundle`, its images loaded; of the questions MedQA's alone are there."""
    bundle, cache = scene.work / "bundle", scene.work / "cache"
    into_cache(cache, "medqa", BENCHMARKS["medqa"].questions)
    mounts = f"{cache}:/from:ro", f"{scene.operator.project}_cache:/to"
    as_root("cp", "-r", "/from/hub", "/to", mounts=mounts)
    env = os.environ | scene.operator.env | {"COMPOSE_PROJECT_NAME": scene.operator.project}
    said = ""
    for command, folder in (
        (["make", "bundle", f"BUNDLE={bundle}"], REPOSITORY),
        (["sha256sum", "--check", "--quiet", "SHA256SUMS"], bundle),
        (["docker", "load", "--input", "images.tar"], bundle),
    ):
        done = subprocess.run(
            command, cwd=folder, env=env, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    for image in (SUPERNODE, EVAL):
        assert f"Loaded image: {image}" in said
    assert "eval: not packed, since not in /cache: pubmedqa, medmcqa, careqa; where the hub" in said
    return bundle
