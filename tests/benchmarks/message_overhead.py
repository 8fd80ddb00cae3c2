"""What an order costs beside its computation: one evaluate message, cold against warm.

    python -m tests.benchmarks.message_overhead [--rounds 4] [--model NAME] [--models DIR]

A real SuperLink and one real SuperNode (processes, TLS, keys) with a prepared base model; in turn
with a new ClientApp process that imports everything (WARM_S=0) and with forked ones. Seconds at
the server from sending to the reply, medians over the rounds after the first (which starts the
fork server); CPU seconds of the site for a round, its computation included. Ratio last.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.submit import submit
from supernode.partitions import BUNDLED, Split, prepare_data

KINDS = {"cold": "0", "warm": "600"}
ROWS = 40  # a tenth of them held out: little to compute


@dataclass(frozen=True)
class Cost:
    """Seconds of an order: evaluation in all, training beside its steps; the CPU's for a round."""

    evaluate_s: float
    train_beside_s: float
    load_s: float
    cpu_s: float


def cpu_s(node: psutil.Process) -> float:
    """Of a SuperNode's processes and of their children that have ended."""
    times = [p.cpu_times() for p in (node, *node.children(recursive=True))]
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(t) for t in path.read_text().splitlines()] if path.is_file() else []


def cost(federation: LocalFederation, control: Control, config: list[str]) -> Cost:
    """Of one run's rounds after the first. Raises RuntimeError if the run fails."""
    node = psutil.Process(federation.processes["site-00"].pid)
    ended: list[int] = []
    known = set(federation.results.glob("*/metrics.jsonl"))
    follow = threading.Thread(
        target=lambda: ended.append(submit(REPOSITORY, config, control, federation.public))
    )
    follow.start()
    while follow.is_alive() and not set(federation.results.glob("*/metrics.jsonl")) - known:
        time.sleep(0.1)  # for the end of the first round
    before = cpu_s(node)
    follow.join()
    if ended != [0]:
        raise RuntimeError(f"the run ended with {ended}")
    later = lines((federation.results / "latest").resolve())[1:]
    return Cost(
        statistics.median(m["eval_seconds"] for m in later),
        statistics.median(m["seconds"] - m["train_s"][0] for m in later),
        statistics.median(m["load_s"][0] for m in later),
        (cpu_s(node) - before) / len(later),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    args = parser.parse_args()
    config = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(args.model)} num-server-rounds={args.rounds}",
        "strategy.min-nodes=1 strategy.min-train-nodes=1 strategy.min-replies=1",
        "strategy.min-evaluate-nodes=1 train.training-arguments.max-steps=1",
    ]
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalFederation(Path(folder), args.models, Path(folder) / "results", 1) as federation,
    ):
        federation.provision()
        source = Path(folder) / "rows.jsonl"
        source.write_text("".join(BUNDLED.open().readlines()[:ROWS]))
        prepare_data(federation.federation, Split(str(source), 1))
        control = federation.start()
        for kind, idle_s in KINDS.items():
            federation.stop_node(0)
            federation.start_node(0, WARM_S=idle_s)
            found[kind] = cost(federation, control, config)
    print("\n      evaluate s  train beside its steps s  of it loading s  CPU s a round")
    for kind, seen in found.items():
        print(
            f"{kind}  {seen.evaluate_s:10.1f}  {seen.train_beside_s:24.1f}  "
            f"{seen.load_s:15.1f}  {seen.cpu_s:13.1f}"
        )
    print(f"ratio, an evaluate message warm to cold: "
          f"{found['warm'].evaluate_s / found['cold'].evaluate_s:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
