"""What tests of a round share: the server's side of it, and sites that answer in this process."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from app.server.fedavgopt import fedavgopt
from app.server.preflight import Sites
from app.server.strategy import Strategy
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.codec import decode, encode
from tests.samples import run_config
from tests.stand_in_grid import Node, StandInGrid

LINEAR = {f"model.layers.{i}.self_attn.{n}_proj": [6, 4] for i in range(12) for n in "qv"}
SITES: dict[str, Any] = {"lora_r": 2, "min_nodes": 2, "min_train_nodes": 2, "min_replies": 1}
LAYOUT = Layout.of(LINEAR, run_config(**SITES))
Reply = Callable[[int, Vector], RecordDict]  # of a partition that received this adapter
Change = Callable[[int, Vector], Vector]  # what a partition makes of the adapter it received


def sites(partitions: list[int], holdout: dict[int, int] | None = None) -> Sites:
    return Sites(
        node_of={p: 1000 + 7 * p for p in partitions},
        num_examples={p: 10 * (p + 1) for p in partitions},
        num_holdout=holdout if holdout is not None else dict.fromkeys(partitions, 5),
        fingerprint="aaaa",
        linear_layers=LINEAR,
        versions={},
        left_out={},
    )


def strategy(
    partitions: list[int],
    nodes: dict[int, Node] | None = None,
    *,
    reverse: bool = False,
    holdout: dict[int, int] | None = None,
    **changes: Any,
) -> Strategy:
    """``nodes``: by partition id."""
    config = run_config(**SITES | changes)
    known = sites(partitions, holdout)
    grid = StandInGrid({known.node_of[p]: n for p, n in (nodes or {}).items()}, reverse)
    return Strategy(grid, config, known, Layout.of(LINEAR, config), "7")


def received(message: Message, codec: str = "fp32") -> Vector:
    payload = message.content.array_records["adapter"]["payload"].numpy()
    assert payload.dtype == np.uint8
    return decode(codec, payload.tobytes(), initial_adapter(LAYOUT, run_config().seed))


def arrays_of(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})


def metrics_of(partition_id: int) -> MetricRecord:
    metrics: dict[str, Any] = {
        "partition-id": partition_id,
        "num-examples": 10 * (partition_id + 1),
        "train-loss": 1.0 + partition_id,
        "steps": 10,
        "num-tokens": 4000 + partition_id,
        "load-s": 1.5,
        "train-s": 2.5,
        "peak-memory-mb": 100.0,
    }
    return MetricRecord(metrics)


def moved(partition_id: int, adapter: Vector) -> Vector:
    """What an honest site makes of it: the adapter it got, moved by a step of its own."""
    rng = np.random.default_rng(partition_id)
    return adapter + 0.1 * rng.standard_normal(adapter.shape).astype(np.float32)


def changed(change: Change, codec: str = "fp32") -> Reply:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        payload = encode(codec, change(partition_id, adapter), adapter)
        return RecordDict({"adapter": arrays_of(payload), "metrics": metrics_of(partition_id)})

    return reply


trained = changed(moved)


def plus(step: Vector | float) -> Change:
    return lambda _, adapter: adapter + np.float32(1) * step


def node(partition_id: int, reply: Reply = trained, down: str = "fp32") -> Node:
    return lambda m: Message(reply(partition_id, received(m, down)), reply_to=m)


def failing(message: Message) -> Message:
    return Message(Error(code=1, reason="FloatingPointError (the site's log)"), reply_to=message)


def silent(message: Message) -> None:
    return None


def aggregate_of(vectors: dict[int, Vector]) -> tuple[Vector, NDArray[np.float64]]:
    """FedAvgOpt of these partitions' adapters, in their order."""
    chosen = sorted(vectors)
    updates = [list(LAYOUT.split(vectors[p]).values()) for p in chosen]
    layers, alphas = fedavgopt(updates, [min(10 * (p + 1), 160) for p in chosen])  # 10 steps of 16
    return np.concatenate([layer.ravel() for layer in layers]), alphas


ALL: dict[str, Any] = {"fraction_train": 1.0}


def with_metric(key: str, value: Any) -> Reply:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        content.metric_records["metrics"][key] = value
        return content

    return reply


def times(factor: float) -> Change:
    """An honest change, so many times as long."""
    return lambda p, a: a + np.float32(factor) * (moved(p, a) - a)


def replace_nodes(s: Strategy, new: Callable[[int], Node], only: int | None = None) -> None:
    assert isinstance(s.grid, StandInGrid)
    for partition_id, node_id in s.sites.node_of.items():
        if only in (None, partition_id):
            s.grid.nodes[node_id] = new(partition_id)


def scored(partition_id: int, adapter: Vector) -> RecordDict:
    metrics: dict[str, Any] = {
        "partition-id": partition_id,
        "num-examples": 5,
        "loss-sum": 3.0 * (partition_id + 1),
        "num-correct": partition_id,
        "num-tokens": 10 * (partition_id + 1),
    }
    return RecordDict({"metrics": MetricRecord(metrics)})
