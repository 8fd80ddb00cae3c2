"""Runs of the tiny model, by the ServerApp's own code, whose adapters somebody takes home."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from app.server.checkpoint import RunFolder
from app.server_app import run
from app.wire.adapter import Layout, initial_adapter
from app.wire.codec import decode, encode
from eval.__main__ import main
from tests.samples import run_config, write_site_list
from tests.stand_in_grid import Node, StandInGrid

HUB_ID = "org/tiny"
LOSSES = (4.0, 3.0, 2.0, 2.5)  # held out: before, and of rounds 1, 2, 3


@dataclass(frozen=True)
class Home:
    """Prepared models under a hub's name, and a run of three rounds for each kind of them."""

    models: Path
    results: dict[str, Path]  # kind -> results folder, its run 7

    def export(self, to: Path, *arguments: str, kind: str = "nf4") -> int:
        places = ["--results", str(self.results[kind]), "--models", str(self.models)]
        return main(["export", *places, "--to", str(to), *arguments])


def site(number: int, base: dict[str, Any], layout: Layout, seed: int) -> Node:
    """Its training is a draw of noise, its loss the round's; all else is the server's own."""

    def answer(message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == "query":
            facts: dict[str, Any] = {
                "partition-id": number, "num-partitions": 2, "num-examples": 30 + number,
                "num-holdout": 3, "fingerprint": base["fingerprint"], "device": "cpu",
                "versions": "{}", "linear-layers": json.dumps(base["linear_layers"]),
                "turn": str(number),
            }  # fmt: skip
            return Message(RecordDict({"preflight": ConfigRecord(facts)}), reply_to=message)
        server_round = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
        if kind == "evaluate":
            loss: dict[str, Any] = {
                "num-tokens": 10,
                "num-correct": 4,
                "loss-sum": 10 * LOSSES[server_round],
            }
            return Message(RecordDict({"metrics": MetricRecord(loss)}), reply_to=message)
        sent = message.content.array_records["adapter"]["payload"].numpy().tobytes()
        received = decode("fp32", sent, initial_adapter(layout, seed))
        step = np.random.default_rng([number, server_round]).normal(0, 0.1, layout.size)
        payload = encode("fp32", received + step.astype(np.float32), received)
        arrays = ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})
        numbers = dict.fromkeys(("train-loss", "load-s", "train-s", "peak-memory-mb"), 1.5)
        counts = {"num-examples": 30 + number, "steps": 2, "num-tokens": 30}
        content = RecordDict({"adapter": arrays, "metrics": MetricRecord({**numbers, **counts})})
        return Message(content, reply_to=message)

    return answer


def train(results: Path, base: dict[str, Any], **changes: Any) -> None:
    """Run 7, by the ServerApp's own code."""
    sizes = {"num_server_rounds": 3, "min_nodes": 2, "min_train_nodes": 2, "max_norm_ratio": 99.0}
    config = run_config(
        **sizes, lora_r=4, lora_alpha=8, model_name=base["name"], quantization=base["bits"],
        **{"fraction_evaluate": 1.0} | changes,
    )  # fmt: skip
    layout = Layout.of(base["linear_layers"], config)
    grid = StandInGrid({100 + n: site(n, base, layout, config.seed) for n in range(2)})
    listed = write_site_list(results / "sites", {100 + n: n for n in range(2)})
    folder = RunFolder(results, 7)
    facts: dict[str, Any] = {"run_id": "7", "status": "running", "versions": {"flwr": "1.36.0"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITES_DIR", str(listed))
        run(grid, config, folder, facts)
    folder.write_run(facts | {"status": "completed"})


def changed_model(models: Path, folder: Path, change: Callable[[Path, Any], Any]) -> dict[str, Any]:
    """A copy of the unquantised one, with other weights (or none) and settings; its base.json.

    ``change`` gets the copy's folder and its settings, and gives the new ones.
    """
    (source,) = models.glob("*none")
    made = Path(shutil.copytree(source, folder / "made"))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(change(made, config)))
    base: dict[str, Any] = json.loads((made / "base.json").read_text())
    content = {name: (made / name).read_bytes() for name in base["files"]}
    base["files"] = {name: len(data) for name, data in content.items()}
    base["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    (made / "base.json").write_text(json.dumps(base))
    return base


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The hub's metadata, and the text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text
