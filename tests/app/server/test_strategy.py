"""A round on the server: who takes part, what is accepted, and what comes out."""

import io
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.config import CODECS, MIB, RunConfig
from app.server.exchange import REFUSED
from app.server.fedavgopt import fedavgopt
from app.server.preflight import Sites
from app.server.strategy import RoundError, Strategy
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.codec import BLOCK, decode, encode
from tests.samples import run_config
from tests.stand_in_grid import Clock, Node, StandInGrid

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


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(1, 10_000))
def test_the_first_attempt_samples_as_if_there_were_no_others(
    sites: int, wanted: int, seed: int, server_round: int
) -> None:
    wanted = min(wanted, sites)
    s = strategy(list(range(sites)), seed=seed, min_train_nodes=wanted, min_nodes=40)
    rng = np.random.default_rng([seed, server_round])
    expected = rng.choice(list(range(sites)), max(wanted, sites // 10), replace=False)
    assert s.sample(server_round) == s.sample(server_round, 0) == sorted(expected.tolist())


def test_each_attempt_samples_anew_as_a_function_of_seed_round_and_attempt() -> None:
    s = strategy(list(range(20)), min_nodes=20)
    again = strategy(list(range(20))[::-1], min_nodes=20)
    seen = {(r, a): tuple(s.sample(r, a)) for r in range(1, 11) for a in range(5)}
    assert seen == {(r, a): tuple(again.sample(r, a)) for r, a in seen}
    assert {len(chosen) for chosen in seen.values()} == {2}
    # 190 pairs of sites: 50 samples hold about 44 different ones; as few as 25 never.
    assert len(set(seen.values())) > 25
    assert sum(seen[r, 0] == seen[r, 1] for r in range(1, 11)) <= 1


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


def failing_without_a_reason(message: Message) -> Message:
    return Message(Error(code=1), reply_to=message)


def silent(message: Message) -> None:
    return None


def aggregate_of(vectors: dict[int, Vector]) -> tuple[Vector, NDArray[np.float64]]:
    """FedAvgOpt of these partitions' adapters, in their order."""
    chosen = sorted(vectors)
    updates = [list(LAYOUT.split(vectors[p]).values()) for p in chosen]
    layers, alphas = fedavgopt(updates, [min(10 * (p + 1), 160) for p in chosen])  # 10 steps of 16
    return np.concatenate([layer.ravel() for layer in layers]), alphas


ALL: dict[str, Any] = {"fraction_train": 1.0}


@pytest.mark.parametrize("shared", [True, False])
def test_a_site_that_waits_for_its_turn_on_a_shared_device_is_not_late(
    clock: Clock, shared: bool
) -> None:
    s = strategy([0, 1], round_timeout_s=30.0, max_retries=0)
    if shared:
        s.sites.turns.update({0: "one GPU", 1: "one GPU"})
    assert isinstance(s.grid, StandInGrid)
    grid = s.grid

    def after(partition_id: int) -> Node:
        work, done_s = node(partition_id), 20.0 * (partition_id + 1)
        return lambda m: grid.later(m, work, clock, done_s)

    grid.nodes |= {s.sites.node_of[p]: after(p) for p in (0, 1)}
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["partitions"] == ([0, 1] if shared else [0])
    late = {} if shared else {"site-01": "no reply within strategy.round-timeout-s = 30"}
    assert line["rejected"] == late


@pytest.mark.parametrize("reverse", [False, True])
def test_a_round_aggregates_the_replies_whatever_their_order(reverse: bool) -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, reverse=reverse, **ALL)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)

    expected, alphas = aggregate_of({p: moved(p, start) for p in range(3)})
    assert new.dtype == np.float32
    np.testing.assert_array_equal(new, expected)
    assert line["partitions"] == [0, 1, 2]
    assert line["alphas"] == alphas.tolist()
    assert line["num_examples"] == [10, 20, 30]
    assert line["train_site_losses"] == [1, 2, 3]
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
    np.testing.assert_allclose(new, moved(0, start), rtol=1e-5, atol=1e-7)


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


def with_array(array: Callable[[bytes, Vector], Array], codec: str = "fp32") -> Reply:
    """``array``: from the payload of an honest reply and from the vector it stands for."""

    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        vector = moved(partition_id, adapter)
        content = changed(moved, codec)(partition_id, adapter)
        sent = array(encode(codec, vector, adapter), vector)
        content.array_records["adapter"] = ArrayRecord({"payload": sent})
        return content

    return reply


def with_bytes(change: Callable[[bytes], bytes], codec: str = "fp32") -> Reply:
    return with_array(lambda b, _: Array(np.frombuffer(change(b), np.uint8)), codec)


def with_vector(change: Callable[[Vector], NDArray[Any]]) -> Reply:
    return with_array(lambda _, v: Array(np.frombuffer(change(v).tobytes(), np.uint8)))


def with_value(value: float) -> Reply:
    def change(vector: Vector) -> Vector:
        vector[5] = value
        return vector

    return with_vector(change)


