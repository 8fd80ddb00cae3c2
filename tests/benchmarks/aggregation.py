"""FedAvgOpt by us and as the paper states it, on the adapters of an 8B model.

    python -m tests.benchmarks.aggregation [--layers 32] [--clients 2,5,20]

The paper's algorithm, written from its formula (arXiv 2501.15949), forms the aggregate and all
its distances anew for every value of alpha that Nelder-Mead asks for. With 2 clients it is run to
its end; with more it would take hours, so there its time is the number of evaluations on the same
path (counted on our cheap form of the same objective) times the median of three evaluations that
are measured. CPU seconds of this process, one after the other; ratios last.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from app.server.fedavgopt import Floats, _pivoted_gram, fedavgopt, objective

Arrays = list[NDArray[np.float32]]
MEASURED_TO_THE_END = 2  # clients


def adapters(clients: int, layers: int, seed: int = 0) -> tuple[list[Arrays], list[int]]:
    """LoRA adapters (r 32 on q and v, Llama-3-8B's shapes), alike but for 1 % of noise."""
    rng = np.random.default_rng(seed)
    shapes = [(32, 4096), (4096, 32), (32, 4096), (1024, 32)] * layers
    common = [rng.standard_normal(s, np.float32) for s in shapes]
    updates = [
        [c + np.float32(0.01) * rng.standard_normal(c.shape, np.float32) for c in common]
        for _ in range(clients)
    ]
    return updates, [int(n) for n in rng.integers(100, 2000, clients)]


def papers_objective(
    updates: Sequence[Arrays], num_examples: Sequence[int]
) -> Callable[[Floats], float]:
    """f(alpha) = sum_j || (||w_l - w_jl|| / ||w_l + w_jl||)_l ||, w = sum_k alpha_k n_k w_k / N."""
    weights = np.asarray(num_examples) / sum(num_examples)

    def f(alphas: Floats) -> float:
        factors = [np.float32(a * n) for a, n in zip(alphas, weights, strict=True)]
        merged = [
            np.sum([c * w for c, w in zip(factors, layer, strict=True)], axis=0)
            for layer in zip(*updates, strict=True)
        ]
        total = 0.0
        for client in updates:
            ratios = [
                np.linalg.norm(m - w) / np.linalg.norm(m + w)
                for m, w in zip(merged, client, strict=True)
            ]
            total += float(np.linalg.norm(ratios))
        return total

    return f


def cpu_s(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    return work(), time.process_time() - started


def compare(clients: int, layers: int) -> str:
    """Print a paragraph for this many clients; return its ratios."""
    updates, num_examples = adapters(clients, layers)
    f, ones = papers_objective(updates, num_examples), np.ones(clients)
    weights = np.asarray(num_examples, np.float64) / sum(num_examples)
    gram = np.stack([_pivoted_gram(list(layer)) for layer in zip(*updates, strict=True)])

    def cheap(alphas: Floats) -> float:
        return objective(alphas * weights, gram)

    if clients <= MEASURED_TO_THE_END:
        found, paper_s = cpu_s(lambda: minimize(f, ones, method="Nelder-Mead"))
        how = f"measured, {found.nfev} evaluations"
    else:
        found = minimize(cheap, ones, method="Nelder-Mead")
        each_s = statistics.median(cpu_s(lambda: f(ones))[1] for _ in range(3))
        paper_s = found.nfev * each_s
        how = f"extrapolated: {found.nfev} evaluations of {each_s:.2f} s"
    print(f"{clients} clients, {sum(a.size for a in updates[0]):,} parameters")
    print(f"  paper        {paper_s:10.2f} s ({how}), f = {cheap(found.x):.8f}")
    ratios = []
    for solver in ("nelder-mead", "bfgs"):
        ours = [cpu_s(partial(fedavgopt, updates, num_examples, solver)) for _ in range(3)]
        (_, alphas), our_s = ours[0][0], statistics.median(s for _, s in ours)
        tracemalloc.start()  # in a run of its own: it slows the rest down
        fedavgopt(updates, num_examples, solver)
        extra_mb = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        print(
            f"  {solver:<12} {our_s:10.2f} s (median of 3), f = {cheap(alphas):.8f}, "
            f"{extra_mb:.0f} MiB beside the clients' adapters"
        )
        ratios.append(f"{solver} {paper_s / our_s:.0f}")
    kind = "measured" if clients <= MEASURED_TO_THE_END else "extrapolated"
    return f"ratio, {clients} clients ({kind}): {', '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--clients", default="2,5,20")
    args = parser.parse_args()
    ratios = [compare(int(k), args.layers) for k in args.clients.split(",")]
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
