"""FedAvgOpt (Sáinz-Pardo Díaz and López García, arXiv 2501.15949) from Gram matrices.

The aggregate is ``w = sum_k alpha_k n_k w_k / N``. The factors alpha minimise
``f(alpha) = sum_j || ( ||w_l - w_jl|| / ||w_l + w_jl|| )_l ||_2`` over clients j and layers l,
by Nelder-Mead from alpha = 1. The authors' code forms w anew for each of the hundreds of
evaluations. But every norm in f is a quadratic form in alpha, so one pass over the updates
(an inner-product matrix a layer) gives the same f at K x K cost an evaluation.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]
_CHUNK = 1 << 20  # float64 values held at a time: 8 MiB


def fedavgopt(
    updates: Sequence[Sequence[NDArray[Any]]],
    num_examples: Sequence[int],
    solver: str = "nelder-mead",
) -> tuple[list[NDArray[Any]], Floats]:
    """Aggregate K clients' layers.

    Args:
        updates: per client, the same L float arrays in the same order. Not modified.
        num_examples: n_k per client; not all zero. One with n_k = 0 is an opinion on the
            objective, without a part in the aggregate.
        solver: "nelder-mead", the authors' choice and path, or "bfgs" with the exact gradient.

    Returns:
        The L aggregated arrays in the inputs' dtype, and alpha [K].

    Raises:
        ValueError: no clients, shapes that differ, all n_k zero, or a value that is not finite.
    """
    if not updates or len(updates) != len(num_examples):
        raise ValueError(f"{len(updates)} updates, {len(num_examples)} example counts")
    shapes = [[np.shape(a) for a in u] for u in updates]
    if any(s != shapes[0] for s in shapes):
        raise ValueError("the clients' layers differ in number or shape")
    weights = np.asarray(num_examples, np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError("numbers of examples must be finite, not negative and not all zero")
    weights = weights / weights.sum()
    layers = [list(layer) for layer in zip(*updates, strict=True)]  # [L][K]
    gram = np.stack([_pivoted_gram(layer) for layer in layers])
    if not np.isfinite(gram).all():
        raise ValueError("an update holds a value that is not finite, or one too large to square")
    alphas = np.ones(len(updates))
    if len(updates) > 1 and objective(alphas * weights, gram) > 0:
        alphas = _minimise(weights, gram, solver)
    return [combine(layer, alphas * weights) for layer in layers], alphas


def _minimise(weights: Floats, gram: Floats, solver: str) -> Floats:
    """The alpha [K] that ``solver`` finds from alpha = 1.

    Nelder-Mead gives up after 200 K evaluations, with 20 clients far from the minimum: BFGS
    then goes on from where it stopped.
    """

    def f(alphas: Floats) -> float:
        return objective(alphas * weights, gram)

    def with_gradient(alphas: Floats) -> tuple[float, Floats]:
        return f(alphas), weights * gradient(alphas * weights, gram)

    best = np.ones(len(weights))
    if solver == "nelder-mead":
        found = minimize(f, best, method="Nelder-Mead")
        best = np.asarray(found.x, np.float64)
        if found.success:
            return best
    start, basis = best, _whitening(weights, gram)

    def along(z: Floats) -> tuple[float, Floats]:
        value, slope = with_gradient(start + basis @ z)
        return value, basis.T @ slope

    found = minimize(along, np.zeros(basis.shape[1]), jac=True, method="BFGS")
    return start + basis @ found.x if found.fun < f(best) else best


def _whitening(weights: Floats, gram: Floats) -> Floats:
    """Directions in alpha [K, <= K] along which w changes by as much, relative to its layers.

    Where the clients nearly agree, f is steep in the sum of c and flat in all else; without
    this, BFGS stops far from the minimum.
    """
    sides = np.vstack([np.diag(weights), weights])
    inner = sides.T @ gram @ sides
    size = np.trace(inner, axis1=1, axis2=2)
    metric = (inner[size > 0] / size[size > 0, None, None]).sum(axis=0)
    values, vectors = np.linalg.eigh(metric)
    kept = values > 1e-14 * values[-1]
    out: Floats = vectors[:, kept] / np.sqrt(values[kept])
    return out


def _chunks(layer: Sequence[NDArray[Any]], rows: int) -> Iterator[tuple[int, Floats]]:
    """Start and slice of the K flattened arrays, as float64 [K, <= _CHUNK / rows]."""
    flat = [np.ravel(a) for a in layer]
    step = max(1, _CHUNK // rows)
    for start in range(0, flat[0].size, step):
        yield start, np.stack([f[start : start + step] for f in flat]).astype(np.float64)


def inner_products(vectors: Sequence[NDArray[Any]], origin: NDArray[Any]) -> Floats:
    """<v_i - origin, v_j - origin> [K, K] in one pass over the K vectors."""
    gram = np.zeros((len(vectors), len(vectors)))
    for _, chunk in _chunks([*vectors, origin], len(vectors) + 1):
        differences = chunk[:-1] - chunk[-1]
        gram += differences @ differences.T
    return gram


def _pivoted_gram(layer: list[NDArray[Any]]) -> Floats:
    """Inner products [K + 1, K + 1] of (w_1 - p, ..., w_K - p, p), p the clients' mean.

    Without the pivot, ||w_k - w_j||^2 is a difference of large numbers and loses all its
    digits when the clients nearly agree, as they do after a short round.
    """
    rows = len(layer) + 1
    gram = np.zeros((rows, rows))
    for _, chunk in _chunks(layer, rows):
        pivot = chunk.mean(axis=0)
        basis = np.vstack([chunk - pivot, pivot])
        gram += basis @ basis.T
    return gram


def objective(coefficients: Floats, gram: Floats) -> float:
    """f for w = sum_k c_k w_k, from the pivoted Gram matrices [L, K + 1, K + 1].

    With v = (c - e_j, sum c - 1): ||w - w_j||^2 = v' H v; with + for -: ||w + w_j||^2.
    A layer in which both vanish (zero for every client) counts as agreement, not as 0/0.
    """
    ratios = _ratios(_squares(coefficients, gram, -1.0)[0], _squares(coefficients, gram, 1.0)[0])
    return float(np.sqrt(ratios.sum(axis=0)).sum())


def gradient(coefficients: Floats, gram: Floats) -> Floats:
    """df/dc [K] of ``objective``; 0 for a client that w equals, where f has a kink."""
    differences, d_differences = _squares(coefficients, gram, -1.0)
    sums, d_sums = _squares(coefficients, gram, 1.0)
    ratios = _ratios(differences, sums)
    roots = np.sqrt(ratios.sum(axis=0))  # [K]
    there = (sums > 0) & (roots > 0)
    scale = np.divide(0.5, sums * roots, out=np.zeros_like(sums), where=there)
    slopes: Floats = d_differences - ratios[..., None] * d_sums
    out: Floats = np.einsum("lk,lki->i", scale, slopes)
    return out


def _squares(coefficients: Floats, gram: Floats, sign: float) -> tuple[Floats, Floats]:
    """||w + sign w_j||^2 per layer and client [L, K], and its gradient in c [L, K, K]."""
    k = len(coefficients)
    v = np.hstack([coefficients + sign * np.eye(k), np.full((k, 1), coefficients.sum() + sign)])
    product = v @ gram  # [L, K, K + 1]
    squared = np.maximum((product * v).sum(axis=-1), 0.0)
    return squared, 2 * (product[..., :k] + product[..., k:])


def _ratios(differences: Floats, sums: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.divide(differences, sums, out=np.zeros_like(sums), where=differences > 0)


def combine(layer: Sequence[NDArray[Any]], coefficients: Floats) -> NDArray[Any]:
    """``sum_k c_k w_k`` in float64, returned in the arrays' own shape and dtype."""
    out = np.empty(layer[0].size, layer[0].dtype)
    for start, chunk in _chunks(layer, len(layer)):
        out[start : start + chunk.shape[1]] = coefficients @ chunk
    return out.reshape(np.shape(layer[0]))
