"""FedAvgOpt: the same objective as the paper's, never worse than FedAvg, and safe inputs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

import app.server.fedavgopt
from app.server.fedavgopt import (
    _pivoted_gram,
    combine,
    fedavgopt,
    gradient,
    inner_products,
    objective,
)

Updates = list[list[NDArray[Any]]]
SOLVERS = ("nelder-mead", "bfgs")
both_solvers = pytest.mark.parametrize("solver", SOLVERS)


def combined(updates: Updates, num_examples: list[int], alphas: Any) -> list[NDArray[Any]]:
    """sum_k alpha_k n_k w_k / N, layer by layer, from the arrays in float64."""
    factors = np.asarray(alphas, float) * np.asarray(num_examples, float) / sum(num_examples)
    return [
        np.sum([c * u[layer].astype(float) for c, u in zip(factors, updates, strict=True)], axis=0)
        for layer in range(len(updates[0]))
    ]


def direct(updates: Updates, num_examples: list[int], alphas: Any) -> float:
    """The paper's objective, term by term."""
    aggregate, total = combined(updates, num_examples, alphas), 0.0
    for client in updates:
        squares = 0.0
        for w, own in zip(aggregate, client, strict=True):
            difference = float(np.linalg.norm(w - own))
            if difference:
                squares += (difference / float(np.linalg.norm(w + own))) ** 2
        total += squares**0.5
    return total


def gram_of(updates: Updates) -> NDArray[np.float64]:
    return np.stack([_pivoted_gram(list(layer)) for layer in zip(*updates, strict=True)])


def from_gram(updates: Updates, num_examples: list[int], alphas: Any) -> float:
    gram = gram_of(updates)
    weights = np.asarray(num_examples, float) / sum(num_examples)
    return objective(np.asarray(alphas, float) * weights, gram)


