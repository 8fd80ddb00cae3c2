"""The whole app with nothing in the place of the training: what tests/benchmarks/scale.py runs.

It travels as the FAB's ``noop`` beside the real ``app``. The ServerApp's preflight, sampling,
orders, guards, aggregation and checkpoints are the real ones; it only asks more and more sites, and
notes when each round began and ended. A site answers as one with a model of Llama-3 8B's shape
would, without a model and without torch, and sends the adapter back with a small change in it.
"""

import json
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

LAYERS = {
    f"model.layers.{n}.self_attn.{name}": [out, 4096]
    for n in range(32)
    for name, out in (("q_proj", 4096), ("v_proj", 1024))
}
client = ClientApp()
server = ServerApp()  # flwr run looks for each name on a line of its own


@client.query()
def answer(message: Message, context: Context) -> Message:
    """To the preflight."""
    number = int(context.node_config["partition-id"])
    facts: dict[str, Any] = {
        "partition-id": number, "num-examples": 1700, "num-holdout": 64, "versions": "{}",
        "nonce": secrets.token_hex(16), "fingerprint": "none", "device": "none",
        "linear-layers": json.dumps(LAYERS), "turn": str(number),
    }  # fmt: skip
    return Message(RecordDict({"preflight": ConfigRecord(facts)}), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """The received adapter with a little noise, another from every site and in every round."""
    number = int(context.node_config["partition-id"])
    received = message.content.array_records["adapter"]["payload"].numpy()
    changed = np.frombuffer(received.tobytes(), np.float32).copy()
    rng = np.random.default_rng([number, cast(int, message.content.config_records["job"]["round"])])
    changed[:4096] += 1e-2 * rng.standard_normal(4096, np.float32)
    metrics: dict[str, Any] = {
        "partition-id": number, "num-examples": 1700, "train-loss": 1.0, "steps": 10,
        "num-tokens": 20_000, "load-s": 0.0, "train-s": 0.0, "peak-memory-mb": 0.0,
    }  # fmt: skip
    arrays = ArrayRecord({"payload": Array(changed.view(np.uint8))})
    content = RecordDict({"adapter": arrays, "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """``num-server-rounds`` rounds for each number of sites in ``sampled``; times go to ``out``."""
    # Here, not above: the ClientApp needs none of it.
    from app.config import RunConfig
    from app.server.checkpoint import RunFolder
    from app.server.preflight import preflight
    from app.server.strategy import Strategy
    from app.wire.adapter import Layout, initial_adapter

    given = dict(context.run_config)
    sampled, out = (cast(str, given.pop(key)) for key in ("sampled", "out"))
    config = RunConfig.from_flat(given)
    begun = time.time()
    sites = preflight(grid, config, Path(os.environ["SITES_DIR"]))
    times: dict[str, Any] = {"preflight": [begun, time.time()], "rounds": {}}
    layout = Layout.of(sites.linear_layers, config)
    folder = RunFolder(Path(os.environ["RESULTS_DIR"]), context.run_id)
    folder.write_run({"adapter_parameters": layout.size})  # what the Fleet door goes by
    adapter, server_round = initial_adapter(layout, config.seed), 0
    for count in map(int, sampled.split(",")):
        asked = replace(config, min_train_nodes=count, fraction_train=1e-9, min_replies=count)
        strategy = Strategy(grid, asked, sites, layout, str(context.run_id))
        spans = times["rounds"][count] = []
        for _ in range(config.num_server_rounds):
            server_round += 1
            started = time.time()
            adapter, _ = strategy.train_round(server_round, adapter)
            spans.append([started, time.time()])
            manifest = {"base_model_fingerprint": "none", "alphas": [], "partitions": []}
            folder.save_round(server_round, layout, adapter, asked, manifest)
    Path(out).write_text(json.dumps(times))
