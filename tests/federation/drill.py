"""Faults, one after the other, in a run that has to end as if nothing had been.

    python -m tests.federation.drill [--rounds 6]          (what ``make drill`` runs)

Real processes over TLS with a tiny base model: one site sends a poisoned adapter whenever it is
asked, a SuperNode at work is killed, another loses the network, the SuperLink is killed. Prints
what was seen, how long it took and what was lost; exit code 0 if the run is complete and sound.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from app.server.checkpoint import rounds as checkpoints
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from supernode.quantise import prepare_model
from tests.federation.hostile import hostile
from tests.federation.network import Cable
from tests.samples import ROWS
from tests.tiny_model import build_tiny_model

SITES = 5
POISONED, CUT_OFF = 4, 3
OFFLINE_S, DOWN_S = 30.0, 5.0


@dataclass(frozen=True)
class Row:
    """One fault of the drill's table."""

    fault: str
    seen: str
    recovered_s: float
    rounds_lost: int


class Drill(LocalFederation):
    """The federation, with a poisoned site and a cable to one of the others."""

    def __init__(self, work: Path, models: Path, model: Path, rounds: int) -> None:
        super().__init__(work, models, work / "results", SITES)
        self.cable = Cable(self.fleet_port)
        self.rounds = rounds
        self.overrides = [
            str(REPOSITORY / "app/profiles/demo.toml"),
            f"model.name={json.dumps(str(model))} model.lora.peft-lora-r=4 train.seq-length=512",
            f"num-server-rounds={rounds} strategy.min-nodes=3 strategy.require-all-nodes=false",
            "strategy.fraction-train=0.8 strategy.fraction-evaluate=0.0",
        ]

    def start_node(self, number: int, **settings: str) -> None:
        if number == POISONED:
            settings |= hostile(self.work / "hostile", "huge")
        if number == CUT_OFF:
            settings |= {"SUPERLINK": f"localhost:{self.cable.port}"}
        super().start_node(number, **settings)

    def lines(self) -> list[dict[str, Any]]:
        """metrics.jsonl of the newest run."""
        path = self.results / "latest" / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def next_round(self, done: int) -> dict[str, Any]:
        """Wait for the line behind the first ``done`` ones."""
        until(lambda: len(self.lines()) > done, 180, f"round {done + 1}")
        return self.lines()[done]

    def log(self, site: str) -> str:
        return (self.work / "logs" / f"{site}.log").read_text(errors="replace")

    def at_work(self) -> str | None:
        """A site whose ClientApp trains now, neither the poisoned nor the cut-off one."""
        for number in set(range(SITES)) - {POISONED, CUT_OFF}:
            if running(self.processes[f"site-{number:02d}"].pid, "flwr-clientapp"):
                return f"site-{number:02d}"
        return None

    def _someone_at_work(self) -> str:
        until(lambda: self.at_work() is not None, 120, "a site at work")
        return self.at_work() or self._someone_at_work()

    def kill_a_node(self) -> Callable[[], Row]:
        site, done = self._someone_at_work(), len(self.lines())
        before, started = self.log(site).count("SuperNode ID:"), time.monotonic()
        self.kill(site)
        self.start_node(int(site.removeprefix("site-")))  # as its restart policy would

        def recovered() -> Row:
            until(lambda: self.log(site).count("SuperNode ID:") > before, 180, f"{site} back")
            back_s, line = time.monotonic() - started, self.next_round(done)
            why = f"without it: {line['rejected'][site]}" if site in line["rejected"] else "with it"
            seen = f"round {line['round']} {why}"
            return Row(f"{site}'s SuperNode killed at work", seen, back_s, 0)

        return recovered

    def cut_a_node_off(self) -> Callable[[], Row]:
        site, done = f"site-{CUT_OFF:02d}", len(self.lines())
        before = self.log(site).count("Connection successful after")
        self.cable.pull_out()

        def recovered() -> Row:
            time.sleep(OFFLINE_S)
            self.cable.plug_in()
            started = time.monotonic()
            until(
                lambda: self.log(site).count("Connection successful after") > before,
                120, f"{site} back",
            )  # fmt: skip
            back_s, line = time.monotonic() - started, self.next_round(done)
            took_part = "with" if CUT_OFF in line["partitions"] else "without"
            seen = f"{OFFLINE_S:.0f} s offline; round {line['round']} {took_part} it"
            return Row(f"{site} cut off the network", seen, back_s, 0)

        return recovered

    def kill_the_superlink(self) -> Callable[[], Row]:
        self._someone_at_work()
        run, done = (self.results / "latest").resolve(), len(self.lines())
        started = time.monotonic()
        self.kill("superlink")
        time.sleep(DOWN_S)
        control = self.start_superlink()

        def recovered() -> Row:
            until(lambda: self._online(control) == SITES, 180, "all sites online")
            online_s = time.monotonic() - started
            until(lambda: (self.results / "latest").resolve() != run, 300, "the resumed run")
            self.next_round(done)
            chain = json.loads((self.results / "latest" / "run.json").read_text())["resumed_from"]
            kept = chain[-1]["last_round"]
            seen = f"{SITES} nodes online after {online_s:.0f} s; resumed after round {kept}"
            return Row("SuperLink killed", seen, time.monotonic() - started, done + 1 - kept)

        return recovered

    def _online(self, control: Control) -> int:
        return list(control.node_status().values()).count("online")


