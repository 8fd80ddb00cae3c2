"""SuperLink and SuperNodes as child processes of this one, with TLS, keys and free ports."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Self

import psutil

from superlink.control import Control, ControlError, connected
from superlink.provision import provision
from superlink.register import register

REPOSITORY = Path(__file__).parents[2]
_given_ports: set[int] = set()
_GIVEN_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")
STOP_AFTER_S = 15


class LocalFederation:
    """SuperLink and SuperNodes as child processes; use as a context manager.

    Folders: ``work``/federation (keys, data), ``work``/superlink (database), ``work``/logs;
    base models come from ``models``, checkpoints go to ``results``.
    """

    def __init__(self, work: Path, models: Path, results: Path, sites: int) -> None:
        self.work, self.models, self.results, self.sites = work, models, results, sites
        self.federation = work / "federation"
        self.public = self.federation / "public"
        self.sites_dir = self.federation / "sites"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.fleet_port, self.control_port = free_port(), free_port()
        self._spawned: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def provision(self) -> None:
        """Keys and certificates; kept from the last time."""
        provision(self.federation, self.sites, f"localhost:{self.fleet_port}", [])

    def start(self) -> Control:
        """SuperLink, registration, SuperNodes; returns the connection to the Control API.

        Raises:
            ControlError: the SuperLink did not come up; its log's end is in the message.
        """
        control = self.start_superlink()
        register(control, self.public, self.sites_dir)
        for number in range(self.sites):
            self.start_node(number)
        return control

    def start_superlink(self) -> Control:
        """The SuperLink alone, on the ports and the database that it had before, if any.

        Raises:
            ControlError: as ``start``.
        """
        self._spawn(
            "superlink",
            SUPERLINK_DIR=str(self.federation / "superlink"),
            STATE_DIR=str(self.work / "superlink"),
            RESULTS_DIR=str(self.results),
            SITES_DIR=str(self.sites_dir),
            AUDIT_DIR=str(self.federation / "audit"),
            FLEET_ADDRESS=f"127.0.0.1:{self.fleet_port}",
            CONTROL_ADDRESS=f"127.0.0.1:{self.control_port}",
            RUNTIME_PORT=str(free_port()),
            HEALTH_PORT=str(free_port()),
        )
        control = connected(f"localhost:{self.control_port}", self.public / "ca.crt")
        self._wait_until_up(control)
        return control

    def _wait_until_up(self, control: Control, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return control.wait_until_up(1)
            except ControlError as err:
                ended = self.processes["superlink"].poll() is not None
                if ended or time.monotonic() > deadline:
                    why = "the SuperLink ended" if ended else str(err)
                    raise ControlError(f"{why}; {self._log_end('superlink')}") from None

    def start_node(self, number: int, **settings: str) -> None:
        """The SuperNode of one site; ``settings`` override its environment."""
        name = f"site-{number:02d}"
        locks = self.work / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        env = {
            "SITE_DIR": str(self.federation / name),
            "MODELS_DIR": str(self.models),
            "LOCK_DIR": str(locks),
            "DEVICE": os.environ.get("DEVICE", "cpu"),
            "RUNTIME_PORT": str(free_port()),
            "APP_SHA256": self._app_sha256,
        }
        self._spawn(name, **env | settings)

    def check_enough_run(self, sites: Collection[str], needed: int) -> None:
        """Raises: ControlError: so many of the sites' SuperNodes have ended that fewer are left."""
        codes = {s: process.poll() for s, process in self.processes.items() if s in sites}
        ended = [site for site, code in codes.items() if code is not None]
        if ended and len(codes) - len(ended) < needed:
            others = f"ended as well: {', '.join(ended[1:])}; " if ended[1:] else ""
            raise ControlError(
                f"the SuperNode of {ended[0]} has ended with exit code {codes[ended[0]]}; "
                f"{others}{self._log_end(ended[0])}"
            )

    def _log_end(self, name: str) -> str:
        log = self.work / "logs" / f"{name}.log"
        return f"end of its log, {log}:\n{log.read_text(errors='replace')[-1500:].strip()}"

    def _spawn(self, name: str, **settings: str) -> None:
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        package = "superlink" if name == "superlink" else "supernode"
        env = {**os.environ, **settings, "FLWR_HOME": str(self.work / "flwr" / name)}
        again, self._spawned = name in self._spawned, self._spawned | {name}
        with (logs / f"{name}.log").open("ab" if again else "wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"{package}.entrypoint"],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                start_new_session=True,  # one process group a service: it ends as a whole
            )

    @cached_property
    def _app_sha256(self) -> str:
        command = [sys.executable, "-m", "supernode.pinned", "hash", str(REPOSITORY)]
        done = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE)
        return done.stdout.decode().strip()

    def stop_node(self, number: int) -> None:
        """End one site's SuperNode as its operator would."""
        process = self.processes.pop(f"site-{number:02d}")
        process.terminate()  # it alone: it passes it on, and a second one would end Flower at once
        process.wait(STOP_AFTER_S)

    def kill(self, name: str) -> None:
        """SIGKILL to the SuperLink or a site's SuperNode and all its children: a lost host."""
        process = self.processes.pop(name)
        children = _children(process.pid)
        _kill_group(process)
        process.wait()
        _end(children, psutil.Process.kill)

    def stop(self) -> None:
        """End every process and its children: SIGTERM, then SIGKILL.

        The SuperNodes first: one that cannot sign off counts as online for another minute, and
        the SuperLink refuses its successor until then.
        """
        impatience = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        old = {n: signal.signal(n, signal.SIG_IGN) for n in impatience}  # leave nothing behind
        children = [c for p in self.processes.values() for c in _children(p.pid)]
        # The ServerApp has a session of its own. It goes first, while there is a SuperLink to tell,
        # so that run.json does not say "running" for ever. (Not the SuperNodes: their entrypoints
        # would take it for a refusal.)
        groups = {p.pid for p in self.processes.values()}
        _end([c for c in children if _group(c) not in groups], psutil.Process.terminate)
        superlink = self.processes.pop("superlink", None)
        for group in (list(self.processes.values()), [superlink] if superlink else []):
            for process in group:
                process.terminate()
            deadline = time.monotonic() + STOP_AFTER_S
            for process in group:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
            for process in group:
                _kill_group(process)
                process.wait()
        self.processes.clear()
        _end(children, psutil.Process.kill)
        for number, handler in old.items():
            signal.signal(number, handler)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def _end(processes: list[psutil.Process], how: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            how(process)
    psutil.wait_procs(processes, timeout=5)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now; never the same one twice.

    Not of those that the system gives to connections that go out: one of them could take it before
    whoever is to listen there has started.
    """
    first_given_out = int(_GIVEN_OUT.read_text().split()[0]) if _GIVEN_OUT.exists() else 32768
    while True:
        port = 10_000 + secrets.randbelow(max(first_given_out - 10_000, 1000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port
