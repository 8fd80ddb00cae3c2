"""The whole federation as processes of this machine: no Docker, no GPU needed.

    python -m superlink.local --sites 4          (what ``make demo`` runs)

The same SuperLink, SuperNodes, ClientApp and ServerApp as in the containers, with TLS and
SuperNode authentication, on free ports. Everything it starts it also stops.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from app.config import ConfigError, merged_config
from superlink.control import Control, ControlError
from superlink.provision import ProvisionError, provision
from superlink.register import register
from superlink.submit import submit

REPOSITORY = Path(__file__).parents[1]
_given_ports: set[int] = set()
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
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.fleet_port, self.control_port = free_port(), free_port()

    def __enter__(self) -> "LocalFederation":
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
        self._spawn(
            "superlink",
            SUPERLINK_DIR=str(self.federation / "superlink"),
            STATE_DIR=str(self.work / "superlink"),
            RESULTS_DIR=str(self.results),
            FLEET_ADDRESS=f"127.0.0.1:{self.fleet_port}",
            CONTROL_ADDRESS=f"127.0.0.1:{self.control_port}",
            RUNTIME_PORT=str(free_port()),
            HEALTH_PORT=str(free_port()),
        )
        control = Control(f"localhost:{self.control_port}", self.public / "ca.crt")
        self._wait_until_up(control)
        register(control, self.public)
        for number in range(self.sites):
            self.start_node(number)
        return control

    def _wait_until_up(self, control: Control, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return control.wait_until_up(1)
            except ControlError as err:
                ended = self.processes["superlink"].poll() is not None
                if ended or time.monotonic() > deadline:
                    log = (self.work / "logs" / "superlink.log").read_text(errors="replace")
                    why = "the SuperLink ended" if ended else str(err)
                    raise ControlError(f"{why}; end of its log:\n{log[-1500:]}") from None

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
        }
        self._spawn(name, **env | settings)

    def _spawn(self, name: str, **settings: str) -> None:
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        package = "superlink" if name == "superlink" else "supernode"
        env = {**os.environ, **settings, "FLWR_HOME": str(self.work / "flwr" / name)}
        with (logs / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"{package}.entrypoint"],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
                start_new_session=True,  # one process group a service: it ends as a whole
            )

    def stop(self) -> None:
        """End every process and its children: SIGTERM, then SIGKILL.

        The SuperNodes first: one that cannot sign off counts as online for another minute, and
        the SuperLink refuses its successor until then.
        """
        impatience = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        old = {n: signal.signal(n, signal.SIG_IGN) for n in impatience}  # leave nothing behind
        # ServerApp and ClientApps run in sessions of their own. They go first, while there is a
        # SuperLink to tell, so that run.json does not say "running" for ever.
        children = [c for p in self.processes.values() for c in _children(p.pid)]
        _end(children, psutil.Process.terminate)
        superlink = self.processes.pop("superlink", None)
        for group in (list(self.processes.values()), [superlink] if superlink else []):
            for process in group:
                _signal_group(process, signal.SIGTERM)
            deadline = time.monotonic() + STOP_AFTER_S
            for process in group:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, deadline - time.monotonic()))
            for process in group:
                _signal_group(process, signal.SIGKILL)
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


def _end(processes: list[psutil.Process], how: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            how(process)
    psutil.wait_procs(processes, timeout=5)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now; never the same one twice."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def table(run: Path) -> str:
    """The run's rounds as text: held-out loss and accuracy before and after, bytes, seconds."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [("round", "sites", "train loss", "held-out loss", "token accuracy", "MB sent", "s")]
    for m in lines:
        sent = m["bytes_down"] + m["bytes_up"] + m.get("eval_bytes_down", 0)
        loss = acc = "-"
        if "eval_loss" in m:
            loss, acc = f"{m['eval_loss']:.4f}", f"{m['eval_token_accuracy']:.4f}"
        if "eval_loss_before" in m:
            loss = f"{m['eval_loss_before']:.4f} -> {m['eval_loss']:.4f}"
            acc = f"{m['eval_token_accuracy_before']:.4f} -> {m['eval_token_accuracy']:.4f}"
        rows.append(
            (
                str(m["round"]),
                " ".join(f"{p:02d}" for p in m["partitions"]),
                f"{m['train_loss']:.4f}",
                loss,
                acc,
                f"{sent / 1e6:.2f}",
                f"{m['seconds'] + m.get('eval_seconds', 0):.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _prepare(args: argparse.Namespace, federation: Path) -> None:
    command = [
        sys.executable, "-m", "supernode.prepare", "all", "--name", args.model,
        "--quantization", args.quantization, "--models", str(args.models),
        "--federation", str(federation), "--sites", str(args.sites), "--source", args.data,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    if done.returncode:
        raise ControlError(done.stderr.strip().rsplit("\n", 1)[-1])  # the libraries talk before it


def _evaluate(args: argparse.Namespace, run: Path) -> int:
    """What the evaluation container does, as a process."""
    command = [
        sys.executable, "-m", "eval", "--results", str(run.parent), "--run", run.name,
        "--models", str(args.models), "--datasets", "demo-yesno,demo-four,demo-five",
    ]  # fmt: skip
    env = {"DEVICE": "cpu", **os.environ}
    return subprocess.run(command, cwd=REPOSITORY, env=env, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.local", description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--data", default="bundled", help="JSON, JSONL or parquet file, or hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="FILE|PAIRS",
        help="on top of app/profiles/demo.toml",
    )
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".demo")
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    parser.add_argument(
        "--results", type=Path, default=os.environ.get("RESULTS_DIR", REPOSITORY / "results")
    )
    args = parser.parse_args()
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):  # unwind as on Ctrl-C
            signal.signal(number, signal.default_int_handler)
        return demo(args)
    except (ControlError, ConfigError, ProvisionError) as err:
        print(f"demo: ERROR: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; every process it started has ended", file=sys.stderr)
        return 130


def demo(args: argparse.Namespace) -> int:
    """Prepare, start, run, show; the exit code of the run."""
    config = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"strategy.min-nodes={args.sites}",
        f"model.name={json.dumps(args.model)}",
        *args.run_config,
    ]
    merged_config(REPOSITORY, config)  # before minutes of preparation
    started = time.monotonic()
    with LocalFederation(args.work, args.models, args.results, args.sites) as federation:
        say(f"1/5 keys and certificates of {args.sites} sites")
        federation.provision()
        say("2/5 base model and data (the first time: download and conversion, a minute)")
        _prepare(args, federation.federation)
        say(f"3/5 SuperLink and {args.sites} SuperNodes; logs in {args.work / 'logs'}")
        control = federation.start()
        say("4/5 the run")
        code = submit(REPOSITORY, config, control, federation.public)
    if code == 0:
        run = (args.results / "latest").resolve()
        print(f"\n{table(run)}\n")
        say(f"final adapter: {run / max(run.glob('peft_*'), key=_round_of).name}")
        say("5/5 evaluation: base model and final adapter on the bundled questions")
        code = _evaluate(args, run)
    say(f"{'done' if code == 0 else 'failed'} after {time.monotonic() - started:.0f} s")
    return code


def _round_of(folder: Path) -> int:
    return int(folder.name.removeprefix("peft_"))


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