def _cut(partition_id: int, adapter: Vector) -> RecordDict:
    content = trained(partition_id, adapter)
    array = content.array_records["adapter"]["payload"]
    array.data = array.data[: len(array.data) // 2]
    return content


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


class _Pickled:
    opened = False

    def __setstate__(self, state: object) -> None:
        _Pickled.opened = True


def _huge(payload: bytes, _: Vector) -> Array:
    """An array that says to hold a terabyte."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(file, header)
    return Array("uint8", (1 << 40,), "numpy.ndarray", file.getvalue() + payload)


def _pickle(_: bytes, vector: Vector) -> Array:
    objects = np.array([_Pickled()] * vector.size, dtype=object)
    return Array("object", (vector.size,), "numpy.ndarray", _npy(objects))


def times(factor: float) -> Change:
    """An honest change, so many times as long."""
    return lambda p, a: a + np.float32(factor) * (moved(p, a) - a)


def zip_bomb(gigabytes: int) -> bytes:
    """A valid zlib stream of zeros that is a thousandth of what it unfolds to."""
    packer = zlib.compressobj(9, wbits=-15)
    part = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    parts = gigabytes << 6
    check = ((parts << 24) % 65521) << 16 | 1
    return b"\x78\x01" + part * parts + b"\x03\x00" + check.to_bytes(4, "big")


def scales_of(value: float) -> Callable[[bytes], bytes]:
    """An int8 payload with the first block's bfloat16 scale replaced."""

    def change(payload: bytes) -> bytes:
        plain = bytearray(zlib.decompress(payload))
        blocks = -(-LAYOUT.size // BLOCK)
        plain[0], plain[blocks] = np.array([value], ">f4").tobytes()[:2]
        return zlib.compress(bytes(plain))

    return change


BAD: dict[str, Reply] = {
    "nothing": lambda p, a: RecordDict(),
    "no adapter": lambda p, a: RecordDict({"metrics": metrics_of(p)}),
    "no metrics": lambda p, a: RecordDict({"adapter": trained(p, a).array_records["adapter"]}),
    "another record": lambda p, a: RecordDict(
        {"adapter": ConfigRecord({"payload": 1}), "metrics": metrics_of(p)}
    ),
    "another array": lambda p, a: RecordDict(
        {"adapter": ArrayRecord({"flat": Array(moved(p, a))}), "metrics": metrics_of(p)}
    ),
    "no loss": without_metric("train-loss"),
    "no seconds": without_metric("train-s"),
    "loss is not a number": with_metric("train-loss", math.nan),
    "a loss that adds up to infinity": with_metric("train-loss", 1e308),
    "a loss below zero": with_metric("train-loss", -1.0),
    "a loss that no model has": with_metric("train-loss", 101.0),
    "tokens without end": with_metric("num-tokens", 1e308),
    "steps backwards": with_metric("steps", -3),
    "more steps than its rows make": with_metric("steps", 11),
    "no examples": with_metric("num-examples", 0),
    "fewer than no examples": with_metric("num-examples", -5),
    "examples not a number": with_metric("num-examples", math.nan),
    "examples without end": with_metric("num-examples", math.inf),
    "more examples than the site has": with_metric("num-examples", 10_000),
    "examples as a list": with_metric("num-examples", [10, 20]),
    "too short": with_vector(lambda v: v[:-1]),
    "too long": with_vector(lambda v: np.append(v, np.float32(0))),
    "a byte short": with_bytes(lambda b: b[:-1]),
    "a byte long": with_bytes(lambda b: b + b"\0"),
    "empty": with_bytes(lambda b: b""),
    "a matrix": with_array(lambda b, _: Array(np.frombuffer(b, np.uint8).reshape(2, -1))),
    "a single number": with_array(lambda b, _: Array(np.array(7, np.uint8))),
    "float32 instead of bytes": with_array(lambda _, v: Array(v)),
    "float64 instead of bytes": with_array(lambda _, v: Array(v.astype(np.float64))),
    "signed bytes": with_array(lambda b, _: Array(np.frombuffer(b, np.int8))),
    "float64": with_vector(lambda v: v.astype(np.float64)),
    "integers": with_array(lambda _, v: Array(v.astype(np.int32))),
    "half the precision": with_vector(lambda v: v.astype(np.float16)),
    "pickled": with_array(_pickle),
    "a terabyte, it says": with_array(_huge),
    "an array of another kind": with_array(
        lambda b, v: Array("uint8", (len(b),), "no.such.kind", b)
    ),
    "cut in transit": _cut,
    "nan": with_value(math.nan),
    "inf": with_value(math.inf),
    "minus inf": with_value(-math.inf),
    "1e6 times its size": changed(times(1e6)),
    "above max-update-norm": changed(times(60)),  # 100 and more, if not 10 times the others
    "too large to square in float32": changed(times(1e30)),
    "bf16 in a run of fp32": with_bytes(lambda b: b, "bf16"),
    "int8 in a run of fp32": with_bytes(lambda b: b, "int8"),
    "int4 in a run of fp32": with_bytes(lambda b: b, "int4"),
}
# In a run of int8.
BAD_INT8: dict[str, Reply] = {
    "fp32": changed(moved),
    "bf16": changed(moved, "bf16"),
    "int4": changed(moved, "int4"),
    "cut short": with_bytes(lambda b: b[:-1], "int8"),
    "cut in half": with_bytes(lambda b: b[: len(b) // 2], "int8"),
    "empty": with_bytes(lambda b: b"", "int8"),
    "appended to": with_bytes(lambda b: b + b"\0", "int8"),
    "twice": with_bytes(lambda b: b + b, "int8"),
    "a value too many": with_bytes(lambda b: zlib.compress(zlib.decompress(b) + b"\1"), "int8"),
    "a value too few": with_bytes(lambda b: zlib.compress(zlib.decompress(b)[:-1]), "int8"),
    "not packed": with_bytes(zlib.decompress, "int8"),
    "a scale is nan": with_bytes(scales_of(math.nan), "int8"),
    "a scale is inf": with_bytes(scales_of(math.inf), "int8"),
    "a scale of 1e38": with_bytes(scales_of(1e38), "int8"),
    "1e6 times its size": changed(times(1e6), "int8"),
    "a bomb": with_bytes(lambda b: zip_bomb(1), "int8"),
}


def is_left_out_alone(reply: Reply, codec: str, **changes: Any) -> str:
    """Of three sites the second sends ``reply``. The reason recorded."""
    good = changed(moved, codec)
    nodes = {0: node(0, good), 1: node(1, reply), 2: node(2, good)}
    s = strategy([0, 1, 2], nodes, codec_up=codec, **ALL | changes)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    assert line["partitions"] == [0, 2]
    assert set(line["rejected"]) == {"site-01"}
    assert line["rejected"]["site-01"]
    assert line["attempts"] == 1
    assert math.isfinite(line["train_loss"])
    others = strategy([0, 2], {0: node(0, good), 2: node(2, good)}, codec_up=codec, **ALL)
    alone, line_alone = others.train_round(1, start)
    assert new.tobytes() == alone.tobytes()
    for key in ("client_update_norms", "client_cosine", "weight_sum", "num_examples"):
        assert line[key] == line_alone[key], key
    return str(line["rejected"]["site-01"])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_alone_is_left_out_and_recorded_by_its_site(kind: str) -> None:
    is_left_out_alone(BAD[kind], "fp32")
    assert not _Pickled.opened


@pytest.mark.parametrize("kind", BAD_INT8)
def test_a_bad_coarse_reply_alone_is_left_out_and_recorded_by_its_site(kind: str) -> None:
    assert is_left_out_alone(BAD_INT8[kind], "int8")


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_a_small_payload_that_unfolds_to_gigabytes_is_not_unfolded(codec: str) -> None:
    bomb = zip_bomb(4)
    assert len(bomb) < 5 * MIB
    tracemalloc.start()
    try:
        why = is_left_out_alone(with_bytes(lambda b: bomb, codec), codec)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "adapter" in why
    assert peak < 48 * MIB  # copies of the bomb as it is


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=3000))
def test_whatever_bytes_a_site_sends_it_is_used_or_left_out_never_a_crash(
    codec: str, data: bytes
) -> None:
    good = changed(moved, codec)
    nodes = {0: node(0, good), 1: node(1, with_bytes(lambda b: data))}
    s = strategy([0, 1], nodes, codec_up=codec, **ALL)
    new, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert 0 in line["partitions"]
    assert ("site-01" in line["rejected"]) == (1 not in line["partitions"])
    assert np.isfinite(new).all()


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=3000))
def test_whatever_a_site_packs_it_is_used_or_left_out_never_a_crash(
    codec: str, data: bytes
) -> None:
    size = len(zlib.decompress(encode(codec, np.ones(480, np.float32), np.zeros(480, np.float32))))
    plain = (data * (size // max(len(data), 1) + 1))[:size] or bytes(size)
    nodes = {
        0: node(0, changed(moved, codec)),
        1: node(1, with_bytes(lambda b: zlib.compress(plain))),
    }
    s = strategy([0, 1], nodes, codec_up=codec, **ALL)
    assert s.layout.size == 480
    new, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["partitions"]
    assert np.isfinite(new).all()


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


def test_what_a_site_sends_once_is_counted_once_whatever_it_calls_it() -> None:
    def often(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        record = content.array_records["adapter"]
        for n in range(1000):
            record[f"payload {n}"] = record["payload"]
        return content

    s = strategy([0, 1], {0: node(0), 1: node(1, often)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["bytes_up"] == 2 * 4 * s.layout.size


def test_a_site_whose_key_is_rotated_in_the_middle_of_a_run_keeps_its_name() -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, **ALL)
    adapter, _ = s.train_round(1, initial_adapter(s.layout, 1))
    assert isinstance(s.grid, StandInGrid)
    s.grid.revoked = {s.sites.node_of[1]}
    _, line = s.train_round(2, adapter)
    assert line["partitions"] == [0, 2]
    assert line["rejected"] == {"site-01": REFUSED}


def test_fewer_usable_replies_than_wanted_end_the_run_naming_everyone_who_failed() -> None:
    nodes = {0: node(0), 1: silent, 2: node(2, BAD["nan"])}
    s = strategy([0, 1, 2], nodes, min_replies=2, **ALL)
    with pytest.raises(RoundError) as caught:
        s.train_round(3, initial_adapter(s.layout, 1))
    message = str(caught.value)
    for part in ("round 3", "1 usable", "min-replies", "site-01", "site-02"):
        assert part in message
    assert "site-00" not in message


# --- another attempt ----------------------------------------------------------------------------


def of_twenty(bad: set[int], reply: Node, **changes: Any) -> tuple[Strategy, StandInGrid]:
    nodes = {p: reply if p in bad else node(p) for p in range(20)}
    s = strategy(list(range(20)), nodes, min_nodes=20, **changes)
    assert isinstance(s.grid, StandInGrid)
    return s, s.grid


def asked(s: Strategy, grid: StandInGrid) -> list[int]:
    partition_of = {n: p for p, n in s.sites.node_of.items()}
    return [partition_of[m.metadata.dst_node_id] for m in grid.sent]


@pytest.mark.parametrize(
    "bad", [failing, silent, node(0, BAD["nan"])], ids=["error", "late", "nan"]
)
def test_a_round_without_usable_replies_is_repeated_with_the_next_sample(bad: Node) -> None:
    first, second = (set(strategy(list(range(20))).sample(4, a)) for a in (0, 1))
    assert not first & second  # or this test needs another round
    s, grid = of_twenty(first, bad, max_share=1.0)
    new, line = s.train_round(4, initial_adapter(s.layout, 1))
    assert asked(s, grid) == sorted(first) + sorted(second)
    assert line["attempts"] == 2
    assert line["partitions"] == sorted(second)
    assert sorted(line["rejected"]) == [f"site-{p:02}" for p in sorted(first)]
    assert all(line["rejected"].values())
    # Each attempt starts from the same adapter, and what failed leaves no trace in the result.
    assert len({m.content.array_records["adapter"]["payload"].data for m in grid.sent}) == 1
    expected, _ = aggregate_of({p: moved(p, initial_adapter(s.layout, 1)) for p in second})
    assert new.tobytes() == expected.tobytes()


def test_one_usable_reply_is_enough_unless_more_are_wanted() -> None:
    one = {strategy(list(range(20))).sample(1)[0]}
    s, grid = of_twenty(one, failing, min_replies=1)
    assert s.train_round(1, initial_adapter(s.layout, 1))[1]["attempts"] == 1
    assert len(grid.sent) == 2
    s, grid = of_twenty(one, failing, min_replies=2)
    assert s.train_round(1, initial_adapter(s.layout, 1))[1]["attempts"] == 2
    assert len(grid.sent) == 4


def test_the_bytes_of_all_attempts_are_counted_those_of_unused_replies_as_well() -> None:
    one = {strategy(list(range(20))).sample(1)[0]}
    s, _ = of_twenty(one, failing, min_replies=2)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["attempts"] == 2
    assert line["bytes_down"] == 4 * 4 * s.layout.size
    assert line["bytes_up"] == 3 * 4 * s.layout.size
    assert s.bytes_sent == line["bytes_down"] + line["bytes_up"]


def refusing_in_words(message: Message) -> Message:
    """The SuperLink's words in a site's mouth: it got the order all the same."""
    return Message(Error(code=1, reason=REFUSED), reply_to=message)


def test_an_order_that_the_superlink_refused_is_not_counted_as_sent() -> None:
    nodes = {0: node(0), 1: node(1), 2: refusing_in_words}
    s = strategy([0, 1, 2], nodes, fraction_evaluate=1.0, max_retries=0, **ALL)
    assert isinstance(s.grid, StandInGrid)
    s.grid.revoked = {s.sites.node_of[1]}
    kept: list[int] = []
    s.keep = kept.append
    each = 4 * s.layout.size
    adapter, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["rejected"] == {"site-01": REFUSED, "site-02": REFUSED}
    assert (line["bytes_down"], line["bytes_up"]) == (2 * each, each)
    assert s.bytes_sent == 3 * each
    s.grid.nodes[s.sites.node_of[0]] = node(0, scored)
    assert s.evaluate(1, adapter)["eval_bytes_down"] == 2 * each
    assert s.bytes_sent == kept[-1] == 5 * each


def test_what_is_sent_and_what_comes_is_kept_at_once(clock: Clock) -> None:
    """A SuperLink that dies while it waits for a site has the others' bytes on its disk."""
    s = strategy([0, 1], {0: node(0), 1: silent}, round_timeout_s=33.0, max_retries=0, **ALL)
    kept: list[tuple[int, float]] = []
    s.keep = lambda size: kept.append((size, clock.now))
    s.train_round(1, initial_adapter(s.layout, 1))
    each = 4 * s.layout.size
    assert kept == [(2 * each, 0.0), (3 * each, 0.0)]


def test_a_site_that_failed_once_may_take_part_in_the_next_attempt() -> None:
    calls: list[int] = []

    def second_time_lucky(partition_id: int) -> Node:
        def answer(message: Message) -> Message | Exception | None:
            calls.append(partition_id)
            at_first = calls.count(partition_id) == 1
            return (failing if at_first else node(partition_id))(message)

        return answer

    s = strategy([0, 1], {p: second_time_lucky(p) for p in (0, 1)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert calls == [0, 1, 0, 1]
    assert line["partitions"] == [0, 1]
    assert line["attempts"] == 2
    assert sorted(line["rejected"]) == ["site-00", "site-01"]  # as it was, once


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_after_max_retries_the_round_fails_and_names_everyone(max_retries: int) -> None:
    s, grid = of_twenty(set(range(20)), failing, max_retries=max_retries)
    with pytest.raises(RoundError) as caught:
        s.train_round(2, initial_adapter(s.layout, 1))
    samples = [s.sample(2, a) for a in range(max_retries + 1)]
    assert asked(s, grid) == [p for sample in samples for p in sample]
    message = str(caught.value)
    everyone = {p for sample in samples for p in sample}
    for partition_id in range(20):
        assert (f"site-{partition_id:02}: " in message) == (partition_id in everyone)
    for part in ("round 2", "0 usable", "min-replies", "max-retries", "FloatingPointError"):
        assert part in message
    assert "\n" not in message
    assert s.bytes_sent == len(grid.sent) * 4 * s.layout.size  # also of a round that failed


# --- changes out of all proportion --------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("honest_rounds", [0, 1, 4])
@pytest.mark.parametrize("factor", [1e6, 12.0])
def test_of_two_sites_only_the_one_out_of_proportion_is_left_out(
    bad: int, honest_rounds: int, factor: float
) -> None:
    large = changed(times(factor))
    rounds = 0

    def turning(partition_id: int, adapter: Vector) -> RecordDict:
        return (large if rounds >= honest_rounds else trained)(partition_id, adapter)

    nodes = {p: node(p, turning if p == bad else trained) for p in (0, 1)}
    # Large enough for factor 12: the relative bound must see it.
    s = strategy([0, 1], nodes, max_update_norm=1e4, **ALL)
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, honest_rounds + 3):
        adapter, line = s.train_round(server_round, adapter)
        if rounds < honest_rounds:
            assert line["partitions"] == [0, 1]
            assert line["rejected"] == {}
        else:
            assert line["partitions"] == [1 - bad]
            assert set(line["rejected"]) == {f"site-{bad:02}"}
        rounds += 1
    if factor == 12.0:
        assert "strategy.max-norm-ratio = 10" in line["rejected"][f"site-{bad:02}"]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.data(), st.floats(20, 1e6))
def test_up_to_half_of_the_sites_out_of_proportion_are_left_out_and_no_other(
    k: int, data: st.DataObject, factor: float
) -> None:
    bad = data.draw(st.sets(st.integers(0, k - 1), max_size=k // 2))
    large = changed(times(factor))
    nodes = {p: node(p, large if p in bad else trained) for p in range(k)}
    s = strategy(list(range(k)), nodes, max_update_norm=1e9, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert set(line["partitions"]) == set(range(k)) - bad
    assert set(line["rejected"]) == {f"site-{p:02}" for p in bad}
    norms = [float(np.linalg.norm(moved(p, np.zeros(480, np.float32)))) for p in line["partitions"]]
    assert line["client_update_norms"] == pytest.approx(norms, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1, 10), min_size=1, max_size=6), st.sampled_from([1e-6, 1.0, 20.0]))
def test_changes_within_the_ratio_of_each_other_all_take_part(
    factors: list[float], unit: float
) -> None:
    step = np.full(480, 480**-0.5, np.float32)  # of norm 1
    nodes = {p: node(p, changed(plus(unit * f * step * 0.99))) for p, f in enumerate(factors)}
    s = strategy(list(range(len(factors))), nodes, max_update_norm=1e4, **ALL)
    _, line = s.train_round(1, np.zeros(480, np.float32))
    assert line["rejected"] == {}
    assert len(line["partitions"]) == len(factors)


@pytest.mark.parametrize("step", [0.0, 1e-3], ids=["zero", "equal"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_changes_that_are_all_equal_or_all_zero_are_none_out_of_proportion(
    step: float, k: int
) -> None:
    s = strategy(list(range(k)), {p: node(p, changed(plus(step))) for p in range(k)}, **ALL)
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 4):
        adapter, line = s.train_round(server_round, adapter)
        assert line["partitions"] == list(range(k))
        assert line["rejected"] == {}
        assert np.isfinite(adapter).all()


def test_a_site_that_changes_nothing_puts_no_other_out_of_proportion() -> None:
    s = strategy([0, 1], {0: node(0, changed(plus(0.0))), 1: node(1)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["rejected"] == {}


def test_once_there_is_a_usual_change_even_a_site_alone_is_held_to_it() -> None:
    s = strategy([0], {0: node(0)}, max_retries=0, max_update_norm=1e9, **ALL)
    start = initial_adapter(s.layout, 1)
    for server_round in (1, 2, 3):
        s.train_round(server_round, start)
    assert isinstance(s.grid, StandInGrid)
    s.grid.nodes[s.sites.node_of[0]] = node(0, changed(times(1e3)))
    with pytest.raises(RoundError, match=r"site-00: .*max-norm-ratio"):
        s.train_round(4, start)
    # What was left out is no measure for what comes later.
    s.grid.nodes[s.sites.node_of[0]] = node(0)
    s.train_round(5, start)
    s.grid.nodes[s.sites.node_of[0]] = node(0, changed(times(1e3)))
    with pytest.raises(RoundError, match=r"site-00: .*max-norm-ratio"):
        s.train_round(6, start)


def test_after_a_resume_a_site_alone_is_held_to_the_lengths_of_before() -> None:
    alone: dict[str, Any] = {"max_retries": 0, "max_update_norm": 1e9, **ALL}
    s = strategy([0], {0: node(0)}, **alone)
    start = initial_adapter(s.layout, 1)
    _, line = s.train_round(1, start)
    s = strategy([0], {0: node(0, changed(times(1e3)))}, **alone)
    s.take_up([json.loads(json.dumps(line | s.budget()))])
    with pytest.raises(RoundError, match=r"site-00: .*max-norm-ratio"):
        s.train_round(2, start)


@pytest.mark.parametrize(("factor", "used"), [(0.999, True), (1.001, False)])
def test_no_change_may_be_longer_than_max_update_norm(factor: float, used: bool) -> None:
    step = np.full(480, factor * 3 * 480**-0.5, np.float32)
    nodes = {p: node(p, changed(plus(step))) for p in range(2)}  # none out of proportion
    s = strategy([0, 1], nodes, max_update_norm=3.0, max_retries=0, **ALL)
    if used:
        assert s.train_round(1, initial_adapter(s.layout, 1))[1]["rejected"] == {}
    else:
        with pytest.raises(RoundError, match="max-update-norm = 3") as caught:
            s.train_round(1, initial_adapter(s.layout, 1))
        assert "site-00" in str(caught.value)
        assert "site-01" in str(caught.value)


# --- lengths at other learning rates and with other numbers of steps ------------------------------


def adam(
    s: Strategy, partition_id: int, factor: float = 1.0, growth: float = 0.75, claim: int = 0
) -> Node:
    """A site whose change is ``factor`` times as long as Adam's would be in its round.

    Honest lengths go with the learning rate and with steps to the power of ``growth``. ``claim``:
    rows, and so steps, that it says it took instead.
    """
    config, rows = s.config, 10 * (partition_id + 1)

    def answer(message: Message) -> Message:
        server_round = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
        rng = np.random.default_rng([partition_id, server_round])
        direction = rng.standard_normal(480) / 480**0.5  # about 1 long
        length = factor * 3000 * config.learning_rate(server_round) * config.steps(rows) ** growth
        change = plus((length * direction).astype(np.float32))
        content = changed(change)(partition_id, received(message))
        content.metric_records["metrics"]["num-examples"] = claim or rows
        content.metric_records["metrics"]["steps"] = config.steps(claim or rows)
        return Message(content, reply_to=message)

    return answer


def of_the_reference(sites: int = 20, growth: float = 0.75, **changes: Any) -> Strategy:
    """Two honest sites a round, the learning rate from 5e-5 to 1e-6 in ten rounds."""
    nodes = dict.fromkeys(range(sites), silent)
    s = strategy(list(range(sites)), {**nodes}, min_nodes=sites, max_retries=0, **changes)
    assert (s.config.lr_max, s.config.lr_min, s.config.num_server_rounds) == (5e-5, 1e-6, 10)
    replace_nodes(s, lambda p: adam(s, p, growth=growth))
    return s


def replace_nodes(s: Strategy, new: Callable[[int], Node], only: int | None = None) -> None:
    assert isinstance(s.grid, StandInGrid)
    for partition_id, node_id in s.sites.node_of.items():
        if only in (None, partition_id):
            s.grid.nodes[node_id] = new(partition_id)


@pytest.mark.parametrize("resumed_after", [None, 1, 5, 9])
@pytest.mark.parametrize("factor", [1.0, 12.0, 255.0])
def test_in_round_10_a_change_of_12_times_the_honest_length_is_refused_and_no_honest_one_ever(
    factor: float, resumed_after: int | None
) -> None:
    s = of_the_reference()
    adapter, lines = initial_adapter(s.layout, 1), []
    for server_round in range(1, 10):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round
        lines.append(json.loads(json.dumps(line | s.budget())))
        if server_round == resumed_after:
            s = of_the_reference()
            s.take_up(lines)
    bad = s.sample(10)[0]
    replace_nodes(s, lambda p: adam(s, p, factor), bad)
    _, line = s.train_round(10, adapter)
    if factor == 1:
        assert line["rejected"] == {}
    else:
        assert list(line["rejected"]) == [f"site-{bad:02d}"]
        assert "strategy.max-norm-ratio = 10" in line["rejected"][f"site-{bad:02d}"]


@pytest.mark.parametrize("growth", [0.5, 0.75, 1.0])
def test_sites_of_30_times_the_steps_of_others_all_take_part_in_every_round(growth: float) -> None:
    """Whole epochs: rows from 10 to 320, batches of 2, so 5 to 160 steps and more lengths yet."""
    s = of_the_reference(32, growth, max_steps=-1, num_train_epochs=1, batch_size=2)
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 11):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round


@pytest.mark.parametrize("growth", [0.75, 1.0])
def test_a_site_of_30_times_the_steps_of_the_only_other_one_takes_part(growth: float) -> None:
    s = strategy([0, 31], max_retries=0, max_steps=-1, num_train_epochs=1, batch_size=2)
    replace_nodes(s, lambda p: adam(s, p, growth=growth))
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 4):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round


def test_steps_that_a_site_claims_make_room_for_eight_times_the_length_and_no_more() -> None:
    s = of_the_reference(max_steps=-1, num_train_epochs=1, batch_size=2)
    s.sites.num_examples.update(dict.fromkeys(s.sites.num_examples, 10**9 - 1))
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 10):
        adapter, line = s.train_round(server_round, adapter)
    bad = s.sample(10)[0]
    replace_nodes(s, lambda p: adam(s, p, 200, claim=10**9 - 1), bad)
    _, line = s.train_round(10, adapter)
    assert list(line["rejected"]) == [f"site-{bad:02d}"]


def test_a_learning_rate_of_nothing_lets_nothing_pass_that_is_longer_than_a_late_rest() -> None:
    s = of_the_reference()
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 10):
        adapter, _ = s.train_round(server_round, adapter)
    s.config = replace(s.config, lr_min=0.0)
    assert s.config.learning_rate(10) == 0
    usual, bad = max(c.norm for c in s.changes), s.sample(10)[0]
    for part, fine in ((0.1, True), (0.5, False)):  # int4 leaves out a tenth
        step = np.full(480, part * usual * 480**-0.5, np.float32)
        replace_nodes(s, lambda p: node(p, changed(plus(0.0))))
        replace_nodes(s, partial(node, reply=changed(plus(step))), bad)
        _, line = s.train_round(10, adapter)
        assert line["rejected"].keys() == (set() if fine else {f"site-{bad:02d}"})


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_clipped_and_noisy_changes_are_as_long_in_round_10_as_in_round_1_and_take_part(
    noise: float,
) -> None:
    s = of_the_reference(clip_norm=0.3, noise_multiplier=noise)

    def private(message: Message) -> Message:
        rng = np.random.default_rng(int(message.content.config_records["job"]["round"]))  # type: ignore[arg-type]
        step = rng.standard_normal(480) * 0.3 / 480**0.5
        reply = changed(plus(step.astype(np.float32)))
        return Message(reply(1, received(message)), reply_to=message)

    replace_nodes(s, lambda _: private)
    s.sites.num_examples.update(dict.fromkeys(s.sites.num_examples, 20))
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 11):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [10, -1])
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_site_that_claims_a_billion_rows_counts_as_much_as_all_others_together_at_most(
    name: str, max_steps: int
) -> None:
    config = run_config(**SITES, max_steps=max_steps)

    def greedy(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        rows = 10**9 - 1 if partition_id == 2 else 10 * (partition_id + 1)
        content.metric_records["metrics"]["num-examples"] = rows
        content.metric_records["metrics"]["steps"] = config.steps(rows)
        return content

    nodes = {p: node(p, greedy) for p in range(3)}
    s = strategy([0, 1, 2], nodes, strategy_name=name, max_steps=max_steps, **ALL)
    s.sites.num_examples[2] = 10**9 - 1
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    assert line["num_examples"] == [10, 20, 10**9 - 1]  # as it said, for all to see
    assert line["shares"] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    vectors = np.stack([moved(p, start) for p in range(3)]).astype(float)
    np.testing.assert_allclose(new, np.array(line["shares"]) @ vectors, atol=1e-6)
    assert line["train_loss"] == pytest.approx(1 / 6 + 2 / 3 + 3 / 2)


def test_rows_that_a_round_did_not_use_weigh_nothing() -> None:
    """Ten steps of 16 rows: 160 of 10,000 count, and all of 100."""
    s = strategy([0, 1], {p: node(p) for p in range(2)}, max_share=1.0, **ALL)
    s.sites.num_examples.update({0: 10_000, 1: 100})
    rows = {0: 10_000, 1: 100}
    replace_nodes(s, lambda p: node(p, with_metric("num-examples", rows[p])))
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["shares"] == pytest.approx([160 / 260, 100 / 260])


# --- what a round's line says -------------------------------------------------------------------

UNIT = np.eye(480, dtype=np.float32)


@pytest.mark.parametrize(
    ("steps", "cosine"),
    [
        ([UNIT[3], UNIT[3]], 1.0),
        ([UNIT[3], 2 * UNIT[3], 5 * UNIT[3]], 1.0),
        ([UNIT[3], UNIT[7]], 0.0),
        ([UNIT[3], -UNIT[3]], -1.0),
        ([UNIT[3], UNIT[3] + UNIT[9]], 0.5**0.5),
        ([UNIT[3], UNIT[3], UNIT[7]], 1 / 3),
        ([UNIT[3], 0 * UNIT[3]], 0.0),
        ([UNIT[3]], None),
    ],
    ids=["identical", "parallel", "orthogonal", "opposite", "45 degrees", "three", "zero", "one"],
)
def test_the_cosine_between_the_sites_changes(steps: list[Vector], cosine: float | None) -> None:
    nodes = {p: node(p, changed(plus(s))) for p, s in enumerate(steps)}
    s = strategy(list(nodes), nodes, strategy_name="fedavg", **ALL)
    # Their adapters have nearly the same direction; it is their changes that count.
    _, line = s.train_round(1, np.full(480, 64, np.float32))
    if cosine is None:
        assert line["client_cosine"] is None
    else:
        assert line["client_cosine"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgopt", "fedavgopt-delta"])
def test_every_strategy_says_what_the_sites_weights_add_up_to(name: str) -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, strategy_name=name, **ALL)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    shares = np.array(line["alphas"]) * [10, 20, 30] / 60
    assert line["weight_sum"] == pytest.approx(float(shares.sum()))
    vectors = np.stack([moved(p, start) for p in range(3)]).astype(float)
    if name in ("fedavg", "fedprox"):
        assert line["alphas"] == [1.0, 1.0, 1.0]
        assert line["weight_sum"] == pytest.approx(1)
    else:
        assert line["weight_sum"] > 1.01  # it undoes what averaging shortens
    origin = start.astype(float) if name == "fedavgopt-delta" else np.zeros(480)
    np.testing.assert_allclose(new, origin + shares @ (vectors - origin), atol=1e-5)


def test_the_norm_of_the_weight_change_is_that_of_the_matrices_themselves() -> None:
    alpha = 7
    s = strategy([0, 1], {p: node(p) for p in range(2)}, lora_alpha=alpha, **ALL)
    start = initial_adapter(s.layout, 1)
    assert not any(a.any() for n, a in s.layout.split(start).items() if "lora_B" in n)
    new, line = s.train_round(1, start)
    arrays, squares = s.layout.split(new), 0.0
    for name in LINEAR:
        a, b = (arrays[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        change = alpha / 2 * b.astype(float) @ a.astype(float)
        assert change.shape == (6, 4)
        squares += float((change**2).sum())
    assert line["weight_change_norm"] == pytest.approx(squares**0.5, rel=1e-9)
    norms = [float(np.linalg.norm(moved(p, start) - start)) for p in (0, 1)]
    assert line["client_update_norms"] == pytest.approx(norms, rel=1e-5)


def test_the_budget_is_used_up_by_every_payload_both_ways() -> None:
    down = "int4"
    nodes = {p: node(p, changed(moved, "int8"), down) for p in range(3)}
    s = strategy(
        [0, 1, 2], nodes, codec_down=down, codec_up="int8", budget_mb=0.5, fraction_evaluate=1.0,
        **ALL,
    )  # fmt: skip
    assert s.budget() == {"mb_sent": 0.0, "mb_left": 0.5}
    assert isinstance(s.grid, StandInGrid)
    scoring = {n: node(p, scored, down) for p, n in s.sites.node_of.items()}
    training, adapter = s.grid.nodes, initial_adapter(s.layout, 1)
    lines: list[dict[str, Any]] = []
    total = 0
    for server_round in (1, 2):
        s.grid.nodes = training
        before = adapter
        adapter, line = s.train_round(server_round, before)
        payload = encode(down, before, initial_adapter(s.layout, s.config.seed))
        held = received_of(payload, s.config)
        up = sum(len(encode("int8", moved(p, held), held)) for p in range(3))
        assert line["bytes_down"] == 3 * len(payload)
        assert line["bytes_up"] == up
        s.grid.nodes = scoring
        line |= s.evaluate(server_round, adapter)
        payload = encode(down, adapter, initial_adapter(s.layout, s.config.seed))
        assert line["eval_bytes_down"] == 3 * len(payload)
        total += line["bytes_down"] + line["bytes_up"] + line["eval_bytes_down"]
        lines.append(line | s.budget())
        assert lines[-1]["mb_sent"] == pytest.approx(total / MIB, rel=1e-12)
        assert lines[-1]["mb_sent"] + lines[-1]["mb_left"] == pytest.approx(0.5, rel=1e-12)
    assert lines[0]["mb_sent"] < lines[1]["mb_sent"]


# --- coarse transfers ---------------------------------------------------------------------------


def received_of(payload: bytes, config: RunConfig) -> Vector:
    return decode(config.down, payload, initial_adapter(LAYOUT, config.seed))


def far_from_the_start() -> Vector:
    """Where a run may be after some rounds: the initial adapter moved."""
    return moved(99, initial_adapter(LAYOUT, run_config().seed))


COARSE = ("bf16", "int8", "int4")


@pytest.mark.parametrize("name", ["fedavgopt", "fedavg", "fedavgopt-delta"])
@pytest.mark.parametrize("up", ["fp32", "int4"])
@pytest.mark.parametrize("down", COARSE)
def test_sites_that_change_nothing_leave_the_adapter_as_it_was(
    down: str, up: str, name: str
) -> None:
    nodes = {p: node(p, changed(plus(0.0), up), down) for p in range(2)}
    s = strategy([0, 1], nodes, codec_down=down, codec_up=up, strategy_name=name, **ALL)
    start = far_from_the_start()
    coarse = received_of(encode(down, start, initial_adapter(LAYOUT, s.config.seed)), s.config)
    lost = float(np.abs(coarse - start).max())
    assert lost > 1e-4  # the sites do get a coarse copy
    adapter = start
    for server_round in range(1, 21):
        adapter, line = s.train_round(server_round, adapter)
        assert line["partitions"] == [0, 1]
    # A last digit of float32 a round, at most.
    np.testing.assert_allclose(adapter, start, rtol=0, atol=20 * 2**-23)


@pytest.mark.parametrize("down", ["fp32", *COARSE])
def test_the_roundings_on_the_way_down_do_not_add_up(down: str) -> None:
    rng = np.random.default_rng(7)
    steps = 0.01 * rng.standard_normal((12, 480)).astype(np.float32)
    current = 0

    def step(partition_id: int, adapter: Vector) -> Vector:
        return np.asarray(adapter + steps[current] * np.float32(partition_id + 1), np.float32)

    nodes = {p: node(p, changed(step), down) for p in range(2)}
    s = strategy(
        [0, 1], nodes, codec_down=down, strategy_name="fedavg", max_share=1.0,
        num_server_rounds=12, lr_min=5e-5, **ALL,
    )  # fmt: skip
    adapter = start = far_from_the_start()
    for current in range(12):
        adapter, _ = s.train_round(current + 1, adapter)
    moves = steps.astype(float).sum(axis=0) * (10 * 1 + 20 * 2) / 30
    np.testing.assert_allclose(adapter, start + moves, rtol=0, atol=50 * 2**-23)


@pytest.mark.parametrize("up", CODECS)
@pytest.mark.parametrize("down", CODECS)
def test_a_round_works_in_every_codec_each_way(down: str, up: str) -> None:
    nodes = {p: node(p, changed(moved, up), down) for p in range(3)}
    s = strategy([0, 1, 2], nodes, codec_down=down, codec_up=up, strategy_name="fedavg", **ALL)
    start = far_from_the_start()
    new, line = s.train_round(1, start)
    assert line["partitions"] == [0, 1, 2]
    steps = np.stack([moved(p, start) - start for p in range(3)])
    exact = start + np.array([10, 20, 30]) @ steps.astype(float) / 60
    # Half a step of the changes' own codec; the way down costs the result nothing.
    bound = {"fp32": 0, "bf16": 2**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}[up]
    assert np.abs(new - exact).max() <= bound * np.abs(steps).max() + 1e-6
    norms = np.linalg.norm(steps, axis=1)
    assert line["client_update_norms"] == pytest.approx(norms.tolist(), rel=0.1)
    assert line["client_cosine"] == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("codec", COARSE)
def test_the_first_download_is_next_to_nothing(codec: str) -> None:
    s = strategy([0, 1], {p: node(p, down=codec) for p in range(2)}, codec_down=codec, **ALL)
    start = initial_adapter(s.layout, s.config.seed)
    _, line = s.train_round(1, start)
    assert line["bytes_down"] < 2 * 40  # of 480 values
    assert isinstance(s.grid, StandInGrid)
    for message in s.grid.sent:
        assert received(message, codec).tobytes() == start.tobytes()


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


def telling(loss: float, tokens: int, partition_id: int = 1) -> Node:
    """A site that is evaluated with this loss a token."""

    def reply(_: int, adapter: Vector) -> RecordDict:
        metrics: dict[str, Any] = {
            "num-examples": 5, "loss-sum": loss * tokens, "num-correct": 0, "num-tokens": tokens,
        }  # fmt: skip
        return RecordDict({"metrics": MetricRecord(metrics)})

    return node(partition_id, reply)


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), st.data(), st.floats(0, 100), st.integers(1, 5 * 512))
def test_a_minority_of_liars_cannot_move_the_median_beyond_what_honest_sites_say(
    k: int, data: st.DataObject, lie: float, tokens: int
) -> None:
    honest = data.draw(st.lists(st.floats(1, 4), min_size=k, max_size=k))
    liars = data.draw(st.sets(st.integers(0, k - 1), max_size=(k - 1) // 2))
    nodes = {
        p: telling(lie, tokens, p) if p in liars else telling(loss, 20, p)
        for p, loss in enumerate(honest)
    }
    s = strategy(list(range(k)), nodes, fraction_evaluate=1.0)
    result = s.evaluate(1, initial_adapter(s.layout, 1))
    true = [loss for p, loss in enumerate(honest) if p not in liars]
    assert min(true) * (1 - 1e-9) <= result["eval_loss_median"] <= max(true) * (1 + 1e-9)
    assert result["eval_site_losses"] == pytest.approx(
        [lie if p in liars else loss for p, loss in enumerate(honest)]
    )
    assert result["eval_partitions"] == list(range(k))


def test_one_site_of_three_does_not_decide_the_accuracy() -> None:
    nodes = {0: node(0, scored), 1: scored_as("num-correct", 20), 2: node(2, scored)}
    result = evaluating(nodes).evaluate(1, initial_adapter(LAYOUT, 1))
    assert result["eval_site_accuracies"] == pytest.approx([0, 1, 2 / 30])
    assert result["eval_token_accuracy_median"] == pytest.approx(2 / 30)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_site_that_has_other_tokens_than_at_first_is_left_out_of_the_figure_by_name(
    resumed: bool,
) -> None:
    s = evaluating({0: node(0, scored), 1: telling(2.0, 40), 2: node(2, scored)})
    adapter = initial_adapter(s.layout, 1)
    first = s.evaluate(1, adapter)
    assert first["eval_site_tokens"] == [10, 40, 30]
    if resumed:
        s = evaluating({0: node(0, scored), 1: telling(2.0, 40), 2: node(2, scored)})
        line = {"mb_sent": 0.0, "client_update_norms": [], "steps": [], **first}
        s.take_up([json.loads(json.dumps(line))])
    assert isinstance(s.grid, StandInGrid)
    s.grid.nodes[s.sites.node_of[1]] = telling(0.0, 2000)
    for _ in range(2):  # what was left out is no measure for later
        second = s.evaluate(2, adapter)
        assert second["eval_partitions"] == [0, 2]
        assert second["eval_rejected"] == {
            "site-01": "2000 answer tokens, 40 when it was evaluated first in this run"
        }


def scored_as(key: str, value: Any) -> Node:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = scored(partition_id, adapter)
        content.metric_records["metrics"][key] = value
        return content

    return node(1, reply)


@pytest.mark.parametrize(
    "bad",
    [
        failing,
        silent,
        node(1, lambda p, a: RecordDict()),
        scored_as("num-tokens", -40),
        scored_as("num-tokens", 1.7e308),
        scored_as("num-correct", 10**9),
        scored_as("loss-sum", 1.7e308),
        scored_as("loss-sum", -1.0),
        scored_as("loss-sum", 2001.0),
        telling(0.0, 5 * 512 + 1),
        scored_as("num-tokens", 20.5),
        telling(0.0, 0),
    ],
    ids=[
        "error", "late", "malformed", "tokens below zero", "tokens without end",
        "more hits than tokens", "loss without end", "loss below zero", "loss of no model",
        "more tokens than its rows hold", "half a token", "no token",
    ],
)  # fmt: skip
def test_a_site_that_cannot_be_evaluated_is_left_out_of_the_figure(bad: Node) -> None:
    s = evaluating({0: node(0, scored), 1: bad, 2: node(2, scored)})
    result = s.evaluate(4, initial_adapter(s.layout, 1))
    assert result["eval_partitions"] == [0, 2]
    assert result["eval_loss"] == pytest.approx((3 + 9) / 40)
    assert list(result["eval_rejected"]) == ["site-01"]


def test_if_nobody_can_be_evaluated_there_is_no_figure() -> None:
    s = evaluating(dict.fromkeys(range(3), silent))
    assert s.evaluate(4, initial_adapter(s.layout, 1)) == {}
