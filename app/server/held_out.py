"""The held-out loss of a round from the sites' own sums, of which any may be a lie.

The mean over all answer tokens (``eval_loss``) is what the loss is if nobody lies; one site can
move it wherever it likes. The median of the sites' own means (``eval_loss_median``) stays among
the honest ones' as long as more than half of the sites are honest: that one is shown to people,
and it says which round is better. Of two sites there is no such figure: their median is the mean.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict

from app.config import RunConfig
from app.server.guards import MOST_LOSS, number

# What a reply to an evaluation must hold.
EVAL_METRICS = ("num-tokens", "loss-sum", "num-correct")


def believable(
    replies: Mapping[int, RecordDict],
    num_holdout: Mapping[int, int],
    known_tokens: Mapping[int, int],
    config: RunConfig,
) -> tuple[dict[int, dict[str, float]], dict[int, str]]:
    """The sites' figures that can be, by partition id (sorted), and why the others cannot.

    Args:
        replies: by partition id.
        num_holdout: held-out rows, as each site said before the run.
        known_tokens: answer tokens of the sites that were evaluated in this run before. The same
            rows have the same tokens in every round.
    """
    figures, rejected = {}, {}
    for partition_id, reply in sorted(replies.items()):
        numbers = {key: number(reply, key) for key in EVAL_METRICS}
        tokens, loss_sum = numbers["num-tokens"], numbers["loss-sum"]
        most = num_holdout[partition_id] * config.seq_length
        known = known_tokens.get(partition_id, tokens)
        if np.isnan(list(numbers.values())).any() or tokens % 1 or numbers["num-correct"] > tokens:
            rejected[partition_id] = f"metrics {numbers}"
        elif not tokens:
            rejected[partition_id] = f"no answer token within train.seq-length {config.seq_length}"
        elif tokens > most:
            rejected[partition_id] = f"{tokens:.0f} answer tokens, its rows hold {most} at most"
        elif tokens != known:
            rejected[partition_id] = (
                f"{tokens:.0f} answer tokens, {known} when it was evaluated first in this run"
            )
        elif loss_sum > MOST_LOSS * tokens:
            rejected[partition_id] = f"a loss of {loss_sum / tokens:.3g} a token"
        else:
            figures[partition_id] = numbers
    return figures, rejected


def held_out(figures: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Mean and median over these sites, at least one, and each site's own; for metrics.jsonl."""
    tokens, losses, hits = (
        np.array([numbers[key] for numbers in figures.values()]) for key in EVAL_METRICS
    )
    return {
        "eval_loss": float(losses.sum() / tokens.sum()),
        "eval_loss_median": float(np.median(losses / tokens)),
        "eval_token_accuracy": float(hits.sum() / tokens.sum()),
        "eval_token_accuracy_median": float(np.median(hits / tokens)),
        "eval_tokens": int(tokens.sum()),
        "eval_partitions": list(figures),
        "eval_site_losses": [float(loss) for loss in losses / tokens],
        "eval_site_accuracies": [float(share) for share in hits / tokens],
        "eval_site_tokens": [int(n) for n in tokens],
    }