def running(service: int, program: str) -> list[psutil.Process]:
    """The processes of SuperNode or SuperLink ``service`` that are Flower's program now."""
    found = []
    for child in psutil.Process(service).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # or ended meanwhile
            # Forked ones have the name, others are the program itself.
            names = child.name(), *child.cmdline()
            named = any(program in name for name in names)
            if named and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait. Raises TimeoutError naming ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.2)


def drill(work: Path, models: Path, model: Path, rounds: int) -> list[Row]:
    """Run it; the table's rows.

    Raises:
        AssertionError, TimeoutError: something did not recover, or the run is not sound.
    """
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    ended: list[int] = []
    with Drill(work, models, model, rounds) as federation, federation.cable:
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        control = federation.start()
        follow = threading.Thread(
            target=lambda: ended.append(
                submit(REPOSITORY, federation.overrides, control, federation.public)
            )
        )
        follow.start()
        waiting = []
        with ThreadPoolExecutor() as pool:
            for fault in (
                federation.kill_a_node, federation.cut_a_node_off, federation.kill_the_superlink,
            ):  # fmt: skip
                # A round between two faults, however fast the rounds are and slow a recovery.
                federation.next_round(len(federation.lines()))
                waiting.append(pool.submit(fault()))
            rows = [row.result() for row in waiting]
        follow.join(timeout=900)
        lines = federation.lines()
    _check(federation, lines, ended)
    name = f"site-{POISONED:02d}"
    rejected = [m["rejected"][name] for m in lines if name in m["rejected"]]
    rows.insert(0, Row(f"{name} poisoned", f"{len(rejected)} times out: {rejected[0]}", 0.0, 0))
    return rows


def _check(federation: Drill, lines: list[dict[str, Any]], ended: list[int]) -> None:
    if ended != [0]:
        raise AssertionError(f"submit ended with {ended}, 0 expected")
    if [m["round"] for m in lines] != list(range(1, federation.rounds + 1)):
        raise AssertionError(f"metrics.jsonl holds rounds {[m['round'] for m in lines]}")
    if any(POISONED in m["partitions"] for m in lines):
        raise AssertionError("a poisoned adapter took part")
    folders = checkpoints(federation.results / "latest")
    if list(folders) != list(range(1, federation.rounds + 1)):
        raise AssertionError(f"checkpoints of rounds {list(folders)}")
    for folder in folders.values():
        arrays = load_file(folder / "adapter_model.safetensors").values()
        if not all(np.isfinite(a).all() and np.abs(a).max() < 10 for a in arrays):
            raise AssertionError(f"{folder} is not sound")


def table(rows: list[Row]) -> str:
    cells = [("fault", "what was seen", "recovered after s", "rounds lost")]
    cells += [(r.fault, r.seen, f"{r.recovered_s:.0f}", str(r.rounds_lost)) for r in rows]
    widths = [max(len(c[i]) for c in cells) for i in range(4)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build_tiny_model(work / "tiny")
        prepare_model(work / "models", work / "cache", str(work / "tiny"), "nf4", None)
        started = time.monotonic()
        try:
            rows = drill(work, work / "models", work / "tiny", args.rounds)
        except (AssertionError, TimeoutError) as err:
            print(f"drill: FAILED: {err}", file=sys.stderr)
            return 1
    print(f"\n{table(rows)}\n")
    print(f"drill: completed, {args.rounds} rounds, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
