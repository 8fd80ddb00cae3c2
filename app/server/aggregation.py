"""Many sites' adapters to one: the strategies by name, and how far the sites agree."""

from collections.abc import Sequence

import numpy as np

from app.server.fedavgopt import Floats, combine, fedavgopt
from app.wire.adapter import Layout, Vector


def aggregate(
    name: str,
    vectors: Sequence[Vector],
    num_examples: Sequence[int],
    previous: Vector,
    layout: Layout,
    solver: str,
) -> tuple[Vector, Floats]:
    """The new adapter [layout.size] and the factors alpha [K].

    Args:
        name: strategy.name. fedprox differs from fedavg at the sites only (its proximal term:
            Li et al., arXiv 1812.06127).
        vectors: the sites' adapters; fedavgopt-delta changes them in place, to need no copy.
        previous: the adapter that the sites started from.
    """
    if name in ("fedavg", "fedprox"):
        weights = np.asarray(num_examples, np.float64) / sum(num_examples)
        return combine(vectors, weights), np.ones(len(vectors))
    delta = name == "fedavgopt-delta"
    if delta:
        for vector in vectors:
            vector -= previous
    arrays = [list(layout.split(vector).values()) for vector in vectors]
    layers, alphas = fedavgopt(arrays, num_examples, solver)
    new = layout.join(dict(zip(layout.names, layers, strict=True)))
    return (previous + new if delta else new), alphas


def capped(counts: Sequence[int], max_share: float) -> list[int]:
    """The sites' weights: their rows, the largest lowered until none is above its share of all.

    The largest are lowered to one level, in whole rows; the others stay as they are. With a share
    of 1 / K or less nothing but equal weights is left.

    Args:
        counts: rows [K] that each site used, 1 or more.
        max_share: strategy.max-share.
    """
    ordered = sorted(counts, reverse=True)
    rest = sum(ordered)
    for lowered, largest in enumerate(ordered):
        if lowered * max_share >= 1:
            break
        # `lowered` sites at a level that is exactly their share of all: level = share * sum.
        level = (1 + 1e-9) * max_share * rest / (1 - lowered * max_share)
        if largest <= level:
            whole = max(1, int(level))
            return [min(n, whole) for n in counts] if lowered else list(counts)
        rest -= largest
    return [ordered[-1]] * len(counts)


def mean_cosine(products: Floats) -> float | None:
    """Mean cosine between different sites' changes, from their inner products [K, K].

    None for a single site; a site that changed nothing counts as 0.
    """
    k = len(products)
    if k < 2:
        return None
    norms = np.sqrt(np.diag(products))
    scale = np.outer(norms, norms)
    cosines = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return float((cosines.sum() - np.trace(cosines)) / (k * (k - 1)))


def weight_change_norm(layout: Layout, vector: Vector, scaling: float) -> float:
    """||Delta W|| over all layers, Delta W = scaling B A, without forming any of them.

    ||B A||^2 = tr((B^T B)(A A^T)): r x r matrices.
    """
    arrays, total = layout.split(vector), 0.0
    for name, a in arrays.items():
        if name.endswith(".lora_A.weight"):
            b = arrays[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
            a = a.astype(np.float64)
            total += float(((b.T @ b) * (a @ a.T)).sum())
    return scaling * float(np.sqrt(max(total, 0.0)))
