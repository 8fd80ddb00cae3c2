"""A round of the real deployment against a round of Flower's Simulation Engine.

    pip install -c requirements.lock -e '.[node,bench]'
    python -m tests.benchmarks.against_simulation
    python -m tests.benchmarks.against_simulation --data FILE \
        --batch-size 16 --seq-length 512 --steps 2

The same model, rows and their order, sites, steps and learning rates, on the CPU, once through a
SuperLink and SuperNodes as processes with TLS and keys, once through the Simulation Engine the
reference's way (tests/benchmarks/simulated.py), one after the other, ``--repeat`` times. A round
is what lies between the sampling and the aggregated adapter; the first of each run is shown and not
counted, since it waits for what later ones find ready. Peak memory: the sum of all processes' PSS,
looked at once a second. Ratio last.

What differs: see DIFFERENCES, which is printed as well.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.config import MIB, RunConfig, merged_config
from app.site.base_model import find
from superlink.onehost.processes import REPOSITORY, LocalFederation
from supernode.download import CACHE
from supernode.partitions import BUNDLED, Split, prepare_data
from supernode.quantise import prepare_model
from tests.benchmarks.watch import Watch

DIFFERENCES = """What differs beside that:
  ours        4-bit weights quantised once, before (NF4); the adapter is one array; FedAvgOpt; every
              message is signed, goes through TLS, two processes and a database, and is checked
  simulation  quantised in every fit (FP4, as the reference); an array for each matrix; FedAvg; a
              message is an object in memory: no TLS, no keys, no database, nothing is checked;
              one process does all fits, so it imports its libraries once
One fit at a time in both, with all cores. Neither evaluates; checkpoints are not in a round."""


@dataclass(frozen=True)
class Run:
    """One run's rounds: seconds of each, those of its fits, and the most memory."""

    name: str
    seconds: list[float]
    load_s: list[list[float]]
    train_s: list[list[float]]
    losses: list[float]
    peak_bytes: int

    def __str__(self) -> str:
        rounds = " ".join(f"{s:.1f}" for s in self.seconds)
        load, train = (
            statistics.mean(s for fits in column[1:] or column for s in fits)
            for column in (self.load_s, self.train_s)
        )
        losses = " ".join(f"{loss:.3f}" for loss in self.losses)
        return (
            f"{self.name:<10} rounds of {rounds} s; a fit's load {load:.1f} s and training "
            f"{train:.1f} s; peak {self.peak_bytes / MIB:,.0f} MiB; train loss {losses}"
        )


def ours(args: argparse.Namespace, overrides: list[str], work: Path) -> tuple[Run, list[list[int]]]:
    """A run of the deployment, and the sites of each round. RuntimeError if it fails."""
    with LocalFederation(work, args.models, work / "results", args.sites) as federation:
        federation.provision()
        control = federation.start()
        pids = {process.pid for process in federation.processes.values()}
        command = [sys.executable, "-m", "superlink.submit"]
        command += [word for text in overrides for word in ("--run-config", text)]
        where = {"CONTROL_ADDRESS": control.address, "PUBLIC_DIR": str(federation.public)}
        with Watch(lambda line: "all" * (line[-1] in pids), frozenset({"all"})) as watch:
            _succeed(command, work / "logs" / "submit.log", where)
    text = (work / "results" / "latest" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    column = {key: [m[key] for m in lines] for key in lines[0]}
    run = Run(
        "ours", column["seconds"], column["load_s"], column["train_s"], column["train_loss"],
        watch.peak_bytes("all"),
    )  # fmt: skip
    return run, column["partitions"]


def simulation(
    args: argparse.Namespace, config: RunConfig, work: Path, partitions: list[list[int]]
) -> Run:
    """A run in the Simulation Engine with these sites a round. RuntimeError if it fails."""
    job: dict[str, Any] = {
        "config": config.flat(),
        "model": str(find(args.models, config.model_name, 0).folder),
        "federation": str(work / "federation"),
        "partitions": partitions,
        "num-sites": args.sites,
        "out": str(work / "simulated.json"),
    }
    job_file = work / "job.json"
    job_file.write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.benchmarks.simulated", str(job_file)]
    with Watch(lambda line: "all", frozenset({"all"})) as watch:
        _succeed(
            command,
            work / "logs" / "simulation.log",
            {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(work)},
        )
    lines = json.loads((work / "simulated.json").read_text())
    seconds, load, train, loss = (
        [line[key] for line in lines] for key in ("seconds", "load-s", "train-s", "loss")
    )
    losses = [statistics.mean(fits) for fits in loss]
    return Run("simulation", seconds, load, train, losses, watch.peak_bytes("all"))


def _succeed(command: list[str], log: Path, settings: dict[str, str]) -> None:
    common = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=os.environ | common | settings, check=False,
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    if done.returncode:
        end = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}:\n{end}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=str(BUNDLED), help="JSON, JSONL or parquet file")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of a run; the first does not count")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop what was started
    for quantization in ("nf4", "none"):  # the second is what the simulation quantises
        prepare_model(args.models, CACHE, args.model, quantization, None)
    arguments = "train.training-arguments"
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(args.model)} train.seq-length={args.seq_length}",
        f"{arguments}.per-device-train-batch-size={args.batch_size}",
        f"{arguments}.max-steps={args.steps} num-server-rounds={args.rounds}",
        f"strategy.min-nodes={args.sites} strategy.fraction-evaluate=0.0",
    ]
    _, config = merged_config(REPOSITORY, overrides)
    print(
        f"2 of {args.sites} sites a round, {args.steps} steps of {args.batch_size} rows of at most "
        f"{args.seq_length} tokens, {args.model}\n{DIFFERENCES}",
        flush=True,
    )
    runs: dict[str, list[Run]] = {"ours": [], "simulation": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare_data(work / "federation", Split(args.data, args.sites))
        for _ in range(args.repeat):
            run, partitions = ours(args, overrides, work)
            print(run, flush=True)
            runs["ours"].append(run)
            run = simulation(args, config, work, partitions)
            print(run, flush=True)
            runs["simulation"].append(run)
    round_s, peak = {}, {}
    for name, of_it in runs.items():
        counted = [s for run in of_it for s in run.seconds[1:]]
        round_s[name] = statistics.median(counted)
        peak[name] = statistics.median(run.peak_bytes for run in of_it)
        print(
            f"{name:<10} median {round_s[name]:6.1f} s a round ({len(counted)} rounds), "
            f"{peak[name] / MIB:,.0f} MiB at the peak"
        )
    print(
        f"ratio, ours to the simulation: {round_s['ours'] / round_s['simulation']:.2f} of its "
        f"seconds, {peak['ours'] / peak['simulation']:.2f} of its memory"
    )


if __name__ == "__main__":
    main()
