"""The strategies by name, and the figures of how far the sites agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import STRATEGIES
from app.server.aggregation import aggregate, capped, mean_cosine, weight_change_norm
from app.server.fedavgopt import Floats, fedavgopt, inner_products
from app.wire.adapter import Layout, Vector
from tests.samples import run_config

LINEAR = {"m.0.q_proj": [6, 5], "m.0.v_proj": [3, 5], "m.1.q_proj": [6, 5]}
LAYOUT = Layout.of(LINEAR, run_config(lora_r=2))
N = LAYOUT.size
SOLVERS = ("nelder-mead", "bfgs")
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


def run(
    name: str,
    vectors: list[Vector],
    num_examples: list[int],
    previous: Vector,
    solver: str = "nelder-mead",
) -> tuple[Vector, Floats]:
    """``aggregate`` of copies: fedavgopt-delta may change what it is given."""
    return aggregate(name, [v.copy() for v in vectors], num_examples, previous, LAYOUT, solver)


def layers(vectors: list[Vector]) -> list[list[Vector]]:
    return [list(LAYOUT.split(v).values()) for v in vectors]


@st.composite
def rounds(
    draw: st.DrawFn, min_sites: int = 1, max_sites: int = 5
) -> tuple[list[Vector], list[int], Vector]:
    """Sites' adapters, their examples and the adapter before, all multiples of 2^-12.

    Sums and differences of them are exact in float32, so that equalities can be tested as such.
    """
    k = draw(st.integers(min_sites, max_sites))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    previous = rng.integers(-4096, 4096, N)
    step = draw(st.sampled_from([4, 100, 5000]))
    common = rng.integers(-step, step + 1, N)
    changes = [common + rng.integers(-step, step + 1, N) for _ in range(k)]
    vectors = [((previous + c) * 2.0**-12).astype(np.float32) for c in changes]
    num_examples = [int(n) for n in rng.integers(1, 2000, k)]
    return vectors, num_examples, (previous * 2.0**-12).astype(np.float32)


def weighted_mean(vectors: list[Vector], num_examples: list[int]) -> Floats:
    return np.average(np.stack(vectors).astype(float), axis=0, weights=num_examples)


@settings(max_examples=60)
@given(rounds())
def test_fedavg_is_the_mean_weighted_by_examples(
    case: tuple[list[Vector], list[int], Vector],
) -> None:
    vectors, n, previous = case
    new, alphas = run("fedavg", vectors, n, previous)
    np.testing.assert_allclose(new, weighted_mean(vectors, n), rtol=2**-23, atol=1e-9)
    assert alphas.tolist() == [1.0] * len(vectors)


@settings(max_examples=30)
@given(rounds())
def test_on_the_server_fedprox_is_fedavg(case: tuple[list[Vector], list[int], Vector]) -> None:
    (avg, ones), (prox, same) = (run(name, *case) for name in ("fedavg", "fedprox"))
    assert prox.tobytes() == avg.tobytes()
    assert same.tolist() == ones.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=25)
@given(rounds())
def test_fedavgopt_is_the_papers_whatever_came_before(
    solver: str, case: tuple[list[Vector], list[int], Vector]
) -> None:
    vectors, n, previous = case
    new, alphas = run("fedavgopt", vectors, n, previous, solver)
    expected, factors = fedavgopt(layers(vectors), n, solver)
    assert new.tobytes() == np.concatenate([a.ravel() for a in expected]).tobytes()
    assert alphas.tolist() == factors.tolist()
    assert run("fedavgopt", vectors, n, previous + 1, solver)[0].tobytes() == new.tobytes()


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=25)
@given(rounds())
def test_fedavgopt_delta_is_fedavgopt_of_the_changes_on_top_of_what_was(
    solver: str, case: tuple[list[Vector], list[int], Vector]
) -> None:
    vectors, n, previous = case
    new, alphas = run("fedavgopt-delta", vectors, n, previous, solver)
    changes, factors = fedavgopt(layers([v - previous for v in vectors]), n, solver)
    expected = previous + np.concatenate([a.ravel() for a in changes])
    assert new.tobytes() == expected.tobytes()
    assert alphas.tolist() == factors.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=25)
@given(rounds(), st.integers(0, 2**32))
def test_fedavgopt_delta_does_not_care_where_the_sites_started(
    solver: str, case: tuple[list[Vector], list[int], Vector], seed: int
) -> None:
    vectors, n, previous = case
    shift = (np.random.default_rng(seed).integers(-9999, 9999, N) * 2.0**-12).astype(np.float32)
    new, alphas = run("fedavgopt-delta", vectors, n, previous, solver)
    moved, same = run("fedavgopt-delta", [v + shift for v in vectors], n, previous + shift, solver)
    assert same.tolist() == alphas.tolist()
    np.testing.assert_allclose(moved, new + shift, rtol=2**-22, atol=2**-22 * np.abs(new).max())


def test_fedavgopt_itself_does_care() -> None:
    rng = np.random.default_rng(1)
    vectors = [rng.standard_normal(N).astype(np.float32) for _ in range(3)]
    zero = np.zeros(N, np.float32)
    here, _ = run("fedavgopt", vectors, [1, 2, 3], zero)
    there, _ = run("fedavgopt", [v + 5 for v in vectors], [1, 2, 3], zero + 5)
    assert np.abs(there - 5 - here).max() > 0.01


@every_strategy
@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=20)
@given(rounds(max_sites=1))
def test_one_site_alone_gives_its_own_adapter(
    name: str, solver: str, case: tuple[list[Vector], list[int], Vector]
) -> None:
    vectors, n, previous = case
    new, alphas = run(name, vectors, n, previous, solver)
    assert new.tobytes() == vectors[0].tobytes()
    assert alphas.tolist() == [1.0]


@every_strategy
@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=20)
@given(rounds(max_sites=1), st.lists(st.integers(1, 500), min_size=2, max_size=6))
def test_sites_that_agree_give_what_they_agree_on(
    name: str, solver: str, case: tuple[list[Vector], list[int], Vector], n: list[int]
) -> None:
    (vector,), _, previous = case
    new, alphas = run(name, [vector] * len(n), n, previous, solver)
    assert np.isfinite(alphas).all()
    np.testing.assert_allclose(new, vector, rtol=2**-21, atol=2**-21)


@every_strategy
def test_sites_that_change_nothing_leave_what_was(name: str) -> None:
    previous = np.random.default_rng(3).standard_normal(N).astype(np.float32)
    new, alphas = run(name, [previous] * 3, [1, 20, 300], previous)
    np.testing.assert_allclose(new, previous, rtol=2**-22)
    assert alphas.tolist() == [1.0] * 3


@every_strategy
@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=20)
@given(rounds(min_sites=2), st.data())
def test_a_site_without_examples_has_no_part_in_the_sum(
    name: str, solver: str, case: tuple[list[Vector], list[int], Vector], data: st.DataObject
) -> None:
    vectors, n, previous = case
    without = data.draw(st.sets(st.integers(0, len(n) - 1), min_size=1, max_size=len(n) - 1))
    n = [0 if k in without else x for k, x in enumerate(n)]
    new, alphas = run(name, vectors, n, previous, solver)
    assert np.isfinite(alphas).all()
    origin = previous.astype(float) if name == "fedavgopt-delta" else np.zeros(N)
    shares = alphas * n / sum(n)
    assert all(shares[k] == 0 for k in without)
    if name != "rda":  # whose factors are those of each tensor
        expected = origin + shares @ (np.stack(vectors) - origin)
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    if "fedavgopt" not in name:  # there it still has an opinion on the others' factors
        rest = [k for k in range(len(n)) if k not in without]
        alone, _ = run(name, [vectors[k] for k in rest], [n[k] for k in rest], previous)
        np.testing.assert_allclose(new, alone, rtol=2**-22)


@every_strategy
@settings(max_examples=20)
@given(rounds(), st.sampled_from(SOLVERS))
def test_the_result_is_a_new_float32_vector_and_only_delta_changes_its_inputs(
    name: str, case: tuple[list[Vector], list[int], Vector], solver: str
) -> None:
    vectors, n, previous = case
    before = [v.tobytes() for v in vectors]
    was = previous.tobytes()
    previous.flags.writeable = False
    if name != "fedavgopt-delta":
        for vector in vectors:
            vector.flags.writeable = False
    new, alphas = aggregate(name, vectors, n, previous, LAYOUT, solver)
    assert new.dtype == np.float32
    assert new.shape == (N,)
    assert alphas.dtype == np.float64
    assert alphas.shape == (len(vectors),)
    assert previous.tobytes() == was
    assert not any(np.shares_memory(new, v) for v in [*vectors, previous])
    if name != "fedavgopt-delta":
        assert [v.tobytes() for v in vectors] == before


def test_adapters_of_another_size_are_not_aggregated() -> None:
    with pytest.raises(ValueError, match="shape"):
        run("fedavgopt", [np.ones(N + 1, np.float32)] * 2, [1, 1], np.ones(N, np.float32))


# --- agreement ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(2, 6), st.integers(0, 2**32), st.sampled_from([1e-12, 1.0, 1e9]))
def test_the_mean_cosine_is_that_of_all_pairs(k: int, seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    changes = unit * (rng.standard_normal((k, 8)) + rng.standard_normal(8))
    cosines = [
        changes[i] @ changes[j] / np.linalg.norm(changes[i]) / np.linalg.norm(changes[j])
        for i in range(k)
        for j in range(i)
    ]
    assert mean_cosine(changes @ changes.T) == pytest.approx(float(np.mean(cosines)), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "cosine"),
    [
        ([[1, 2], [1, 2]], 1),
        ([[1, 2], [10, 20], [3, 6]], 1),
        ([[1, 0], [0, 7]], 0),
        ([[1, 2], [-3, -6]], -1),
        ([[1, 0], [1, 1]], 0.5**0.5),
        ([[1, 0], [0, 0]], 0),
        ([[0, 0], [0, 0]], 0),
        ([[1, 0], [1, 0], [-1, 0]], -1 / 3),
    ],
)
def test_golden_cosines(changes: list[list[float]], cosine: float) -> None:
    vectors = [np.array(c, np.float32) for c in changes]
    products = inner_products(vectors, np.zeros(2, np.float32))
    assert mean_cosine(products) == pytest.approx(cosine, abs=1e-12)


def test_one_site_or_none_agrees_with_nobody() -> None:
    assert mean_cosine(np.array([[4.0]])) is None
    assert mean_cosine(np.zeros((0, 0))) is None


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0, 16.0]))
def test_the_norm_of_the_weight_change_is_that_of_the_product(
    seed: int, rank: int, scaling: float
) -> None:
    layout = Layout.of(LINEAR, run_config(lora_r=rank))  # also above the layers' own rank
    vector = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    arrays, squares = layout.split(vector), 0.0
    for name, (n_out, n_in) in LINEAR.items():
        a, b = (arrays[f"base_model.model.{name}.lora_{s}.weight"].astype(float) for s in "AB")
        change = scaling * b @ a
        assert change.shape == (n_out, n_in)
        squares += float((change**2).sum())
    assert weight_change_norm(layout, vector, scaling) == pytest.approx(squares**0.5, rel=1e-9)


def test_an_adapter_with_b_zero_changes_no_weight() -> None:
    vector = np.ones(N, np.float32)
    for name, array in LAYOUT.split(vector).items():
        if "lora_B" in name:
            array[:] = 0
    assert weight_change_norm(LAYOUT, vector, 2.0) == 0.0


@settings(max_examples=300)
@given(
    st.lists(st.integers(1, 10**9 - 1), min_size=1, max_size=20),
    st.one_of(st.floats(0.01, 1), st.integers(1, 20).map(lambda k: 1 / k)),
)
def test_no_site_has_more_than_its_share_and_what_need_not_change_does_not(
    counts: list[int], max_share: float
) -> None:
    weights = capped(counts, max_share)
    total, level = sum(weights), max(weights)
    assert all(1 <= w <= n for w, n in zip(weights, counts, strict=True))
    lowered = [w for w, n in zip(weights, counts, strict=True) if w < n]
    assert set(lowered) <= {level}  # to one level, and nobody else
    if len(counts) * max_share <= 1:
        assert set(weights) == {min(counts)}  # the best that there is
    else:
        assert level <= max(1, (1 + 1e-6) * max_share * total)
    if max(counts) <= max_share * sum(counts):
        assert weights == counts
    elif len(counts) * max_share > 1 + 1e-6:
        # Not lower than needed: a row more would be above the share.
        more = [min(n, level + 1) for n in counts]
        assert max(more) > (1 - 1e-6) * max_share * sum(more)


@given(st.integers(1, 20), st.integers(1, 10**9 - 1), st.floats(0.01, 1))
def test_sites_of_the_same_size_weigh_the_same_under_any_share(
    sites: int, rows: int, max_share: float
) -> None:
    assert len(set(capped([rows] * sites, max_share))) == 1


@pytest.mark.parametrize(
    ("counts", "max_share", "weights"),
    [
        ([160, 160], 0.5, [160, 160]),
        ([10_000, 160], 0.5, [160, 160]),
        ([10_000, 160], 1.0, [10_000, 160]),
        ([10, 20, 10**9 - 1], 0.5, [10, 20, 30]),
        ([7], 0.5, [7]),
        ([100, 100, 5], 0.4, [10, 10, 5]),
        ([9, 4, 2], 0.25, [2, 2, 2]),
    ],
)
def test_weights_by_hand(counts: list[int], max_share: float, weights: list[int]) -> None:
    assert capped(counts, max_share) == weights
