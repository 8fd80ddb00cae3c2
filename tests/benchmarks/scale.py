"""How a round grows with the number of SuperNodes and of those that are asked.

    python -m tests.benchmarks.scale [--nodes 5,20,50] [--sampled 2,10,20] [--lora-r 32]

A real SuperLink and real SuperNodes as processes of one host, with TLS, keys, the Fleet door and
the pinned app; the app is the real one, but its sites do not train (tests/benchmarks/noop.py). What
travels is an adapter of Llama-3 8B's shape in fp32 (``--lora-r 1``: a 32nd of it). Seconds of a
round are those of metrics.jsonl, from the sampling to the aggregated adapter, medians; CPU is that
of all processes of a side, the ClientApps' with the SuperNodes'. Each SuperNode
takes about 200 MiB, and its ClientApp comes on top: of 50, a host of 24 GB holds 10 that are asked,
not 20. Ratio last.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.config import MIB
from superlink.connection import write_connection
from superlink.control import Control
from superlink.onehost.processes import LocalFederation
from superlink.register import register
from supernode.pinned import app_sha256
from tests.benchmarks.watch import Watch, look
from tests.samples import REPOSITORY

SIDES = ("SuperLink", "ServerApp", "SuperNodes")
SETTLE_S, IDLE_S = 10, 15
CHANGES = {  # of pyproject.toml, for the app whose sites do not train
    '"app.server_app:app"': '"noop:server"',
    '"app.client_app:app"': '"noop:client"',
    '["app/**/*.py"]': '["app/**/*.py", "noop.py"]',
    "seed = 2025": 'seed = 2025\nsampled = ""\nout = ""',
}


def run_app(control: Control, home: Path, app: Path, config: str) -> None:
    """Submit the app with ``flwr run`` and wait for its end. RuntimeError if it fails."""
    flwr = str(Path(sys.executable).with_name("flwr"))
    done = subprocess.run(
        [flwr, "run", str(app), "deployment", "--run-config", config, "--format", "json"],
        env={"PATH": "/usr/bin:/bin", "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    said = json.loads(done.stdout[done.stdout.index("{") :])
    if "run-id" not in said:
        raise RuntimeError(f"flwr run: {said}")
    run_id = int(said["run-id"])
    while not (state := control.run_status(run_id)).status.startswith("finished"):
        time.sleep(1)
    if state.status != "finished:completed":
        raise RuntimeError(f"{state.status}: {state.details}")


def make_app(folder: Path) -> str:
    """The app without training; returns the SHA-256 of its FAB."""
    from flwr.cli.build import build_fab_from_disk

    shutil.copytree(
        REPOSITORY / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(Path(__file__).with_name("noop.py"), folder)
    project = (REPOSITORY / "pyproject.toml").read_text()
    for old, new in CHANGES.items():
        if project.count(old) != 1:
            raise RuntimeError(f"pyproject.toml holds {old} {project.count(old)} times")
        project = project.replace(old, new)
    (folder / "pyproject.toml").write_text(project)
    return app_sha256(build_fab_from_disk(folder))


class Scale:
    """One federation of so many SuperNodes."""

    def __init__(self, work: Path, nodes: int) -> None:
        self.work, self.nodes = work, nodes
        self.app, self.home = work / "app", work / "home"
        self.local = LocalFederation(work, work / "models", work / "results", nodes)

    def start(self) -> Control:
        """All SuperNodes online; each runs this app and no other."""
        pin = make_app(self.app)
        self.local.provision()
        control = self.local.start_superlink()
        register(control, self.local.public, self.local.sites_dir)
        for number in range(self.nodes):
            # Nor are the libraries loaded that these ClientApps do without.
            self.local.start_node(number, APP_SHA256=pin, WARM_S="0")
        self.home.mkdir()
        write_connection(self.home, control.address, self.local.public / "ca.crt")
        while list(control.node_status().values()).count("online") < self.nodes:
            time.sleep(1)
        return control

    def side(self, line: list[int]) -> str:
        """Whose a process is, by its pid and its parents'."""
        roots = {name: process.pid for name, process in self.local.processes.items()}
        if line[-1] == roots["superlink"]:
            return "SuperLink" if len(line) == 1 else "ServerApp"
        return "SuperNodes" if line[-1] in roots.values() else ""

    def idle(self) -> str:
        """What it takes when nobody trains."""
        time.sleep(SETTLE_S)  # processes that have just started still import
        before = look(self.side, frozenset(SIDES))
        time.sleep(IDLE_S)
        after = look(self.side, frozenset(SIDES))
        share = {
            side: 100 * (after.cpu_s[side] - before.cpu_s[side]) / (after.at - before.at)
            for side in SIDES
        }
        memory = {side: after.pss_bytes[side] / MIB for side in SIDES}
        link = memory["SuperLink"] + memory["ServerApp"]
        return (
            f"idle: {memory['SuperNodes'] / self.nodes:.0f} MiB and "
            f"{share['SuperNodes'] / self.nodes:.2f} % of a core a SuperNode; {link:.0f} MiB and "
            f"{share['SuperLink'] + share['ServerApp']:.1f} % for the SuperLink"
        )

    def measure(self, control: Control, args: argparse.Namespace) -> dict[int, float]:
        """Prints a line for each number of sites asked; returns their seconds a round."""
        out = self.work / "times.json"
        asked = [k for k in args.sampled.split(",") if int(k) <= self.nodes]
        config = (
            f"sampled={json.dumps(','.join(asked))} out={json.dumps(str(out))} "
            f"num-server-rounds={args.rounds} model.lora.peft-lora-r={args.lora_r} "
            f"strategy.min-nodes={self.nodes} strategy.max-retries=0 "
            "train.learning-rate-min=5e-5"  # or the guards would expect ever shorter changes
        )
        with Watch(self.side, frozenset({"SuperLink", "ServerApp"})) as watch:
            run_app(control, self.home, self.app, config)
        times: dict[str, Any] = json.loads(out.read_text())
        begun, ready = times["preflight"]
        print(f"  {self.nodes} sites ready {ready - begun:.0f} s after the ServerApp's start")
        found = {}
        for count, spans in times["rounds"].items():
            found[int(count)] = statistics.median(end - begin for begin, end in spans)
            print(f"  {count:>2} asked: {self._described(watch, spans)}", flush=True)
        log = (self.work / "logs" / "superlink.log").read_text(errors="replace")
        files = (self.work / "superlink").glob("superlink.db*")
        print(
            f"  the SuperLink's database then: {sum(f.stat().st_size for f in files) / MIB:.0f} "
            f"MiB; errors in its log: {log.count('ERROR')}"
        )
        return found

    def _described(self, watch: Watch, spans: list[list[float]]) -> str:
        first, last = spans[0][0], spans[-1][1]
        cpu = {side: watch.cpu_s(side, first, last) / len(spans) for side in SIDES}
        peak = {s: watch.peak_bytes(s, first, last) / MIB for s in ("SuperLink", "ServerApp")}
        share = 100 * sum(cpu.values()) * len(spans) / (last - first) / (os.cpu_count() or 1)
        seconds = [end - begin for begin, end in spans]
        return (
            f"{statistics.median(seconds):6.1f} s a round ({min(seconds):.1f} to "
            f"{max(seconds):.1f}); CPU s a round: "
            + ", ".join(f"{side} {s:.1f}" for side, s in cpu.items())
            + f", {share:.0f} % of all cores; at most "
            + ", ".join(f"{side} {mib:,.0f} MiB" for side, mib in peak.items())
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", default="5,20,50")
    parser.add_argument("--sampled", default="2,10,20")
    parser.add_argument("--rounds", type=int, default=3, help="for each number of sites asked")
    parser.add_argument("--lora-r", type=int, default=32)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop what was started
    found: dict[int, dict[int, float]] = {}
    for nodes in map(int, args.nodes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            scale = Scale(Path(folder), nodes)
            with scale.local:
                started = time.monotonic()
                control = scale.start()
                print(f"{nodes} SuperNodes, online after {time.monotonic() - started:.0f} s")
                print(f"  {scale.idle()}", flush=True)
                found[nodes] = scale.measure(control, args)
    fewest, most = min(found), max(found)
    for count in found[fewest].keys() & found[most].keys():
        ratio = found[most][count] / found[fewest][count]
        print(f"ratio, {count} asked, of {most} SuperNodes to of {fewest}: {ratio:.2f}")


if __name__ == "__main__":
    main()
