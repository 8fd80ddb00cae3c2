"""Before round 1: who is there, do they agree, and may the run start?

Everything that would fail at a site fails here, in seconds and by the site's name, before
any training.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from app.config import RunConfig

logger = logging.getLogger(__name__)
QUERY_TIMEOUT_S, ATTEMPTS = 120.0, 3  # a site answers in seconds


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
    questions = [
        Message(RecordDict(), dst_node_id=n, message_type=MessageType.QUERY) for n in node_ids
    ]
    silent |= dict.fromkeys(node_ids, "no answer to the preflight")
    timeout_s = max(1.0, min(QUERY_TIMEOUT_S, deadline - time.monotonic()))
    replies = grid.send_and_receive(questions, timeout=timeout_s)
    # A node that died is answered for by the SuperLink: go by the question, not by the sender.
    asked = {q.metadata.message_id: q.metadata.dst_node_id for q in questions}
    for reply in replies:
        node_id = asked[reply.metadata.reply_to_message_id]
        if reply.has_error():
            silent[node_id] = reply.error.reason or "error without a reason"
        else:
            answers[node_id] = reply.content.config_records["preflight"]
            del silent[node_id]


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
    usable: dict[int, tuple[int, Mapping[str, Any]]] = {}
    node_of: dict[int, int] = {}
    for node_id, answer in answers.items():
        partition_id = answer["partition-id"]
        if partition_id in node_of:
            raise PreflightError(
                f"nodes {node_of[partition_id]} and {node_id} both say they are "
                f"{site_name(partition_id)}; give each its own partition-id"
            )
        node_of[partition_id] = node_id
        if "error" in answer:
            left_out[site_name(partition_id)] = answer["error"]
        else:
            usable[partition_id] = (node_id, answer)
    problems = "".join(f"\n  {site}: {why}" for site, why in sorted(left_out.items()))
    if left_out and (config.require_all_nodes or len(usable) < config.min_nodes):
        raise PreflightError(f"{len(left_out)} sites are not ready:{problems}")
    if left_out:
        logger.warning("[preflight] going on without:%s", problems)

    by_fingerprint: dict[str, list[str]] = {}
    for partition_id, (_, answer) in sorted(usable.items()):
        by_fingerprint.setdefault(answer["fingerprint"], []).append(site_name(partition_id))
    if len(by_fingerprint) > 1:
        groups = "".join(f"\n  {f}: {', '.join(s)}" for f, s in by_fingerprint.items())
        raise PreflightError(
            f"the sites hold different weights of {config.model_name} (fingerprint: sites); "
            f"prepare the same weights everywhere:{groups}"
        )
    first = next(iter(usable.values()))[1]
    return Sites(
        node_of={p: node for p, (node, _) in sorted(usable.items())},
        num_examples={p: a["num-examples"] for p, (_, a) in usable.items()},
        num_holdout={p: a["num-holdout"] for p, (_, a) in usable.items()},
        fingerprint=first["fingerprint"],
        linear_layers=json.loads(first["linear-layers"]),
        versions={p: json.loads(a["versions"]) for p, (_, a) in usable.items()},
        left_out=left_out,
    )