@st.composite
def cases(draw: st.DrawFn, min_clients: int = 1) -> tuple[Updates, list[int]]:
    """Clients around a common adapter, from nearly equal to quite different."""
    clients, layers = draw(st.integers(min_clients, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise = draw(st.sampled_from([1e-6, 1e-3, 0.1, 1.0]))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    updates: Updates = [[] for _ in range(clients)]
    for _ in range(layers):
        shape = (int(rng.integers(2, 9)), int(rng.integers(2, 9)))
        common = rng.standard_normal(shape) * draw(st.sampled_from([1e-3, 1.0, 50.0]))
        for update in updates:
            update.append((common * (1 + noise * rng.standard_normal(shape))).astype(dtype))
    return updates, [int(n) for n in rng.integers(1, 2000, clients)]


@settings(max_examples=80)
@given(cases(), st.lists(st.floats(0.5, 1.5), min_size=5, max_size=5))
def test_the_objective_from_gram_matrices_is_the_papers(
    case: tuple[Updates, list[int]], alphas: list[float]
) -> None:
    updates, n = case
    own = alphas[: len(updates)]
    assert from_gram(updates, n, own) == pytest.approx(direct(updates, n, own), rel=1e-6, abs=1e-12)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_the_objective_keeps_its_digits_when_the_clients_nearly_agree(seed: int, k: int) -> None:
    # Plain inner products would leave 4 of them.
    rng = np.random.default_rng(seed)
    common = [rng.standard_normal((40, 30)), rng.standard_normal((10, 60))]
    updates = [[w + 1e-6 * rng.standard_normal(w.shape) for w in common] for _ in range(k)]
    n = [int(x) for x in rng.integers(1, 500, k)]
    ones = [1.0] * k
    assert from_gram(updates, n, ones) == pytest.approx(direct(updates, n, ones), rel=1e-8)


@settings(max_examples=40)
@given(cases())
def test_the_aggregate_is_the_weighted_sum_in_the_inputs_dtype_and_shapes(
    case: tuple[Updates, list[int]],
) -> None:
    updates, n = case
    aggregate, alphas = fedavgopt(updates, n)
    assert alphas.shape == (len(updates),)
    exact = combined(updates, n, alphas)
    for got, want, given_array in zip(aggregate, exact, updates[0], strict=True):
        assert got.dtype == given_array.dtype
        assert got.shape == given_array.shape
        tolerance = 1e-6 if got.dtype == np.float32 else 1e-12
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@settings(max_examples=40)
@given(cases(min_clients=2))
def test_the_factors_found_are_never_worse_than_fedavgs(case: tuple[Updates, list[int]]) -> None:
    updates, n = case
    _, alphas = fedavgopt(updates, n)
    assert np.isfinite(alphas).all()
    assert direct(updates, n, alphas) <= direct(updates, n, np.ones(len(updates))) * (1 + 1e-7)


def test_the_factors_found_are_better_than_fedavgs_where_the_clients_differ() -> None:
    rng = np.random.default_rng(1)
    updates = [[rng.standard_normal((20, 20)) + 0.5] for _ in range(3)]
    _, alphas = fedavgopt(updates, [10, 200, 3000])
    assert direct(updates, [10, 200, 3000], alphas) < 0.95 * direct(
        updates, [10, 200, 3000], [1, 1, 1]
    )


@settings(max_examples=40)
@given(cases(min_clients=2), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_change_the_objective(
    case: tuple[Updates, list[int]], random: Any
) -> None:
    updates, n = case
    order = list(range(len(updates)))
    random.shuffle(order)
    alphas = [1 + 0.1 * k for k in range(len(updates))]
    value = from_gram(updates, n, alphas)
    turned = from_gram(
        [updates[k] for k in order], [n[k] for k in order], [alphas[k] for k in order]
    )
    assert turned == pytest.approx(value, rel=1e-9)


@settings(max_examples=30)
@given(cases(min_clients=2))
def test_inputs_are_not_modified_and_may_be_read_only(case: tuple[Updates, list[int]]) -> None:
    updates, n = case
    before = [[a.tobytes() for a in u] for u in updates]
    for array in (a for u in updates for a in u):
        array.flags.writeable = False  # as Flower's received arrays are
    aggregate, _ = fedavgopt(updates, n)
    assert [[a.tobytes() for a in u] for u in updates] == before
    for got in aggregate:
        assert got.flags.writeable
        assert not any(np.shares_memory(got, a) for u in updates for a in u)


@settings(max_examples=20)
@given(cases(min_clients=2), st.sampled_from([2.0**-10, 0.5, 4.0]), st.sampled_from([2, 8]))
def test_neither_the_unit_of_the_weights_nor_of_the_counts_matters(
    case: tuple[Updates, list[int]], scale: float, times: int
) -> None:
    updates, n = case
    _, alphas = fedavgopt(updates, n)
    scaled = [[(a * scale).astype(a.dtype) for a in u] for u in updates]
    # Powers of two lose no bit, so the search must take the same steps.
    np.testing.assert_array_equal(fedavgopt(scaled, n)[1], alphas)
    np.testing.assert_array_equal(fedavgopt(updates, [k * times for k in n])[1], alphas)


def test_a_single_client_is_returned_as_it_is() -> None:
    update = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([-1.5, 0, 3], np.float32)]
    aggregate, alphas = fedavgopt([update], [17])
    assert alphas.tolist() == [1.0]
    for got, want in zip(aggregate, update, strict=True):
        np.testing.assert_array_equal(got, want)


@settings(max_examples=25)
@given(cases(), st.integers(2, 6), st.integers(0, 2**32))
def test_clients_that_agree_completely_give_what_they_agree_on(
    case: tuple[Updates, list[int]], k: int, seed: int
) -> None:
    update = case[0][0]
    n = [int(x) for x in np.random.default_rng(seed).integers(1, 500, k)]
    aggregate, alphas = fedavgopt([update] * k, n)
    assert np.isfinite(alphas).all()
    for got, want in zip(aggregate, update, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


@settings(max_examples=25)
@given(cases(min_clients=2), st.integers(0, 4))
def test_a_layer_that_is_zero_everywhere_changes_nothing_and_stays_zero(
    case: tuple[Updates, list[int]], at: int
) -> None:
    updates, n = case
    at = min(at, len(updates[0]))
    zero = np.zeros((3, 2), updates[0][0].dtype)
    padded = [[*u[:at], zero, *u[at:]] for u in updates]
    aggregate, alphas = fedavgopt(padded, n)
    assert not aggregate[at].any()
    assert np.isfinite(alphas).all()
    assert direct(updates, n, alphas) == pytest.approx(
        direct(updates, n, fedavgopt(updates, n)[1]), rel=1e-6
    )


def test_if_every_layer_is_zero_the_aggregate_is_zero() -> None:
    aggregate, alphas = fedavgopt([[np.zeros((2, 2))]] * 3, [1, 2, 3])
    assert not aggregate[0].any()
    assert np.isfinite(alphas).all()


def test_a_client_without_examples_has_no_weight() -> None:
    rng = np.random.default_rng(5)
    updates = [[rng.standard_normal((4, 4))] for _ in range(3)]
    aggregate, alphas = fedavgopt(updates, [30, 0, 70])
    without = 0.3 * alphas[0] * updates[0][0] + 0.7 * alphas[2] * updates[2][0]
    np.testing.assert_allclose(aggregate[0], without, rtol=1e-12)


def test_layers_larger_than_a_chunk_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    updates = [[rng.standard_normal((13, 7)), rng.standard_normal(5)] for _ in range(3)]
    whole, alphas = fedavgopt(updates, [1, 2, 3])
    for chunk in (1, 16, 50):
        monkeypatch.setattr(app.server.fedavgopt, "_CHUNK", chunk)
        again, same = fedavgopt(updates, [1, 2, 3])
        np.testing.assert_allclose(same, alphas, rtol=1e-6)
        for got, want in zip(again, whole, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_value_that_is_not_finite_is_refused(value: float, clients: int) -> None:
    updates = [[np.ones((3, 3), np.float32), np.ones(4, np.float32)] for _ in range(clients)]
    updates[-1][1][2] = value
    with pytest.raises(ValueError, match="finite"):
        fedavgopt(updates, [10] * clients)


@pytest.mark.parametrize(
    "num_examples", [[0, 0], [5, -1], [float("nan"), 1], [float("inf"), 1], [1], [1, 2, 3], []]
)
def test_impossible_numbers_of_examples_are_refused(num_examples: list[int]) -> None:
    updates = [[np.ones(3)], [np.ones(3)]]
    with pytest.raises(ValueError, match=r"examples|counts"):
        fedavgopt(updates, num_examples)


def test_no_clients_are_refused() -> None:
    with pytest.raises(ValueError, match="0 updates"):
        fedavgopt([], [])


@pytest.mark.parametrize(
    "other", [[np.ones((2, 3))], [np.ones((3, 2)), np.ones(1)], [np.ones(6)], []]
)
def test_clients_whose_layers_differ_are_refused(other: list[NDArray[Any]]) -> None:
    with pytest.raises(ValueError, match="differ"):
        fedavgopt([[np.ones((3, 2))], other], [1, 1])


# --- the solvers ----------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.data())
def test_the_gradient_is_that_of_central_differences(data: st.DataObject) -> None:
    k, layers = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    noise = data.draw(st.sampled_from([1e-2, 0.1, 1.0]))
    zero_layer = data.draw(st.integers(0, layers))  # == layers: none
    zero_client = data.draw(st.integers(0, 2 * k))  # >= k: none
    updates: Updates = [[] for _ in range(k)]
    for layer in range(layers):
        shape = (int(rng.integers(1, 9)), int(rng.integers(2, 9)))
        common = rng.standard_normal(shape) * data.draw(st.sampled_from([1e-3, 1.0, 50.0]))
        for client, update in enumerate(updates):
            there = layer != zero_layer and client != zero_client
            update.append(there * (common + noise * abs(common) * rng.standard_normal(shape)))
    gram = gram_of(updates)
    # Away from the kinks, where w equals a client.
    c = rng.dirichlet(np.ones(k)) * rng.uniform(0.7, 0.9)
    step = 1e-6
    numeric = [
        (objective(c + step * e, gram) - objective(c - step * e, gram)) / (2 * step)
        for e in np.eye(k)
    ]
    exact = gradient(c, gram)
    assert exact.shape == (k,)
    scale = max(float(np.abs(exact).max()), objective(c, gram), 1e-3)
    np.testing.assert_allclose(exact, numeric, rtol=0, atol=2e-4 * scale)


@both_solvers
def test_at_the_minimum_found_the_gradient_vanishes(solver: str) -> None:
    rng = np.random.default_rng(8)
    updates = [[rng.standard_normal((6, 5)), rng.standard_normal((4, 4))] for _ in range(4)]
    n = [10, 20, 30, 40]
    _, alphas = fedavgopt(updates, n, solver)
    gram, c = gram_of(updates), alphas * n / 100
    assert np.abs(gradient(c, gram)).max() < 1e-3
    assert np.abs(gradient(np.array(n) / 100, gram)).max() > 0.1


@settings(max_examples=100)
@given(cases(min_clients=2))
def test_bfgs_finds_no_worse_a_minimum_than_nelder_mead(case: tuple[Updates, list[int]]) -> None:
    updates, n = case
    values = [from_gram(updates, n, fedavgopt(updates, n, s)[1]) for s in ("bfgs", "nelder-mead")]
    # Two clients that nearly agree have two minima, each at a client, of which either may be found.
    assert values[0] <= values[1] * (1 + 2e-3) + 1e-6


# Clients that nearly agree make f steep in one direction and flat in the others.
@pytest.mark.parametrize("seed", range(8))
def test_bfgs_does_not_stop_short_where_the_clients_nearly_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    common = [rng.standard_normal((4, 6)) * unit for unit in (1.0, 50.0, 1e-3)]
    updates = [[w * (1 + 1e-3 * rng.standard_normal(w.shape)) for w in common] for _ in range(5)]
    n = [int(x) for x in rng.integers(1, 2000, 5)]
    bfgs, nelder_mead = (
        from_gram(updates, n, fedavgopt(updates, n, s)[1]) for s in ("bfgs", "nelder-mead")
    )
    assert bfgs <= nelder_mead + 1e-6


def plain_nelder_mead(updates: Updates, n: list[int]) -> Any:
    gram, weights = gram_of(updates), np.asarray(n, float) / sum(n)
    return minimize(lambda a: objective(a * weights, gram), np.ones(len(n)), method="Nelder-Mead")


@settings(max_examples=20)
@given(cases(min_clients=2))
def test_where_nelder_mead_ends_by_itself_its_factors_stand(
    case: tuple[Updates, list[int]],
) -> None:
    updates, n = case
    plain = plain_nelder_mead(updates, n)
    if plain.success:
        assert fedavgopt(updates, n)[1].tolist() == plain.x.tolist()


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
def test_with_twenty_clients_the_search_goes_on_where_nelder_mead_gives_up(noise: float) -> None:
    rng = np.random.default_rng(3)
    common = [rng.standard_normal((8, 8)), rng.standard_normal((4, 30))]
    updates = [[w + noise * rng.standard_normal(w.shape) for w in common] for _ in range(20)]
    n = [int(x) for x in rng.integers(1, 900, 20)]
    plain = plain_nelder_mead(updates, n)
    assert not plain.success
    value = from_gram(updates, n, fedavgopt(updates, n)[1])
    assert value <= plain.fun * (1 + 1e-12)
    assert value <= plain.fun - 1e-6 * noise  # it does go on
    assert value <= from_gram(updates, n, fedavgopt(updates, n, "bfgs")[1]) * (1 + 1e-2)


def _random(k: int, *shapes: tuple[int, ...]) -> Updates:
    rng = np.random.default_rng(k)
    return [[rng.standard_normal(s) for s in shapes] for _ in range(k)]


_X = np.arange(1.0, 7.0).reshape(2, 3)
_ZERO = np.zeros((2, 3))
DEGENERATE: dict[str, tuple[Updates, list[int]]] = {
    "one client": ([[_X, _ZERO]], [5]),
    "one client of zeros": ([[_ZERO]], [5]),
    "identical clients": ([[_X, 2 * _X]] * 4, [1, 2, 3, 4]),
    "two of three identical": ([[_X], [_X], [_X + 1]], [1, 2, 3]),
    "parallel clients": ([[_X], [2 * _X], [3 * _X]], [1, 2, 3]),
    "a layer zero everywhere": ([[u[0], _ZERO] for u in _random(3, (4, 4))], [1, 2, 3]),
    "a layer zero for one": ([[_X, _ZERO], [_X + 1, _X], [_X, 2 * _X]], [1, 2, 3]),
    "each layer zero but for one": ([[_X, _ZERO], [_ZERO, _X]], [1, 1]),
    "all zero": ([[_ZERO, _ZERO]] * 3, [1, 2, 3]),
    "one zero client": ([[_ZERO], [_X], [_X + 1]], [1, 2, 3]),
    "all but one zero": ([[_ZERO], [_ZERO], [_X]], [1, 2, 3]),
    "one without examples": (_random(3, (4, 4)), [0, 2, 3]),
    "all but one without examples": (_random(4, (4, 4), (3,)), [0, 0, 3, 0]),
    "more clients than dimensions": (_random(6, (1, 2)), [1, 2, 3, 4, 5, 6]),
    "single numbers": ([[np.array([x])] for x in (1.0, 2.0, -3.0)], [1, 2, 3]),
    "opposite clients": ([[_X], [-_X]], [1, 1]),
    "nearly opposite clients": ([[_X], [-_X + 1e-9]], [1, 1]),
    # Their mean is minus the first of them, where the objective is infinite.
    "a mean opposite to one": ([[_X], [-3 * _X]], [1, 1]),
    "one very large": ([[_X], [_X + 1], [1e6 * (_X - 2)]], [1, 2, 3]),
    "one very small": ([[1e-30 * _X], [_X], [_X + 1]], [1, 2, 3]),
    "all very large": ([[1e30 * a for a in u] for u in _random(3, (4, 4))], [1, 2, 3]),
    "all very small": ([[1e-30 * a for a in u] for u in _random(3, (4, 4))], [1, 2, 3]),
    "examples of all sizes": (_random(3, (4, 4)), [1, 1000, 10**9]),
}


@both_solvers
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scipy's, of infinite objectives
def test_degenerate_clients_still_give_finite_factors_and_an_aggregate(
    kind: str, dtype: Any, solver: str
) -> None:
    given_updates, n = DEGENERATE[kind]
    updates = [[a.astype(dtype) for a in u] for u in given_updates]
    aggregate, alphas = fedavgopt(updates, n, solver)
    assert alphas.shape == (len(n),)
    assert np.isfinite(alphas).all()
    for got, own in zip(aggregate, updates[0], strict=True):
        assert got.dtype == dtype
        assert got.shape == own.shape
        assert np.isfinite(got).all()
    ones = [1.0] * len(n)
    assert from_gram(updates, n, alphas) <= from_gram(updates, n, ones) * (1 + 1e-9)
    if kind.startswith(("one client", "identical", "all zero")):
        assert alphas.tolist() == ones


@both_solvers
def test_a_zero_client_pulls_nothing_but_its_share(solver: str) -> None:
    # Against zero every w is as far as any other: the others alone decide.
    updates = _random(3, (5, 5))
    zero = [np.zeros((5, 5))]
    n = [10, 20, 30]
    _, alphas = fedavgopt(updates, n, solver)
    with_zero, more = fedavgopt([*updates, zero], [*n, 40], solver)
    expected = combined(updates, n, alphas)[0]
    np.testing.assert_allclose(with_zero[0], expected, rtol=0, atol=2e-3)
    assert more.shape == (4,)


# --- sums and products ----------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(0, 6),
    st.integers(1, 300),
    st.integers(1, 2000),
    st.integers(0, 2**32),
    st.sampled_from([np.float32, np.float64]),
)
def test_inner_products_are_those_of_the_differences_however_they_are_cut(
    k: int, n: int, chunk: int, seed: int, dtype: Any
) -> None:
    rng = np.random.default_rng(seed)
    origin = rng.standard_normal(n).astype(dtype)
    vectors = [origin + (0.01 * rng.standard_normal(n)).astype(dtype) for _ in range(k)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.server.fedavgopt, "_CHUNK", chunk)
        products = inner_products(vectors, origin)
    differences = np.array([v.astype(float) - origin for v in vectors]).reshape(k, n)
    assert products.shape == (k, k)
    assert products.dtype == np.float64
    np.testing.assert_allclose(products, differences @ differences.T, rtol=1e-9, atol=1e-15)


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 300), st.integers(1, 2000), st.integers(0, 2**32))
def test_a_combination_is_summed_in_float64_however_it_is_cut(
    k: int, n: int, chunk: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal((n, 2)).astype(np.float32) for _ in range(k)]
    factors = rng.standard_normal(k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.server.fedavgopt, "_CHUNK", chunk)
        got = combine(vectors, factors)
    exact = np.tensordot(factors, np.stack(vectors).astype(float), 1)
    assert got.dtype == np.float32
    assert got.shape == (n, 2)
    np.testing.assert_allclose(got, exact, rtol=2**-23, atol=1e-12)  # one rounding, at the end
