"""A laptop on a network of its own, and its way to the Control port: SSH to the operator's host."""

import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from superlink.onehost.processes import REPOSITORY, free_port
from tests.containers.conftest import CONNECT, wait
from tests.containers.hospitals import TAG

SSH_IMAGE = "fedllm-test-ssh:bookworm"
# What .ci/base-image has made knows no mirror; the official image does.
SSH_DOCKERFILE = """
ARG BASE
FROM $BASE
ARG MIRROR
RUN if [ -n "$MIRROR" ]; then echo "deb $MIRROR bookworm main" > /etc/apt/sources.list; fi \\
 && apt-get -qq update && apt-get -qq install -y --no-install-recommends openssh-server \\
 && install -d /run/sshd
"""
Run = Callable[..., tuple[int, str]]


def _ssh_image() -> None:
    base = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")
    given = [f"BASE={base}"]
    if base.startswith("fedllm-base:"):
        mirror = subprocess.check_output([REPOSITORY / ".ci/debian-mirror"], text=True)
        given.append(f"MIRROR={mirror.strip()}")
    arguments = [part for one in given for part in ("--build-arg", one)]
    build = ["docker", "build", "--quiet", "--tag", SSH_IMAGE, *arguments, "-"]
    done = subprocess.run(build, check=False, input=SSH_DOCKERFILE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def _key(folder: Path, name: str) -> str:
    """A new private key, for its owner only; its public line."""
    key, path = Ed25519PrivateKey.generate(), folder / name
    path.touch(0o600)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    (folder / f"{name}.pub").write_text(f"{public}\n")
    return public


@contextmanager
def laptop(folder: Path, host: str, control_port: str, ca_file: Path) -> Iterator[Run]:
    """What runs a command there, with flwr and this checkout; its localhost:9093 is the tunnel.

    Args:
        folder: an empty one, for the keys.
        host: address of this host, as other networks reach it.
    """
    import docker

    _ssh_image()
    engine, port, unique = docker.from_env(), free_port(), secrets.token_hex(4)
    _key(folder, "laptop")
    (folder / "known_hosts").write_text(f"[{host}]:{port} {_key(folder, 'host')}\n")
    keys = {str(folder): {"bind": "/keys", "mode": "ro"}}
    served = [
        "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", "-p", str(port), "-h", "/keys/host",
        *("-o", f"ListenAddress={host}", "-o", "AuthorizedKeysFile=/keys/laptop.pub"),
        *("-o", "StrictModes=no", "-o", "PidFile=none"),
    ]  # fmt: skip
    tunnel = [
        "ssh", "-N", "-L", f"9093:localhost:{control_port}", "-p", str(port), "-i", "/keys/laptop",
        "-o", "UserKnownHostsFile=/keys/known_hosts", "-o", "ExitOnForwardFailure=yes", host,
    ]  # fmt: skip
    network = engine.networks.create(f"fedllm-laptop-{unique}")
    made: list[Any] = []

    def start(image: str, command: list[str], **how: Any) -> Any:
        made.append(engine.containers.run(image, command, detach=True, init=True, **how))
        return made[-1]

    try:
        ca = {str(ca_file): {"bind": "/ca.crt", "mode": "ro"}}
        superlink = f"fedllm-medical/superlink:{TAG}"
        own = start(superlink, ["sleep", "infinity"], network=network.name, volumes=ca)

        def run(*command: str) -> tuple[int, str]:
            done = own.exec_run(list(command))
            return done.exit_code, done.output.decode()

        def reached(target: str) -> bool:
            return "open" in run("python3", "-ISc", CONNECT.format(targets=[target]))[1]

        assert not reached(f"{host}:{control_port}")  # or it would need no tunnel
        start(SSH_IMAGE, served, network_mode="host", volumes=keys)
        assert wait(lambda: reached(f"{host}:{port}")), made[-1].logs().decode()
        start(SSH_IMAGE, tunnel, network_mode=f"container:{own.id}", volumes=keys)
        assert wait(lambda: reached("localhost:9093")), made[-1].logs().decode()
        yield run
    finally:
        for container in reversed(made):
            container.remove(force=True)
        network.remove()
