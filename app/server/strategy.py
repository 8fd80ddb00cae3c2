"""One round: who takes part, what they send back, and the new adapter.

Flower's own strategies sample unseeded, wait for ever, average whatever is left of a round
and end "completed" even when nothing was; this one does none of that.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MessageType, RecordDict
from flwr.serverapp import Grid

from app.config import MIB, RunConfig
from app.server.aggregation import aggregate, capped, mean_cosine, weight_change_norm
from app.server.events import event, tell_left_out
from app.server.exchange import REFUSED, exchange, uploaded_bytes
from app.server.fedavgopt import Floats
from app.server.guards import Change, Gathered, number, usable
from app.server.held_out import believable, held_out
from app.server.orders import order, upload_name
from app.server.preflight import Sites
from app.server.site_list import site_name
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.codec import decode, encode

logger = logging.getLogger(__name__)

RAISED = "<class '"  # so Flower tells what a ClientApp has raised


class RoundError(Exception):
    """Too few usable replies; the adapter of the round before stands."""


class HopelessError(RoundError):
    """Every site fails alike: neither others nor another run would do better."""


@dataclass
class Strategy:
    """Samples, sends, collects and aggregates with seeds and deadlines of its own.

    Attributes:
        run: its id.
        bytes_sent: adapter bytes of this run so far, both ways, evaluation included; also those of
            rounds that failed or were cut off.
        keep: called with bytes_sent whenever it changes, so that a killed run's are not lost.
        changes: those that took part so far.
        holdout_tokens: by partition id, answer tokens at a site's first evaluation.
        taken: by partition id, the site's last upload that the adapter is made of.
    """

    grid: Grid
    config: RunConfig
    sites: Sites
    layout: Layout
    run: str
    bytes_sent: int = 0
    keep: Callable[[int], None] = lambda _: None
    changes: list[Change] = field(default_factory=list)
    holdout_tokens: dict[int, int] = field(default_factory=dict)
    taken: dict[int, str] = field(default_factory=dict)

    def take_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Go on behind the rounds of these lines of metrics.jsonl."""
        self.changes = Change.of_lines(lines)
        for line in lines:
            self._note_tokens(line)

    def _note_tokens(self, line: Mapping[str, Any]) -> None:
        sites, tokens = line.get("eval_partitions", ()), line.get("eval_site_tokens", ())
        self.holdout_tokens = dict(zip(sites, tokens, strict=False)) | self.holdout_tokens

    @cached_property
    def _initial(self) -> Vector:
        """What every site can compute as well: the reference of what is sent to them."""
        return initial_adapter(self.layout, self.config.seed)

    def sample(self, server_round: int, attempt: int = 0) -> list[int]:
        """Partition ids that train; a function of seed, round and attempt."""
        ids = sorted(self.sites.node_of)
        config = self.config
        return self._choose(
            ids, config.fraction_train, config.min_train_nodes, server_round, attempt
        )

    def evaluation_sites(self) -> list[int]:
        """Partition ids that are evaluated, the same in every round so that losses compare."""
        ids = sorted(p for p, n in self.sites.num_holdout.items() if n)
        if not ids or self.config.fraction_evaluate == 0:
            return []
        return self._choose(ids, self.config.fraction_evaluate, self.config.min_evaluate_nodes, 0)

    def _choose(
        self, ids: list[int], fraction: float, at_least: int, stream: int, attempt: int = 0
    ) -> list[int]:
        count = min(len(ids), max(int(len(ids) * fraction), at_least))
        # Of attempt 0 too the seed is (seed, stream): numpy ignores zeros at the end.
        rng = np.random.default_rng([self.config.seed, stream, attempt])
        return sorted(int(i) for i in rng.choice(ids, count, replace=False))

    def train_round(self, server_round: int, adapter: Vector) -> tuple[Vector, dict[str, Any]]:
        """Train at sampled sites and aggregate; with other sites where too few replies are good.

        Returns:
            The new adapter [layout.size] and the round's line for metrics.jsonl.

        Raises:
            RoundError: after max-retries fewer than min-replies replies could be used; earlier
                (HopelessError) where all sites, or those of two attempts, fail with one reason.
        """
        started = time.monotonic()
        total = self.config.num_server_rounds
        rejected: dict[str, str] = {}
        down = up = 0
        for attempt in range(self.config.max_retries + 1):
            partitions = self.sample(server_round, attempt)
            names = list(map(site_name, partitions))
            logger.info(
                "[round %d/%d] training at %s", server_round, total, ", ".join(names),
                extra=event("training", round=server_round, attempt=attempt, sites=names),
            )  # fmt: skip
            gathered = self._ask(MessageType.TRAIN, partitions, server_round, adapter, attempt)
            down += gathered.bytes_down
            up += gathered.bytes_up
            updates, products, bad = usable(
                gathered, adapter, self.config, server_round, self.changes, self.sites.num_examples
            )
            without = {site_name(p): why for p, why in sorted(bad.items())}
            tell_left_out(f"round {server_round}/{total}", server_round, "train", without)
            rejected |= without
            if len(updates) >= self.config.min_replies:
                break
            self._check_hope(server_round, attempt, partitions, rejected)
        else:
            reasons = "; ".join(f"{name}: {why}" for name, why in sorted(rejected.items()))
            raise RoundError(
                f"round {server_round}: {len(updates)} usable replies, strategy.min-replies = "
                f"{self.config.min_replies}, after {attempt} repetitions "
                f"(strategy.max-retries) ({reasons})"
            )

        new, line = self._aggregate(server_round, adapter, gathered.replies, updates, products)
        self.taken |= dict.fromkeys(updates, upload_name(self.run, server_round, attempt))
        return new, line | {
            "bytes_down": down,
            "bytes_up": up,
            "rejected": dict(sorted(rejected.items())),
            "attempts": attempt + 1,
            "seconds": time.monotonic() - started,
        }

    def _check_hope(
        self, server_round: int, attempt: int, asked: list[int], rejected: Mapping[str, str]
    ) -> None:
        everybody = len(asked) == len(self.sites.node_of)
        reasons, all_failed = set(rejected.values()), {*map(site_name, asked)} <= rejected.keys()
        if not all_failed or len(reasons) > 1 or not (attempt or everybody) or len(rejected) < 2:
            return
        (why,) = reasons
        if why.startswith(RAISED):  # by its app, on its rows and model; what is late may come yet
            raise HopelessError(
                f"round {server_round}: {', '.join(sorted(rejected))} fail alike: {why}"
            )

    def _aggregate(
        self,
        server_round: int,
        adapter: Vector,
        replies: Mapping[int, RecordDict],
        updates: dict[int, Vector],
        products: Floats,
    ) -> tuple[Vector, dict[str, Any]]:
        """The new adapter of these sites' updates, and what the round's line says of both."""
        config = self.config

        def column(key: str) -> list[float]:
            return [round(number(replies[p], key), 6) for p in updates]

        num_examples, steps = ([int(n) for n in column(k)] for k in ("num-examples", "steps"))
        used = [min(n, s * config.rows_per_step) for n, s in zip(num_examples, steps, strict=True)]
        weights = capped(used, config.max_share)
        new, alphas = aggregate(
            config.strategy_name, list(updates.values()), weights, adapter, self.layout,
            config.solver, config.server_lr,
        )  # fmt: skip
        norms = np.sqrt(np.diag(products))
        shares = np.array(weights) / sum(weights)
        line = {
            "round": server_round,
            "learning_rate": config.learning_rate(server_round),
            "partitions": list(updates),
            "train_loss": float(np.average(column("train-loss"), weights=shares)),
            "train_site_losses": column("train-loss"),
            "num_examples": num_examples,
            "shares": shares.tolist(),
            "alphas": [float(a) for a in alphas],
            "weight_sum": float((alphas * shares).sum()),
            "client_update_norms": [float(n) for n in norms],
            "client_cosine": mean_cosine(products),
            "adapter_norm": float(np.linalg.norm(new)),
            "update_norm": float(np.linalg.norm(new - adapter)),
            "weight_change_norm": weight_change_norm(
                self.layout, new, config.lora_alpha / config.lora_r
            ),
            "num_tokens": [int(n) for n in column("num-tokens")],
            "steps": steps,
            "load_s": column("load-s"),
            "train_s": column("train-s"),
            "peak_memory_mb": column("peak-memory-mb"),
        }
        self.changes += Change.of_lines([line])
        return new, line

    def evaluate(self, server_round: int, adapter: Vector) -> dict[str, Any]:
        """Held-out loss and token accuracy of ``adapter``; empty where evaluation is off.

        A site that does not answer is left out of this figure and named in the log.
        """
        partitions = self.evaluation_sites()
        if not partitions:
            return {}
        started = time.monotonic()
        extra = event("evaluating", round=server_round, sites=[*map(site_name, partitions)])
        logger.debug(
            "[round %d] evaluation at %d sites", server_round, len(partitions), extra=extra
        )
        gathered = self._ask(MessageType.EVALUATE, partitions, server_round, adapter)
        figures, impossible = believable(
            gathered.replies, self.sites.num_holdout, self.holdout_tokens, self.config
        )
        rejected = {site_name(p): why for p, why in sorted((gathered.failed | impossible).items())}
        tell_left_out("evaluation", server_round, "evaluate", rejected)
        if not figures:
            logger.warning("[evaluation] no site returned an answer token; no held-out loss")
            return {}
        result = held_out(figures)
        self._note_tokens(result)
        return result | {
            "eval_rejected": rejected,
            "eval_bytes_down": gathered.bytes_down,
            "eval_seconds": time.monotonic() - started,
        }

    def budget(self) -> dict[str, float]:
        """MiB of adapters sent so far in this run, both ways, and what is left of the budget."""
        sent = self.bytes_sent / MIB
        return {"mb_sent": sent, "mb_left": self.config.budget_mb - sent}

    def _ask(
        self, kind: str, partitions: list[int], server_round: int, adapter: Vector, attempt: int = 0
    ) -> Gathered:
        """Send the adapter to these sites and wait for all replies or round-timeout-s."""
        codec = self.config.down
        payload = encode(codec, adapter, self._initial)
        record = ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})
        upload = upload_name(self.run, server_round, attempt)
        job = {"round": server_round, "layout": self.layout.hash, "upload": upload}
        messages = {
            p: order(kind, self.sites.node_of[p], record, job, self.taken.get(p))
            for p in partitions
        }
        # Before they are sent: whatever happens now, a site may have got them.
        self._count(len(payload) * len(messages))
        contents, failed = exchange(
            self.grid,
            messages,
            self.config.round_timeout_s,
            arrived=lambda p, content: self._arrived(kind, server_round, p, content),
            turns=self.sites.turns,
        )
        # The very constant: a site can say the same words, but not be refused by them.
        refused = sum(why is REFUSED for why in failed.values())
        self._count(-len(payload) * refused)
        late = f"no reply within strategy.round-timeout-s = {self.config.round_timeout_s:.0f}"
        return Gathered(
            replies=contents,
            failed={p: failed.get(p, late) for p in partitions if p not in contents},
            bytes_down=len(payload) * (len(partitions) - refused),
            bytes_up=sum(map(uploaded_bytes, contents.values())),
            sent=adapter if codec == "fp32" else decode(codec, payload, self._initial),
        )

    def _arrived(
        self, kind: str, server_round: int, partition_id: int, content: RecordDict
    ) -> None:
        size, name = uploaded_bytes(content), site_name(partition_id)
        extra = event("arrived", round=server_round, site=name, of=kind, bytes=size)
        logger.debug("[round %d] %s has answered", server_round, name, extra=extra)
        self._count(size)

    def _count(self, size: int) -> None:
        if size:
            self.bytes_sent += size
            self.keep(self.bytes_sent)
