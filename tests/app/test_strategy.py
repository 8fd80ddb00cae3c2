"""A round on the server: who takes part, what is accepted, and what comes out."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from app.adapter import Layout, Vector, initial_adapter
from app.fedavgopt import fedavgopt
from app.preflight import Sites
from app.strategy import RoundError, Strategy
from tests.samples import run_config
from tests.stand_in_grid import Node, StandInGrid

LINEAR = {f"model.layers.{i}.self_attn.{n}_proj": [6, 4] for i in range(12) for n in "qv"}
Reply = Callable[[int, Vector], RecordDict]  # of a partition that received this adapter


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
    config = run_config(**{"lora_r": 2, "min_nodes": 2, "min_train_nodes": 2} | changes)
    known = sites(partitions, holdout)
    grid = StandInGrid({known.node_of[p]: n for p, n in (nodes or {}).items()}, reverse)
    return Strategy(grid, config, known, Layout.of(LINEAR, config))


# --- sampling -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=40, unique=True),
    st.floats(0.01, 1),
    st.integers(1, 50),
    st.integers(0, 2**32),
    st.integers(1, 200),
)
def test_a_sample_is_a_function_of_seed_and_round_and_of_the_wanted_size(
    partitions: list[int], fraction: float, at_least: int, seed: int, server_round: int
) -> None:
    changes: dict[str, Any] = {
        "fraction_train": fraction,
        "min_train_nodes": at_least,
        "min_nodes": 50,
        "seed": seed,
    }
    chosen = strategy(partitions, **changes).sample(server_round)
    assert chosen == strategy(partitions[::-1], **changes).sample(server_round)
    assert set(chosen) <= set(partitions)
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) >= min(at_least, len(partitions))
    assert len(chosen) <= max(at_least, math.ceil(fraction * len(partitions)))


def test_the_recipe_samples_two_of_twenty_and_everyone_has_a_turn() -> None:
    s = strategy(list(range(20)), fraction_train=0.1, min_nodes=20)
    rounds = [s.sample(r) for r in range(1, 201)]
    assert {len(r) for r in rounds} == {2}
    counts = np.bincount(np.concatenate(rounds), minlength=20)
    assert counts.min() >= 5  # 20 expected; fewer than 5 has a chance below 1e-4
    assert counts.max() <= 45
    assert len({tuple(r) for r in rounds}) > 50


def test_another_seed_samples_other_sites() -> None:
    samples = {
        tuple(tuple(strategy(list(range(20)), seed=seed).sample(r)) for r in range(1, 6))
        for seed in range(10)
    }
    assert len(samples) == 10


def test_evaluation_takes_the_same_sites_every_round_and_only_those_with_a_holdout() -> None:
    holdout = {p: 5 * (p % 3) for p in range(20)}
    s = strategy(
        list(range(20)), holdout=holdout, fraction_evaluate=0.5, min_evaluate_nodes=2, min_nodes=20
    )
    chosen = s.evaluation_sites()
    assert len(chosen) == sum(map(bool, holdout.values())) // 2
    assert all(holdout[p] for p in chosen)
    assert s.evaluation_sites() == chosen


@pytest.mark.parametrize(("fraction", "held_out"), [(0.0, 5), (1.0, 0)])
def test_without_a_fraction_or_a_holdout_nobody_is_evaluated(
    fraction: float, held_out: int
) -> None:
    s = strategy([0, 1], holdout={0: held_out, 1: held_out}, fraction_evaluate=fraction)
    assert s.evaluation_sites() == []
    assert s.evaluate(1, np.zeros(s.layout.size, np.float32)) == {}
    assert isinstance(s.grid, StandInGrid)
    assert not s.grid.sent


# --- a round ------------------------------------------------------------------------------------


def received(message: Message) -> Vector:
    return message.content.array_records["adapter"]["flat"].numpy()


def trained(partition_id: int, adapter: Vector) -> RecordDict:
    """What an honest site replies: the adapter it got, moved by a step of its own."""
    rng = np.random.default_rng(partition_id)
    moved = adapter + 0.1 * rng.standard_normal(adapter.shape).astype(np.float32)
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
    return RecordDict(
        {"adapter": ArrayRecord({"flat": Array(moved)}), "metrics": MetricRecord(metrics)}
    )


def node(partition_id: int, reply: Reply = trained) -> Node:
    return lambda m: Message(reply(partition_id, received(m)), reply_to=m)


def failing(message: Message) -> Message:
    return Message(Error(code=1, reason="FloatingPointError (the site's log)"), reply_to=message)


def failing_without_a_reason(message: Message) -> Message:
    return Message(Error(code=1), reply_to=message)


def silent(message: Message) -> None:
    return None


ALL: dict[str, Any] = {"fraction_train": 1.0}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_round_aggregates_the_replies_whatever_their_order(reverse: bool) -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, reverse=reverse, **ALL)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)

    sent = [trained(p, start) for p in range(3)]
    vectors = [r.array_records["adapter"]["flat"].numpy() for r in sent]
    layers, alphas = fedavgopt([list(s.layout.split(v).values()) for v in vectors], [10, 20, 30])
    expected = np.concatenate([layer.ravel() for layer in layers])
    assert new.dtype == np.float32
    np.testing.assert_array_equal(new, expected)
    assert line["partitions"] == [0, 1, 2]
    assert line["alphas"] == alphas.tolist()
    assert line["num_examples"] == [10, 20, 30]
    assert line["num_tokens"] == [4000, 4001, 4002]
    assert line["train_loss"] == pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60)
    assert line["bytes_down"] == line["bytes_up"] == 3 * 4 * s.layout.size
    assert line["adapter_norm"] == pytest.approx(float(np.linalg.norm(new)))
    assert line["update_norm"] == pytest.approx(float(np.linalg.norm(new - start)))
    assert line["rejected"] == {}
    assert line["round"] == 1


def test_every_sampled_site_gets_the_adapter_with_the_round_and_the_layout() -> None:
    s = strategy([0, 1, 2, 3], {p: node(p) for p in range(4)}, round_timeout_s=33.0)
    start = initial_adapter(s.layout, 1)
    s.train_round(7, start)
    grid = s.grid
    assert isinstance(grid, StandInGrid)
    chosen = s.sample(7)
    assert len(chosen) == 2
    assert [m.metadata.dst_node_id for m in grid.sent] == [s.sites.node_of[p] for p in chosen]
    assert grid.timeouts == [33.0]
    for message in grid.sent:
        assert received(message).tobytes() == start.tobytes()
        job = message.content.config_records["job"]
        assert job["round"] == 7
        assert job["layout"] == s.layout.hash


def test_sites_that_agree_give_what_they_agree_on() -> None:
    def same(partition_id: int, adapter: Vector) -> RecordDict:
        reply = trained(0, adapter)
        reply.metric_records["metrics"]["num-examples"] = 10 * (partition_id + 1)
        return reply

    s = strategy([0, 1, 2], {p: node(p, same) for p in range(3)}, **ALL)
    start = initial_adapter(s.layout, 1)
    new, _ = s.train_round(1, start)
    agreed = trained(0, start).array_records["adapter"]["flat"].numpy()
    np.testing.assert_allclose(new, agreed, rtol=1e-5, atol=1e-7)


def with_metric(key: str, value: Any) -> Reply:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        content.metric_records["metrics"][key] = value
        return content

    return reply


def without_metric(key: str) -> Reply:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        del content.metric_records["metrics"][key]
        return content

    return reply


def with_vector(change: Callable[[Vector], Any]) -> Reply:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        vector = content.array_records["adapter"]["flat"].numpy().copy()
        content.array_records["adapter"] = ArrayRecord({"flat": Array(change(vector))})
        return content

    return reply


def with_value(value: float) -> Reply:
    def change(vector: Vector) -> Vector:
        vector[5] = value
        return vector

    return with_vector(change)


def _cut(partition_id: int, adapter: Vector) -> RecordDict:
    content = trained(partition_id, adapter)
    array = content.array_records["adapter"]["flat"]
    array.data = array.data[: len(array.data) // 2]
    return content


BAD: dict[str, Reply] = {
    "nothing": lambda p, a: RecordDict(),
    "no adapter": lambda p, a: RecordDict({"metrics": trained(p, a).metric_records["metrics"]}),
    "no metrics": lambda p, a: RecordDict({"adapter": trained(p, a).array_records["adapter"]}),
    "another record": lambda p, a: RecordDict({"adapter": ConfigRecord({"flat": 1})}),
    "no loss": without_metric("train-loss"),
    "no seconds": without_metric("train-s"),
    "loss is not a number": with_metric("train-loss", math.nan),
    "no examples": with_metric("num-examples", 0),
    "fewer than no examples": with_metric("num-examples", -5),
    "examples not a number": with_metric("num-examples", math.nan),
    "examples without end": with_metric("num-examples", math.inf),
    "examples as a list": with_metric("num-examples", [10, 20]),
    "too short": with_vector(lambda v: v[:-1]),
    "a matrix": with_vector(lambda v: v.reshape(2, -1)),
    "float64": with_vector(lambda v: v.astype(np.float64)),
    "integers": with_vector(lambda v: v.astype(np.int32)),
    "cut in transit": _cut,
    "nan": with_value(math.nan),
    "inf": with_value(math.inf),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_alone_is_left_out_and_recorded_by_its_site(kind: str) -> None:
    nodes = {0: node(0), 1: node(1, BAD[kind]), 2: node(2)}
    s = strategy([0, 1, 2], nodes, **ALL)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    assert line["partitions"] == [0, 2]
    assert set(line["rejected"]) == {"site-01"}
    assert line["rejected"]["site-01"]
    assert math.isfinite(line["train_loss"])
    others = strategy([0, 2], {0: node(0), 2: node(2)}, **ALL)
    assert new.tobytes() == others.train_round(1, start)[0].tobytes()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (failing, "FloatingPointError"),
        (failing_without_a_reason, ""),
        (silent, "round-timeout-s"),
    ],
)
def test_a_site_that_fails_or_is_late_is_left_out_with_its_reason(bad: Node, why: str) -> None:
    s = strategy([0, 1, 2], {0: node(0), 1: bad, 2: node(2)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["partitions"] == [0, 2]
    assert why in line["rejected"]["site-01"]
    assert line["bytes_down"] == 3 * 4 * s.layout.size
    assert line["bytes_up"] == 2 * 4 * s.layout.size


def test_fewer_usable_replies_than_wanted_end_the_run_naming_everyone_who_failed() -> None:
    nodes = {0: node(0), 1: silent, 2: node(2, BAD["nan"])}
    s = strategy([0, 1, 2], nodes, min_replies=2, **ALL)
    with pytest.raises(RoundError) as caught:
        s.train_round(3, initial_adapter(s.layout, 1))
    message = str(caught.value)
    for part in ("round 3", "1 usable", "min-replies", "site-01", "site-02"):
        assert part in message
    assert "site-00" not in message


# --- evaluation ---------------------------------------------------------------------------------


def scored(partition_id: int, adapter: Vector) -> RecordDict:
    metrics: dict[str, Any] = {
        "partition-id": partition_id,
        "num-examples": 5,
        "loss-sum": 3.0 * (partition_id + 1),
        "num-correct": partition_id,
        "num-tokens": 10 * (partition_id + 1),
    }
    return RecordDict({"metrics": MetricRecord(metrics)})


def evaluating(nodes: dict[int, Node]) -> Strategy:
    return strategy([0, 1, 2], nodes, fraction_evaluate=1.0)


def test_the_held_out_loss_is_a_mean_over_all_tokens_not_over_sites() -> None:
    s = evaluating({p: node(p, scored) for p in range(3)})
    result = s.evaluate(4, initial_adapter(s.layout, 1))
    assert result["eval_tokens"] == 60
    assert result["eval_loss"] == pytest.approx((3 + 6 + 9) / 60)
    assert result["eval_token_accuracy"] == pytest.approx((0 + 1 + 2) / 60)
    assert result["eval_partitions"] == [0, 1, 2]


@pytest.mark.parametrize(
    "bad", [failing, silent, node(1, lambda p, a: RecordDict())], ids=["error", "late", "malformed"]
)
def test_a_site_that_cannot_be_evaluated_is_left_out_of_the_figure(bad: Node) -> None:
    s = evaluating({0: node(0, scored), 1: bad, 2: node(2, scored)})
    result = s.evaluate(4, initial_adapter(s.layout, 1))
    assert result["eval_partitions"] == [0, 2]
    assert result["eval_loss"] == pytest.approx((3 + 9) / 40)


def test_if_nobody_can_be_evaluated_there_is_no_figure() -> None:
    s = evaluating(dict.fromkeys(range(3), silent))
    assert s.evaluate(4, initial_adapter(s.layout, 1)) == {}
