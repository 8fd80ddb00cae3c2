"""What coarse codecs, error feedback and the strategies do to quality: held-out loss by seed.

    python -m tests.benchmarks.communication --data FILE [--rounds 6] [--seeds 3] [--out FILE]

The server's own round (sampling, guards, codecs, aggregation) and the sites' own training on the
real prepared 135M model, 20 sites, 2 a round, in one process: Flower only carries the messages,
and a base model that stays loaded saves most of the time. Every condition sees the same sites,
rows and seeds. Prints a line per condition and seed as it comes, then means and spreads; the loss
is per answer token over held-out rows of all sites.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

from app import client_app
from app.config import MIB, RunConfig, merged_config
from app.server.preflight import Sites
from app.server.strategy import Strategy
from app.site import partition, training
from app.site.base_model import find, get_adapter, load_with_lora, set_adapter
from app.site.examples import encode_all
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.codec import decode
from supernode.partitions import Split, prepare_data
from tests.samples import REPOSITORY
from tests.stand_in_grid import Node, StandInGrid

CONDITIONS = {
    "fedavgopt fp32": "",
    "fedavgopt bf16": 'communication.codec="bf16"',
    "fedavgopt int8": 'communication.codec="int8"',
    "fedavgopt int8, no feedback": 'communication.codec="int8" communication.error-feedback=false',
    "fedavgopt int4": 'communication.codec="int4"',
    "fedavgopt int4, no feedback": 'communication.codec="int4" communication.error-feedback=false',
    "fedavg fp32": 'strategy.name="fedavg"',
    "fedavgopt-delta fp32": 'strategy.name="fedavgopt-delta"',
    "fedprox fp32": 'strategy.name="fedprox"',
    "rda fp32": 'strategy.name="rda"',
    "fedavg fp32, server-lr 1.4": 'strategy.name="fedavg" strategy.server-lr=1.4',
}


Runs = dict[tuple[str, int], dict[str, float]]  # (condition, seed) -> loss, MiB, seconds


class Federation:
    """20 sites in this process around one loaded base model."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        prepare_data(work, Split(args.data, args.sites))
        config = self.config("", 0)
        self.base = find(args.models, config.model_name, config.quantization)
        self.layout = Layout.of(self.base.linear_layers, config)
        start = initial_adapter(self.layout, 0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Two: on a CPU bitsandbytes' layers that have once been evaluated give no gradients.
        self.model, tokenizer = load_with_lora(self.base, config, device, self.layout, start)
        self.judge, _ = load_with_lora(self.base, config, device, self.layout, start)

        def examples(number: int, part: str) -> list[Any]:
            return encode_all(
                partition.load(self._site(number), part), tokenizer, config.seq_length
            )

        self.train = {n: examples(n, "train") for n in range(args.sites)}
        self.holdout = [e for n in range(args.sites) for e in examples(n, "holdout")[: args.held]]

    def _site(self, number: int) -> Path:
        return self.work / f"site-{number:02d}"

    def config(self, changes: str, seed: int) -> RunConfig:
        profile = str(REPOSITORY / "app/profiles/demo.toml")
        common = f"num-server-rounds={self.args.rounds} seed={seed} {self.args.run_config} "
        common += f"strategy.min-nodes={self.args.sites} strategy.fraction-evaluate=0.0"
        _, config = merged_config(REPOSITORY, [profile, common, *([changes] if changes else [])])
        return config

    def node(self, number: int, config: RunConfig) -> Node:
        """What the site's ClientApp does with a train message, on the model that is loaded."""

        def answer(message: Message) -> Message:
            os.environ["SITE_DIR"] = str(self._site(number))
            sent = message.content.array_records["adapter"]["payload"].numpy().tobytes()
            received = decode(config.down, sent, initial_adapter(self.layout, config.seed))
            set_adapter(self.model, self.layout, received)
            job = message.content.config_records["job"]
            server_round = cast(int, job["round"])
            seeds = np.random.SeedSequence([config.seed, server_round, number])
            mu = config.proximal_mu if config.strategy_name == "fedprox" else 0.0
            result = training.train(
                self.model, self.train[number], config, config.learning_rate(server_round),
                int(seeds.generate_state(1)[0]), mu,
            )  # fmt: skip
            trained = get_adapter(self.model, self.layout)
            payload = client_app._to_send(trained, received, self.layout, config, job)
            metrics: dict[str, Any] = {
                "partition-id": number, "num-examples": len(self.train[number]),
                "train-loss": result.loss, "steps": result.steps, "num-tokens": result.tokens,
                "load-s": 0.0, "train-s": result.seconds, "peak-memory-mb": 0.0,
            }  # fmt: skip
            arrays = ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})
            content = RecordDict({"adapter": arrays, "metrics": MetricRecord(metrics)})
            return Message(content, reply_to=message)

        return answer

    def loss(self, adapter: Vector) -> float:
        """Mean over the answer tokens of all sites' held-out rows."""
        set_adapter(self.judge, self.layout, adapter)
        result = training.evaluate(self.judge, self.holdout, self.config("", 0))
        return result.loss_sum / result.num_tokens

    def run(self, changes: str, seed: int, run_id: int) -> dict[str, float]:
        """Held-out loss of the final adapter, MiB sent, seconds."""
        config, started = self.config(changes, seed), time.monotonic()
        numbers = range(self.args.sites)
        sites = Sites(
            node_of={n: n + 1 for n in numbers},
            num_examples={n: len(self.train[n]) for n in numbers},
            num_holdout=dict.fromkeys(numbers, 0),
            fingerprint=self.base.fingerprint,
            linear_layers=self.base.linear_layers,
            versions={},
            left_out={},
        )
        grid = StandInGrid({n + 1: self.node(n, config) for n in numbers})
        strategy = Strategy(grid, config, sites, self.layout, str(run_id))
        adapter = initial_adapter(self.layout, seed)
        for server_round in range(1, config.num_server_rounds + 1):
            adapter, _ = strategy.train_round(server_round, adapter)
        return {
            "loss": self.loss(adapter),
            "mb": strategy.bytes_sent / MIB,
            "seconds": time.monotonic() - started,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held", type=int, default=8, help="held-out rows of each site")
    parser.add_argument("--conditions", default=",".join(str(n) for n in range(len(CONDITIONS))))
    parser.add_argument("--run-config", default="", metavar="PAIRS")
    parser.add_argument(
        "--out", type=Path, help="a JSON line per run; what stands there is not run again"
    )
    args = parser.parse_args()
    names = [list(CONDITIONS)[int(n)] for n in args.conditions.split(",")]
    wanted = [(name, seed) for seed in range(args.seeds) for name in names]
    found = _read(args.out)
    if missing := [run for run in wanted if run not in found]:
        with tempfile.TemporaryDirectory() as work:
            federation = Federation(args, Path(work))
            before = federation.loss(initial_adapter(federation.layout, 0))
            print(f"before: loss {before:.4f}", flush=True)
            for run_id, (name, seed) in enumerate(missing):
                run = found[name, seed] = federation.run(CONDITIONS[name], seed, run_id)
                print(f"{name}, seed {seed}: {run}", flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({"condition": name, "seed": seed, **run}) + "\n")
    print(table({run: found[run] for run in wanted}))


def _read(path: Path | None) -> Runs:
    lines = path.read_text().splitlines() if path and path.exists() else []
    return {(r["condition"], r["seed"]): r for r in map(json.loads, lines)}


def table(runs: Runs) -> str:
    """Mean and spread (standard deviation) over the seeds, and the mean difference to the first."""
    names = list(dict.fromkeys(name for name, _ in runs))
    seeds = sorted({seed for _, seed in runs})
    rows = [f"{'condition':<30} {'loss':>8} {'spread':>8} {'to first':>9} {'MiB':>8}"]
    for name in names:
        losses = [runs[name, seed]["loss"] for seed in seeds]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        gap = statistics.mean(runs[name, s]["loss"] - runs[names[0], s]["loss"] for s in seeds)
        mb = statistics.mean(runs[name, seed]["mb"] for seed in seeds)
        mean = statistics.mean(losses)
        rows.append(f"{name:<30} {mean:8.4f} {spread:8.4f} {gap:+9.4f} {mb:8.2f}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
