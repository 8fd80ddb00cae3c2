"""Who takes part in a round and in its evaluation."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.app.server.stand_in_sites import strategy
from tests.stand_in_grid import StandInGrid


@settings(max_examples=60)
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


@settings(max_examples=60)
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
