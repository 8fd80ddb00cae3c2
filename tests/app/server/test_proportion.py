"""Changes out of all proportion to the other sites' and to those of earlier rounds."""

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from app.server.strategy import RoundError
from app.wire.adapter import Vector, initial_adapter
from tests.app.server.stand_in_sites import (
    ALL,
    changed,
    moved,
    node,
    plus,
    strategy,
    times,
    trained,
)
from tests.stand_in_grid import StandInGrid


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


@settings(max_examples=40)
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


@settings(max_examples=40)
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
