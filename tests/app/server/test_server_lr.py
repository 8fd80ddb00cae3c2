"""The server's step, with every strategy; and how little memory all of it takes."""

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from app.server.aggregation import aggregate, rda
from app.server.fedavgopt import combine, fedavgopt
from app.wire.adapter import Layout, Vector
from tests.app.server.test_aggregation import (
    LAYOUT,
    SOLVERS,
    N,
    every_strategy,
    layers,
    rounds,
    run,
)
from tests.samples import run_config


@every_strategy
@settings(max_examples=20)
@given(rounds(), st.sampled_from(SOLVERS), st.sampled_from([0.1, 0.5, 1.4, 2.0, 10.0]))
def test_the_servers_step_is_so_many_times_what_the_strategy_changes(
    name: str, case: tuple[list[Vector], list[int], Vector], solver: str, server_lr: float
) -> None:
    vectors, n, previous = case
    whole, same = run(name, vectors, n, previous, solver)
    copies = [v.copy() for v in vectors]
    new, alphas = aggregate(name, copies, n, previous, LAYOUT, solver, server_lr)
    expected = previous + server_lr * (whole.astype(float) - previous)
    largest = float(np.abs(np.stack([new, whole, previous])).max())
    np.testing.assert_allclose(new, expected, rtol=0, atol=2**-21 * largest)
    assert alphas.tolist() == same.tolist()
    assert new.dtype == np.float32


def as_aggregated(name: str, vectors: list[Vector], n: list[int], previous: Vector) -> Vector:
    """What each strategy made of them before there was a server's step."""
    if name == "rda":
        return rda(vectors, n, previous, LAYOUT)[0]
    if "fedavgopt" not in name:
        return combine(vectors, np.array(n) / sum(n))
    delta = name == "fedavgopt-delta"
    arrays = layers([v - previous for v in vectors] if delta else vectors)
    new = np.concatenate([a.ravel() for a in fedavgopt(arrays, n, "bfgs")[0]])
    return previous + new if delta else new


@every_strategy
@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_step_of_1_is_the_strategy_bit_for_bit(name: str, seed: int, k: int) -> None:
    """Of floats whose differences are rounded: (new - old) + old would not be new."""
    rng = np.random.default_rng(seed)
    previous = rng.standard_normal(N).astype(np.float32)
    vectors = [0.01 * rng.standard_normal(N).astype(np.float32) for _ in range(k)]
    expected = as_aggregated(name, vectors, [*range(1, k + 1)], previous).tobytes()
    for lr in ((), (1.0,)):
        copies = [v.copy() for v in vectors]
        new, _ = aggregate(name, copies, [*range(1, k + 1)], previous, LAYOUT, "bfgs", *lr)
        assert new.tobytes() == expected


@every_strategy
def test_beside_the_sites_adapters_it_needs_less_than_one_float64_copy_of_them(name: str) -> None:
    layout = Layout.of(
        {f"m.{i}.{n}_proj": [2048, 2048] for i in range(16) for n in "qv"}, run_config(lora_r=16)
    )
    rng, k = np.random.default_rng(4), 8
    previous = rng.standard_normal(layout.size, np.float32)
    vectors = [previous + rng.standard_normal(layout.size, np.float32) for _ in range(k)]
    tracemalloc.start()
    try:
        aggregate(name, vectors, [1] * k, previous, layout, "bfgs", server_lr=2.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * previous.nbytes < k * 2 * previous.nbytes
