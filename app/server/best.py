"""Which round of a run is the best: that of the lowest held-out loss at the sites.

Of metrics.jsonl, so the evaluation can ask it of any run, also of one that was cut off.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from app.server.checkpoint import RunFolder


def best_round(lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The round of the lowest held-out loss (median of the sites' own), the first of equal ones.

    Medians of other sites say nothing of each other. So of all lines only those count that were
    measured at the same sites as most are; of two such sets that of more sites, then the later.

    Returns:
        ``round``, ``held_out_loss`` and ``sites`` (how many measured it); None where no round was
        measured.
    """
    measured = [line for line in lines if "eval_loss_median" in line]
    if not measured:
        return None
    of = Counter(tuple(line["eval_partitions"]) for line in measured)
    last = {tuple(line["eval_partitions"]): line["round"] for line in measured}
    sites = max(of, key=lambda found: (of[found], len(found), last[found]))
    same = [line for line in measured if tuple(line["eval_partitions"]) == sites]
    best = min(same, key=lambda line: line["eval_loss_median"])
    return {
        "round": best["round"],
        "held_out_loss": best["eval_loss_median"],
        "sites": len(sites),
    }


def name_best(folder: RunFolder, facts: dict[str, Any]) -> None:
    """The best round so far, in run.json and as a link beside it; nothing where none is measured.

    Raises:
        ResultsError: either cannot be written.
    """
    if best := best_round(folder.lines):
        facts["best"] = best
        folder.write_run(facts)
        folder.point_best(best["round"])
