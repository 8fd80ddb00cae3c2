"""FedAvgOpt (Sáinz-Pardo Díaz and López García, arXiv 2501.15949) from Gram matrices.

The aggregate is ``w = sum_k alpha_k n_k w_k / N``. The factors alpha minimise
``f(alpha) = sum_j || ( ||w_l - w_jl|| / ||w_l + w_jl|| )_l ||_2`` over clients j and layers l,
by Nelder-Mead from alpha = 1. The authors' code forms w anew for each of the hundreds of
evaluations. But every norm in f is a quadratic form in alpha, so one pass over the updates
(an inner-product matrix a layer) gives the same f at K x K cost an evaluation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]
_CHUNK = 1 << 20  # float64 values held at a time: 8 MiB


def fedavgopt(
    updates: Sequence[Sequence[NDArray[Any]]], num_examples: Sequence[int]
) -> tuple[list[NDArray[Any]], Floats]:
    """Aggregate K clients' layers.

    Args:
        updates: per client, the same L float arrays in the same order. Not modified.
        num_examples: n_k per client; not all zero.

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
        found = minimize(lambda a: objective(a * weights, gram), alphas, method="Nelder-Mead")
        alphas = np.asarray(found.x, np.float64)
    return [_combine(layer, alphas * weights) for layer in layers], alphas


def _chunks(layer: list[NDArray[Any]], rows: int) -> Any:
    """Slices of the K flattened arrays as float64 [K, <= _CHUNK / rows]."""
    flat = [np.ravel(a) for a in layer]
    step = max(1, _CHUNK // rows)
    for start in range(0, flat[0].size, step):
        yield start, np.stack([f[start : start + step] for f in flat]).astype(np.float64)


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
    unit = np.eye(len(coefficients))

    def squares(sign: float) -> Floats:  # [L, K]
        shifted = coefficients + sign * unit
        v = np.hstack([shifted, np.full((len(unit), 1), coefficients.sum() + sign)])
        squared: Floats = ((v @ gram) * v).sum(axis=-1)
        return np.maximum(squared, 0.0)

    differences, sums = squares(-1.0), squares(1.0)
    with np.errstate(divide="ignore"):
        ratios = np.divide(differences, sums, out=np.zeros_like(sums), where=differences > 0)
    return float(np.sqrt(ratios.sum(axis=0)).sum())


def _combine(layer: list[NDArray[Any]], coefficients: Floats) -> NDArray[Any]:
    out = np.empty(layer[0].size, layer[0].dtype)
    for start, chunk in _chunks(layer, len(layer)):
        out[start : start + chunk.shape[1]] = coefficients @ chunk
    return out.reshape(np.shape(layer[0]))
