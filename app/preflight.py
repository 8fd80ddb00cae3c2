"""Before round 1: who is there, do they agree, and may the run start?

Everything that would fail at a site fails here, in seconds and by the site's name, before
any training.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from app.config import RunConfig
from app.exchange import exchange, one_line

logger = logging.getLogger(__name__)
QUERY_TIMEOUT_S, ATTEMPTS = 120.0, 3


class PreflightError(Exception):
    """The run must not start; the message names the sites and the reasons."""


def site_name(partition_id: int) -> str:
    """``site-07`` for partition 7: the name of its folder, and what people read."""
    return f"site-{partition_id:02d}"


@dataclass(frozen=True)
class Sites:
    """The sites of this run and what they agree on."""

    node_of: dict[int, int]  # partition id -> node id
    num_examples: dict[int, int]
    num_holdout: dict[int, int]
    fingerprint: str  # of the base model
    linear_layers: dict[str, list[int]]
    versions: dict[int, dict[str, str]]
    left_out: dict[str, str]  # site -> reason
    devices: dict[int, str] = field(default_factory=dict)  # as each site describes its own
    # Partition id -> name of its device's turn: sites of the same one compute one after the other.
    turns: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one site says it has; with an ``error`` nothing else."""

    partition_id: int
    error: str = ""
    num_examples: int = 0
    num_holdout: int = 0
    fingerprint: str = ""
    linear_layers: dict[str, list[int]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    turn: str = ""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Answer":
        """Check a site's answer. Raises: KeyError, TypeError and others: it is no such answer."""
        partition_id = _count(facts["partition-id"])
        if "error" in facts:
            return cls(partition_id, one_line(str(facts["error"])) or "an error")
        layers = {
            str(name): [_count(out), _count(size)]
            for name, (out, size) in json.loads(facts["linear-layers"]).items()
        }
        return cls(
            partition_id,
            num_examples=_count(facts["num-examples"]),
            num_holdout=_count(facts["num-holdout"]),
            fingerprint=str(facts["fingerprint"]),
            linear_layers=layers,
            versions={str(k): str(v) for k, v in dict(json.loads(facts["versions"])).items()},
            device=one_line(str(facts["device"])),
            turn=one_line(str(facts["turn"])),
        )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 10**9:
        raise ValueError(value)
    return value


def preflight(grid: Grid, config: RunConfig) -> Sites:
    """Wait for ``min-nodes`` SuperNodes, ask each what it has, and compare.

    Raises:
        PreflightError: too few nodes within node-timeout-s, or a site's answer forbids the run.
    """
    deadline = time.monotonic() + config.node_timeout_s
    answers: dict[int, Mapping[str, Any]] = {}
    silent: dict[int, str] = {}
    for attempt in range(1, ATTEMPTS + 1):
        online = _wait_for_nodes(grid, config, deadline)
        _ask(grid, [n for n in online if n not in answers], deadline, answers, silent)
        if not silent or time.monotonic() > deadline:
            break
        # A busy host loses a message now and then: ask those nodes again.
        for node_id, why in silent.items():
            logger.info("[preflight] try %d of %d: node %d: %s", attempt, ATTEMPTS, node_id, why)
        time.sleep(3)
    return compare(answers, silent, config)


def _ask(
    grid: Grid,
    node_ids: list[int],
    deadline: float,
    answers: dict[int, Mapping[str, Any]],
    silent: dict[int, str],
) -> None:
    """Ask these nodes; adds to ``answers``, or to ``silent`` why there is none."""
    questions = {
        n: Message(RecordDict(), dst_node_id=n, message_type=MessageType.QUERY) for n in node_ids
    }
    # A site answers in seconds, but 20 on one busy host may take minutes: who asks anew too soon
    # only adds to their load.
    left = deadline - time.monotonic()
    timeout_s = max(1.0, min(left, max(QUERY_TIMEOUT_S, left / 2)))
    contents, failed = exchange(grid, questions, timeout_s)
    for node_id in node_ids:
        if node_id in contents:
            answers[node_id] = contents[node_id].config_records.get("preflight", {})
            silent.pop(node_id, None)
        else:
            silent[node_id] = failed.get(node_id, "no answer to the preflight")


def _wait_for_nodes(grid: Grid, config: RunConfig, deadline: float) -> list[int]:
    said = -1
    while len(node_ids := list(grid.get_node_ids())) < config.min_nodes:
        if time.monotonic() > deadline:
            raise PreflightError(
                f"{len(node_ids)} of {config.min_nodes} SuperNodes online after "
                f"{config.node_timeout_s:.0f} s (strategy.min-nodes, strategy.node-timeout-s); "
                "flwr supernode list deployment shows which are offline"
            )
        if len(node_ids) != said:
            said = len(node_ids)
            logger.info("[preflight] %d of %d SuperNodes online", said, config.min_nodes)
        time.sleep(1)
    return sorted(node_ids)


def compare(
    answers: Mapping[int, Mapping[str, Any]], silent: Mapping[int, str], config: RunConfig
) -> Sites:
    """Check the sites' answers (node id -> preflight record) against each other.

    ``silent``: node id -> why there is no answer.

    Raises:
        PreflightError: two sites share a partition or differ in base model; or a site has an
            error, and require-all-nodes is true or fewer than min-nodes others are left.
    """
    left_out = {f"node {node_id}": why for node_id, why in silent.items()}
    usable: dict[int, Answer] = {}
    node_of: dict[int, int] = {}
    for node_id, facts in answers.items():
        try:
            answer = Answer.of(facts)
        except Exception:  # it may hold anything
            left_out[f"node {node_id}"] = "an answer to the preflight that cannot be read"
            continue
        partition_id = answer.partition_id
        if partition_id in node_of:
            raise PreflightError(
                f"nodes {node_of[partition_id]} and {node_id} both say they are "
                f"{site_name(partition_id)}; give each its own partition-id"
            )
        node_of[partition_id] = node_id
        if answer.error:
            left_out[site_name(partition_id)] = answer.error
        else:
            usable[partition_id] = answer
    problems = "".join(f"\n  {site}: {why}" for site, why in sorted(left_out.items()))
    if left_out and (config.require_all_nodes or len(usable) < config.min_nodes):
        raise PreflightError(f"{len(left_out)} sites are not ready:{problems}")
    if left_out:
        logger.warning("[preflight] going on without:%s", problems)

    ready = dict(sorted(usable.items()))
    by_model: dict[tuple[str, str], list[str]] = {}
    for partition_id, answer in ready.items():
        model = (answer.fingerprint, json.dumps(answer.linear_layers))
        by_model.setdefault(model, []).append(site_name(partition_id))
    if len(by_model) > 1:
        groups = "".join(f"\n  {f}: {', '.join(s)}" for (f, _), s in by_model.items())
        raise PreflightError(
            f"the sites hold different weights of {config.model_name} (fingerprint: sites); "
            f"prepare the same weights everywhere:{groups}"
        )
    first = next(iter(ready.values()))
    return Sites(
        node_of={p: node_of[p] for p in ready},
        num_examples={p: a.num_examples for p, a in ready.items()},
        num_holdout={p: a.num_holdout for p, a in ready.items()},
        fingerprint=first.fingerprint,
        linear_layers=first.linear_layers,
        versions={p: a.versions for p, a in ready.items()},
        left_out=left_out,
        devices={p: a.device for p, a in ready.items()},
        turns={p: a.turn for p, a in ready.items()},
    )
