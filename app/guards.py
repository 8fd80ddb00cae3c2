"""Which of a round's replies take part: whole, of the right form, finite, of a usual length.

A bad reply is left out by itself, with its site and the reason; Flower would average it in, or
end the run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from flwr.app import RecordDict

from app.adapter import Vector
from app.codec import PayloadError, decode
from app.config import RunConfig
from app.fedavgopt import Floats, inner_products
from app.untrusted import one_line

# What a reply must hold, beside the adapter.
TRAIN_METRICS = (
    "num-examples", "train-loss", "num-tokens", "steps", "load-s", "train-s", "peak-memory-mb",
)  # fmt: skip
_LARGEST = 1e15  # that a metric can be; sums of them are still exact


@dataclass
class Gathered:
    """What came back for one message to each of some sites."""

    replies: dict[int, RecordDict] = field(default_factory=dict)  # partition id -> content
    failed: dict[int, str] = field(default_factory=dict)  # partition id -> reason
    bytes_down: int = 0
    bytes_up: int = 0
    # The adapter as the sites received it: the server's own, but for the codec's roundings.
    sent: Vector = field(default_factory=lambda: np.zeros(0, np.float32))


def usable(
    gathered: Gathered,
    adapter: Vector,
    config: RunConfig,
    usual_norms: Sequence[float],
    most_examples: Mapping[int, int],
) -> tuple[dict[int, Vector], Floats, dict[int, str]]:
    """What takes part in the round.

    Args:
        adapter: the server's own, which the sites got as ``gathered.sent``.
        usual_norms: of the changes that took part in the earlier rounds.
        most_examples: by partition id, what each site said that it has before the run. It is a
            site's weight: one that lies about it must do so in run.json, for all to see.

    Returns:
        Adapters by partition id (sorted), the inner products of their changes [K, K], and
        why the other sites take no part.
    """
    updates: dict[int, Vector] = {}
    rejected = dict(gathered.failed)
    for partition_id, content in sorted(gathered.replies.items()):
        numbers = {key: number(content, key) for key in TRAIN_METRICS}
        if np.isnan(list(numbers.values())).any() or numbers["num-examples"] < 1:
            rejected[partition_id] = f"metrics {numbers}"
            continue
        if numbers["num-examples"] > most_examples[partition_id]:
            rejected[partition_id] = (
                f"{numbers['num-examples']:.0f} examples, but it has {most_examples[partition_id]}"
            )
            continue
        try:
            payload = content.array_records["adapter"]["payload"].numpy()
            if payload.dtype != np.uint8 or payload.ndim != 1:
                raise PayloadError(f"payload of shape {payload.shape}, {payload.dtype}")
            vector = decode(config.up, payload.tobytes(), gathered.sent)
        except PayloadError as err:
            rejected[partition_id] = one_line(f"adapter: {err}")
        except Exception as err:  # whatever a site may have sent: numpy's errors are many
            rejected[partition_id] = f"reply without a readable adapter ({type(err).__name__})"
        else:
            if gathered.sent is not adapter:
                # The site started from a coarse copy. Its change is applied to the adapter
                # itself, so that the copy's roundings do not add up over the rounds.
                vector += adapter - gathered.sent
            updates[partition_id] = vector
    products = inner_products(list(updates.values()), adapter)
    norms = dict(zip(updates, np.sqrt(np.diag(products)), strict=True))
    too_long = _too_long(norms, config, usual_norms)
    chosen = [n for n, p in enumerate(updates) if p not in too_long]
    for partition_id in too_long:
        del updates[partition_id]
    return updates, products[np.ix_(chosen, chosen)], rejected | too_long


def _too_long(
    norms: dict[int, float], config: RunConfig, usual_norms: Sequence[float]
) -> dict[int, str]:
    """Sites whose change is out of all proportion, with the reason.

    Compared with the median of this round's and the earlier rounds' changes; the lower one
    of two, so that one of two sites cannot lift it.
    """
    rejected = {}
    usual = sorted(n for n in [*usual_norms, *norms.values()] if n > 0)
    median = usual[(len(usual) - 1) // 2] if usual else 0.0
    for partition_id, norm in norms.items():
        if norm > config.max_update_norm:
            limit = f"strategy.max-update-norm = {config.max_update_norm:g}"
        elif norm > config.max_norm_ratio * median > 0:
            limit = f"{norm / median:.3g} times the median, above strategy.max-norm-ratio = "
            limit += f"{config.max_norm_ratio:g}"
        else:
            continue
        rejected[partition_id] = f"update of norm {norm:.3g}: {limit}"
    return rejected


def number(reply: RecordDict, key: str) -> float:
    """The metric as a float; NaN where the reply does not hold it as a possible number."""
    try:
        value = float(cast(float, reply.metric_records["metrics"][key]))
    except (KeyError, ValueError, TypeError, OverflowError):
        return math.nan
    # All of them are counts, losses, seconds or sizes.
    return value if 0 <= value <= _LARGEST else math.nan
