"""rda: the sites' directions and lengths, averaged apart, in each tensor."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.server.fedavgopt import Floats
from app.wire.adapter import Vector
from tests.app.server.test_aggregation import LAYOUT, N, rounds, run


def tensors(vector: Vector) -> list[Floats]:
    return [a.astype(float) for a in LAYOUT.split(vector).values()]


def by_the_formula(changes: list[Floats], weights: Floats) -> Floats:
    """One tensor's change: n u / |u|."""
    n = sum(w * np.linalg.norm(v) for v, w in zip(changes, weights, strict=True))
    u = sum(w * v / np.linalg.norm(v) for v, w in zip(changes, weights, strict=True) if v.any())
    return np.asarray(n * u / np.linalg.norm(u))


@settings(max_examples=60)
@given(rounds())
def test_rda_is_its_formula_in_each_tensor(case: tuple[list[Vector], list[int], Vector]) -> None:
    vectors, n, previous = case
    new, _ = run("rda", vectors, n, previous)
    weights, start = np.array(n) / sum(n), tensors(previous)
    for got, before, *sites in zip(
        tensors(new), start, *(tensors(v) for v in vectors), strict=True
    ):
        expected = before + by_the_formula([s - before for s in sites], weights)
        np.testing.assert_allclose(got, expected, rtol=2**-22, atol=2**-23)


@settings(max_examples=60)
@given(rounds(min_sites=2), st.data())
def test_a_site_that_went_further_lengthens_rdas_change_and_does_not_turn_it(
    case: tuple[list[Vector], list[int], Vector], data: st.DataObject
) -> None:
    vectors, n, previous = case
    longest = data.draw(st.integers(0, len(n) - 1))
    factor = data.draw(st.sampled_from([8, 256]))
    further = list(vectors)
    further[longest] = previous + np.float32(factor) * (vectors[longest] - previous)
    weights, start = np.array(n) / sum(n), tensors(previous)
    news = [tensors(run("rda", sites, n, previous)[0]) for sites in (vectors, further)]
    for place, before in enumerate(start):
        one, other = (new[place] - before for new in news)
        changes = [tensors(v)[place] - before for v in vectors]
        more = (factor - 1) * weights[longest] * np.linalg.norm(changes[longest])
        assert np.linalg.norm(other) == pytest.approx(np.linalg.norm(one) + more, rel=1e-3)
        cosine = (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
        assert cosine > 1 - 1e-5


@settings(max_examples=60)
@given(st.integers(2, 6), st.integers(0, 2**32), st.floats(-0.1, 1))
def test_of_changes_of_one_length_rda_is_fedavg_with_the_length_that_it_takes_away(
    k: int, seed: int, rho: float
) -> None:
    """sqrt(K / (1 + (K - 1) rho)) times as long, rho being the cosine of each two."""
    gram = np.full((k, k), rho) + (1 - rho) * np.eye(k)
    bases = [
        np.linalg.qr(np.random.default_rng([seed, i]).standard_normal((a.size, a.size)))[0][:k]
        for i, a in enumerate(tensors(np.zeros(N, np.float32)))
    ]
    root = np.linalg.cholesky(gram + 1e-12 * np.eye(k))
    vectors = list(np.concatenate([root @ b for b in bases], axis=1).astype(np.float32))
    zero = np.zeros(N, np.float32)
    new, alphas = run("rda", vectors, [7] * k, zero)
    factor = (k / (1 + (k - 1) * rho)) ** 0.5
    np.testing.assert_allclose(new, factor * run("fedavg", vectors, [7] * k, zero)[0], atol=1e-5)
    np.testing.assert_allclose(alphas, factor, rtol=1e-4)


E = np.eye(10, dtype=np.float32)  # of the first tensor, A of 2 x 5


@pytest.mark.parametrize(
    ("changes", "num_examples", "change"),
    [
        ([3 * E[0], 4 * E[1]], [1, 1], 3.5 * (E[0] + E[1]) / 2**0.5),
        ([3 * E[0], 4 * E[1]], [4, 3], 24 / 7 * (0.8 * E[0] + 0.6 * E[1])),
        ([2 * E[0], 4000 * E[0]], [1, 1], 2001 * E[0]),
        # A change of 0 has a length, but points nowhere.
        ([3 * E[0], 0 * E[0]], [1, 1], 1.5 * E[0]),
        ([3 * E[0], 3 * E[1], 0 * E[0]], [1, 1, 10**9], 6e-9 * (E[0] + E[1]) / 2**0.5),
        ([3 * E[0], 4 * E[1], 0 * E[0]], [1, 1, 2], 1.75 * (E[0] + E[1]) / 2**0.5),
        # Directions that cancel each other leave none: the mean.
        ([3 * E[0], -3 * E[0]], [1, 1], 0 * E[0]),
        ([3 * E[0], -5 * E[0]], [1, 1], -1 * E[0]),
        ([3 * E[0] + E[3], -9 * E[0] - 3 * E[3]], [1, 1], -3 * E[0] - E[3]),
        ([0 * E[0], 0 * E[0]], [1, 1], 0 * E[0]),
    ],
)
def test_golden_changes_by_rda(
    changes: list[Vector], num_examples: list[int], change: Vector
) -> None:
    vectors = [np.concatenate([c, np.zeros(N - 10, np.float32)]) for c in changes]
    new, alphas = run("rda", vectors, num_examples, np.zeros(N, np.float32))
    np.testing.assert_allclose(new[:10], change, rtol=1e-6, atol=1e-12)
    assert not new[10:].any()
    assert np.isfinite(alphas).all()


def test_rda_goes_by_tensors_not_by_the_adapter_as_a_whole() -> None:
    """A site's long change of one tensor makes its say in another neither larger nor smaller."""
    rest = np.zeros(N - 22, np.float32)
    one = np.concatenate([3 * E[0], 1000 * np.eye(12, dtype=np.float32)[0], rest])
    other = np.concatenate([3 * E[1], np.eye(12, dtype=np.float32)[1], rest])
    new, alphas = run("rda", [one, other], [1, 1], np.zeros(N, np.float32))
    np.testing.assert_allclose(new[:10], 3 * (E[0] + E[1]) / 2**0.5, rtol=1e-6)
    assert new[10:12] == pytest.approx(500.5 / 2**0.5)
    # The other 4 tensors, which nobody changed, count as 1.
    assert alphas == pytest.approx(
        [(2**0.5 + 1.001 / 2**0.5 + 4) / 6, (2**0.5 + 1001 / 2**0.5 + 4) / 6]
    )


@given(st.integers(0, 2**32))
def test_of_a_site_alone_rda_takes_exactly_its_adapter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    previous, vector = rng.standard_normal((2, N)).astype(np.float32)
    new, alphas = run("rda", [vector], [3], previous)
    assert new.tobytes() == vector.tobytes()
    assert alphas.tolist() == [1.0]
