"""Which of a round's replies take part: whole, of the right form, finite, of a usual length.

A bad reply is left out by itself, with its site and the reason; Flower would average it in, or
end the run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
from flwr.app import RecordDict

from app.config import RunConfig
from app.server.fedavgopt import Floats, inner_products
from app.server.untrusted import one_line
from app.wire.adapter import Vector
from app.wire.codec import PayloadError, decode

# What a reply must hold, beside the adapter.
TRAIN_METRICS = (
    "num-examples", "train-loss", "num-tokens", "steps", "load-s", "train-s", "peak-memory-mb",
)  # fmt: skip
_LARGEST = 1e15  # that a metric can be; sums of them are still exact
# Nats a token. A model that knows nothing has the logarithm of its vocabulary: 12 at most.
MOST_LOSS = 100.0
# The expected length falls with the learning rate down to this part of an earlier one's: int4 with
# error feedback may send a tenth of an earlier round's change late.
_LEAST_PART = 1 / 50
# Steps that a site says it took make room for a change so many times as long, no more.
_MOST_STEPS = 8


@dataclass
class Gathered:
    """What came back for one message to each of some sites."""

    replies: dict[int, RecordDict] = field(default_factory=dict)  # partition id -> content
    failed: dict[int, str] = field(default_factory=dict)  # partition id -> reason
    bytes_down: int = 0
    bytes_up: int = 0
    # The adapter as the sites received it: the server's own, but for the codec's roundings.
    sent: Vector = field(default_factory=lambda: np.zeros(0, np.float32))


@dataclass(frozen=True)
class Change:
    """How long a site's change in a round was, and what it came of."""

    norm: float
    learning_rate: float
    steps: float

    @classmethod
    def of_lines(cls, lines: Sequence[Mapping[str, Any]]) -> list[Self]:
        """All changes that took part, from the rounds' lines in metrics.jsonl."""
        return [
            cls(norm, line["learning_rate"], steps)
            for line in lines
            for norm, steps in zip(line["client_update_norms"], line["steps"], strict=True)
        ]


def usable(
    gathered: Gathered,
    adapter: Vector,
    config: RunConfig,
    server_round: int,
    earlier: Sequence[Change],
    most_examples: Mapping[int, int],
) -> tuple[dict[int, Vector], Floats, dict[int, str]]:
    """What takes part in the round.

    Args:
        adapter: the server's own, which the sites got as ``gathered.sent``.
        earlier: the changes that took part in the earlier rounds.
        most_examples: by partition id, what each site said that it has before the run. It bounds
            a site's weight: one that lies about it must do so in run.json, for all to see.

    Returns:
        Adapters by partition id (sorted), the inner products of their changes [K, K], and
        why the other sites take no part.
    """
    updates: dict[int, Vector] = {}
    rejected = dict(gathered.failed)
    steps: dict[int, float] = {}
    for partition_id, content in sorted(gathered.replies.items()):
        numbers = {key: number(content, key) for key in TRAIN_METRICS}
        if why := _impossible(numbers, config, most_examples[partition_id]):
            rejected[partition_id] = why
            continue
        steps[partition_id] = numbers["steps"]
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
    lr = config.learning_rate(server_round)
    changes = {p: Change(float(norm), lr, steps[p]) for p, norm in norms.items()}
    too_long = _too_long(changes, config, earlier)
    chosen = [n for n, p in enumerate(updates) if p not in too_long]
    for partition_id in too_long:
        del updates[partition_id]
    return updates, products[np.ix_(chosen, chosen)], rejected | too_long


def _impossible(numbers: dict[str, float], config: RunConfig, most_examples: int) -> str:
    """Why these figures of a training cannot be, or nothing."""
    examples, steps = numbers["num-examples"], numbers["steps"]
    if np.isnan(list(numbers.values())).any() or examples < 1 or steps < 1:
        return f"metrics {numbers}"
    if numbers["train-loss"] > MOST_LOSS:
        return f"a loss of {numbers['train-loss']:.3g} a token"
    if examples > most_examples:
        return f"{examples:.0f} examples, but it has {most_examples}"
    if steps > config.steps(int(examples)):
        return f"{steps:.0f} steps, but {examples:.0f} rows make {config.steps(int(examples))}"
    return ""


def _too_long(
    changes: dict[int, Change], config: RunConfig, earlier: Sequence[Change]
) -> dict[int, str]:
    """Sites whose change is out of all proportion, with the reason.

    Compared with the median of what this round's and the earlier rounds' changes let expect; the
    lower one of two, so that one of two sites cannot lift it.
    """
    rejected = {}
    for partition_id, change in changes.items():
        lengths = [_expected(change, other, config) for other in [*earlier, *changes.values()]]
        usual = sorted(n for n in lengths if n > 0)
        median = usual[(len(usual) - 1) // 2] if usual else 0.0
        if change.norm > config.max_update_norm:
            limit = f"strategy.max-update-norm = {config.max_update_norm:g}"
        elif change.norm > config.max_norm_ratio * median > 0:
            limit = f"{change.norm / median:.3g} times the median at its learning rate and steps, "
            limit += f"above strategy.max-norm-ratio = {config.max_norm_ratio:g}"
        else:
            continue
        rejected[partition_id] = f"update of norm {change.norm:.3g}: {limit}"
    return rejected


def _expected(change: Change, other: Change, config: RunConfig) -> float:
    """How long ``change`` would be if it came about as ``other`` did.

    The steps of Adam are as long as the learning rate, whatever the gradient. More steps lead as
    much further at most, and fewer still as far as the root of their number, going to and fro.
    Noise and clipping, though, make a length that knows of neither.
    """
    if config.noise_multiplier or 0 < config.clip_norm <= 1.1 * other.norm:
        return other.norm
    lr = change.learning_rate / other.learning_rate if other.learning_rate else 1.0
    steps = change.steps / other.steps
    further = min(steps, _MOST_STEPS) if steps > 1 else math.sqrt(steps)
    return other.norm * max(lr, _LEAST_PART) * further


def number(reply: RecordDict, key: str) -> float:
    """The metric as a float; NaN where the reply does not hold it as a possible number."""
    try:
        value = float(cast(float, reply.metric_records["metrics"][key]))
    except (KeyError, ValueError, TypeError, OverflowError):
        return math.nan
    # All of them are counts, losses, seconds or sizes.
    return value if 0 <= value <= _LARGEST else math.nan
