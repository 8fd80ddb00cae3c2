"""Many sites' adapters to one: the strategies by name, and how far the sites agree."""

from collections.abc import Sequence

import numpy as np

from app.server.fedavgopt import Floats, combine, fedavgopt, inner_products
from app.wire.adapter import Layout, Vector

# Of directions that cancel each other this part, or less, is left by their last digits.
_NO_DIRECTION = 1e-6


def aggregate(
    name: str,
    vectors: Sequence[Vector],
    num_examples: Sequence[int],
    previous: Vector,
    layout: Layout,
    solver: str,
    server_lr: float = 1.0,
) -> tuple[Vector, Floats]:
    """The new adapter [layout.size] and the factors alpha [K], which know nothing of server_lr.

    Args:
        name: strategy.name. fedprox differs from fedavg at the sites only (its proximal term:
            Li et al., arXiv 1812.06127).
        vectors: the sites' adapters; fedavgopt-delta changes them in place, to need no copy.
        previous: the adapter that the sites started from.
        server_lr: strategy.server-lr; 1 gives what the strategy does, bit for bit.
    """
    new, alphas = _by_name(name, vectors, num_examples, previous, layout, solver)
    if server_lr != 1:  # in place, to need no copy
        new -= previous
        new *= server_lr
        new += previous
    return new, alphas


def _by_name(
    name: str,
    vectors: Sequence[Vector],
    num_examples: Sequence[int],
    previous: Vector,
    layout: Layout,
    solver: str,
) -> tuple[Vector, Floats]:
    if name == "rda":
        return rda(vectors, num_examples, previous, layout)
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


def rda(
    vectors: Sequence[Vector], num_examples: Sequence[int], previous: Vector, layout: Layout
) -> tuple[Vector, Floats]:
    """Radial-directional averaging of the sites' changes (Decoupled DiLoCo, arXiv 2604.21428).

    In each tensor, with changes v and weights w that add up to 1: n = sum w |v|, u = sum w v / |v|,
    change = n u / |u|. So it is as long as the sites' are on average, where their mean would be
    shorter, and where it points one site has no more part than its weight, however far it went. A
    change of 0 has no direction and no length; where the others' directions cancel each other, or
    nobody changed anything, the change is the weighted mean.

    Returns:
        The new adapter [layout.size], and alpha [K]: by what the strategy multiplied each site's
        change, beside its weight, as a mean over the tensors.
    """
    weights = np.asarray(num_examples, np.float64) / sum(num_examples)
    new, start = np.empty_like(previous), layout.split(previous)
    arrays, alphas = [layout.split(vector) for vector in vectors], []
    for name, tensor in layout.split(new).items():
        sites = [a[name] for a in arrays]
        factors = _restoring(inner_products(sites, start[name]), weights)
        shares = factors * weights
        tensor[:] = combine([*sites, start[name]], np.append(shares, 1 - shares.sum()))
        alphas.append(factors)
    return new, np.mean(alphas, axis=0)


def _restoring(products: Floats, weights: Floats) -> Floats:
    """Factors [K] of RDA for the changes of one tensor with these inner products [K, K]."""
    lengths = np.sqrt(np.diag(products))
    moved = lengths > 0
    cosines = _cosines(products)
    np.fill_diagonal(cosines, moved)  # not a last digit off: a site alone counts exactly once
    direction = max(float(weights @ cosines @ weights), 0.0) ** 0.5  # |u|
    factors = np.ones(len(weights))
    if direction > _NO_DIRECTION * weights[moved].sum():
        factors[moved] = weights @ lengths / (lengths[moved] * direction)
    return factors


def _cosines(products: Floats) -> Floats:
    """Of each two changes [K, K], from their inner products; 0 with one that is 0."""
    lengths = np.sqrt(np.diag(products))
    scale = np.outer(lengths, lengths)
    out: Floats = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return out


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
    cosines = _cosines(products)
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
