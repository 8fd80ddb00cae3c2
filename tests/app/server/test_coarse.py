"""Rounds whose adapters travel in fewer bits: what they cost, and that the roundings do no harm."""

from typing import Any

import numpy as np
import pytest

from app.config import CODECS, MIB, STRATEGIES, RunConfig
from app.wire.adapter import Vector, initial_adapter
from app.wire.codec import decode, encode
from tests.app.server.stand_in_sites import (
    ALL,
    LAYOUT,
    changed,
    moved,
    node,
    plus,
    received,
    scored,
    strategy,
)
from tests.samples import run_config
from tests.stand_in_grid import StandInGrid


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


def received_of(payload: bytes, config: RunConfig) -> Vector:
    return decode(config.down, payload, initial_adapter(LAYOUT, config.seed))


def far_from_the_start() -> Vector:
    """Where a run may be after some rounds: the initial adapter moved."""
    return moved(99, initial_adapter(LAYOUT, run_config().seed))


COARSE = ("bf16", "int8", "int4")


@pytest.mark.parametrize("name", STRATEGIES)
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
