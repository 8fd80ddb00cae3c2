"""One round: who takes part, what they send back, and the new adapter.

Flower's own strategies sample unseeded, wait for ever, average whatever is left of a round
and end "completed" even when nothing was; this one does none of that.
"""

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from app.adapter import Layout, Vector
from app.config import RunConfig
from app.fedavgopt import fedavgopt
from app.preflight import Sites, site_name

logger = logging.getLogger(__name__)

# What a reply must hold, beside the adapter.
TRAIN_METRICS = (
    "num-examples", "train-loss", "num-tokens", "steps", "load-s", "train-s", "peak-memory-mb",
)  # fmt: skip
EVAL_METRICS = ("num-tokens", "loss-sum", "num-correct")


class RoundError(Exception):
    """Too few usable replies; the adapter of the round before stands."""


@dataclass
class Gathered:
    """What came back for one message to each of some sites."""

    replies: dict[int, RecordDict] = field(default_factory=dict)  # partition id -> content
    failed: dict[int, str] = field(default_factory=dict)  # partition id -> reason


@dataclass
class Strategy:
    """Samples, sends, collects and aggregates with seeds and deadlines of its own."""

    grid: Grid
    config: RunConfig
    sites: Sites
    layout: Layout

    def sample(self, server_round: int) -> list[int]:
        """Partition ids that train in this round; a function of seed and round."""
        ids = sorted(self.sites.node_of)
        return self._choose(
            ids, self.config.fraction_train, self.config.min_train_nodes, server_round
        )

    def evaluation_sites(self) -> list[int]:
        """Partition ids that are evaluated, the same in every round so that losses compare."""
        ids = sorted(p for p, n in self.sites.num_holdout.items() if n)
        if not ids or self.config.fraction_evaluate == 0:
            return []
        return self._choose(ids, self.config.fraction_evaluate, self.config.min_evaluate_nodes, 0)

    def _choose(self, ids: list[int], fraction: float, at_least: int, stream: int) -> list[int]:
        count = min(len(ids), max(int(len(ids) * fraction), at_least))
        rng = np.random.default_rng([self.config.seed, stream])
        return sorted(int(i) for i in rng.choice(ids, count, replace=False))

    def train_round(self, server_round: int, adapter: Vector) -> tuple[Vector, dict[str, Any]]:
        """Train at the sampled sites and aggregate.

        Returns:
            The new adapter [layout.size] and the round's line for metrics.jsonl.

        Raises:
            RoundError: fewer than min-replies usable replies within round-timeout-s.
        """
        started = time.monotonic()
        partitions = self.sample(server_round)
        total = self.config.num_server_rounds
        names = ", ".join(map(site_name, partitions))
        logger.info("[round %d/%d] training at %s", server_round, total, names)
        gathered = self._ask(MessageType.TRAIN, partitions, server_round, adapter)
        updates, rejected = self._usable(gathered)
        for partition_id, why in sorted(rejected.items()):
            logger.warning(
                "[round %d/%d] without %s: %s", server_round, total, site_name(partition_id), why
            )
        if len(updates) < self.config.min_replies:
            reasons = "; ".join(f"{site_name(p)}: {why}" for p, why in sorted(rejected.items()))
            raise RoundError(
                f"round {server_round}: {len(updates)} usable replies, strategy.min-replies = "
                f"{self.config.min_replies} ({reasons})"
            )

        def column(key: str) -> list[float]:
            return [round(_number(gathered.replies[p], key), 6) for p in updates]

        num_examples = [int(n) for n in column("num-examples")]
        arrays = [list(self.layout.split(vector).values()) for vector in updates.values()]
        layers, alphas = fedavgopt(arrays, num_examples)
        new = self.layout.join(dict(zip(self.layout.names, layers, strict=True)))
        return new, {
            "round": server_round,
            "learning_rate": self.config.learning_rate(server_round),
            "partitions": list(updates),
            "train_loss": float(np.average(column("train-loss"), weights=num_examples)),
            "num_examples": num_examples,
            "alphas": [float(a) for a in alphas],
            "adapter_norm": float(np.linalg.norm(new)),
            "update_norm": float(np.linalg.norm(new - adapter)),
            "bytes_down": adapter.nbytes * len(partitions),
            "bytes_up": sum(v.nbytes for v in updates.values()),
            "num_tokens": [int(n) for n in column("num-tokens")],
            "steps": [int(n) for n in column("steps")],
            "load_s": column("load-s"),
            "train_s": column("train-s"),
            "peak_memory_mb": column("peak-memory-mb"),
            "rejected": {site_name(p): why for p, why in sorted(rejected.items())},
            "seconds": time.monotonic() - started,
        }

    def evaluate(self, server_round: int, adapter: Vector) -> dict[str, Any]:
        """Held-out loss and token accuracy of ``adapter``; empty where evaluation is off.

        A site that does not answer is left out of this figure and named in the log.
        """
        partitions = self.evaluation_sites()
        if not partitions:
            return {}
        started = time.monotonic()
        gathered = self._ask(MessageType.EVALUATE, partitions, server_round, adapter)
        for partition_id, content in list(gathered.replies.items()):
            if not np.isfinite([_number(content, key) for key in EVAL_METRICS]).all():
                gathered.failed[partition_id] = "a metric is missing or not finite"
                del gathered.replies[partition_id]
        for partition_id, why in sorted(gathered.failed.items()):
            logger.warning("[evaluation] without %s: %s", site_name(partition_id), why)

        def total(key: str) -> float:
            return sum(_number(reply, key) for reply in gathered.replies.values())

        tokens = total("num-tokens")
        if not tokens:
            logger.warning("[evaluation] no site returned an answer token; no held-out loss")
            return {}
        return {
            "eval_loss": total("loss-sum") / tokens,
            "eval_token_accuracy": total("num-correct") / tokens,
            "eval_tokens": int(tokens),
            "eval_partitions": sorted(gathered.replies),
            "eval_bytes_down": adapter.nbytes * len(partitions),
            "eval_seconds": time.monotonic() - started,
        }

    def _ask(
        self, kind: str, partitions: list[int], server_round: int, adapter: Vector
    ) -> Gathered:
        """Send the adapter to these sites and wait for all replies or round-timeout-s."""
        record = ArrayRecord({"flat": Array(adapter)})
        job = ConfigRecord({"round": server_round, "layout": self.layout.hash})
        messages = []
        for partition_id in partitions:
            content = RecordDict({"adapter": record, "job": job})
            messages.append(
                Message(content, dst_node_id=self.sites.node_of[partition_id], message_type=kind)
            )
        # Flower reports a late reply neither as a result nor as a failure.
        late = f"no reply within strategy.round-timeout-s = {self.config.round_timeout_s:.0f}"
        gathered = Gathered(failed=dict.fromkeys(partitions, late))
        replies = self.grid.send_and_receive(messages, timeout=self.config.round_timeout_s)
        # Sending gave each message its id. A node that died is answered for by the SuperLink,
        # so the sender's id alone does not say which site it was.
        asked = {m.metadata.message_id: p for m, p in zip(messages, partitions, strict=True)}
        for reply in replies:
            partition_id = asked[reply.metadata.reply_to_message_id]
            if reply.has_error():
                gathered.failed[partition_id] = reply.error.reason or "error without a reason"
            else:
                gathered.replies[partition_id] = reply.content
                del gathered.failed[partition_id]
        return gathered

    def _usable(self, gathered: Gathered) -> tuple[dict[int, Vector], dict[int, str]]:
        """Adapters by partition id (sorted), and why the others take no part."""
        updates: dict[int, Vector] = {}
        rejected = dict(gathered.failed)
        for partition_id, content in sorted(gathered.replies.items()):
            numbers = {key: _number(content, key) for key in TRAIN_METRICS}
            try:
                vector = np.asarray(content.array_records["adapter"]["flat"].numpy())
            except Exception as err:  # whatever a site may have sent: numpy's errors are many
                rejected[partition_id] = f"reply without a readable adapter ({type(err).__name__})"
                continue
            if not np.isfinite(list(numbers.values())).all() or numbers["num-examples"] < 1:
                rejected[partition_id] = f"metrics {numbers}"
            elif vector.shape != (self.layout.size,) or vector.dtype != np.float32:
                rejected[partition_id] = f"adapter of shape {vector.shape}, {vector.dtype}"
            elif not np.isfinite(vector).all():
                rejected[partition_id] = "adapter with values that are not finite"
            else:
                updates[partition_id] = vector
        return updates, rejected


def _number(reply: RecordDict, key: str) -> float:
    """The metric as a float; NaN where the reply does not hold it as a number."""
    try:
        return float(cast(float, reply.metric_records["metrics"][key]))
    except (KeyError, ValueError, TypeError, OverflowError):
        return math.nan
