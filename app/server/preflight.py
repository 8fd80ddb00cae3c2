"""Before round 1: who is there, do they agree, and may the run start?

Everything that would fail at a site fails here, in seconds and by the site's name, before
any training.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from app.config import RunConfig
from app.server.answer import UNLISTED, Answer, believed
from app.server.events import tell_last_lines, tell_waiting
from app.server.exchange import exchange
from app.server.site_list import CURE, read_site_list, site_name

logger = logging.getLogger(__name__)
QUERY_TIMEOUT_S, ATTEMPTS = 120.0, 3
EXCLUDED = "left out by strategy.exclude-sites"
NO_ANSWER = "no answer to the preflight"


class PreflightError(Exception):
    """The run must not start; the message names the sites and the reasons."""


class SilenceError(PreflightError):
    """Too few sites are online, or answer, and no other reason is known: it may pass."""


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
    # Partition id -> part of the data -> what became of the rows that were read.
    rows: dict[int, dict[str, dict[str, int]]] = field(default_factory=dict)
    # Partition id -> SHA-256 of the policy that the site has in force, or "none".
    policies: dict[int, str] = field(default_factory=dict)


def preflight(grid: Grid, config: RunConfig, sites_dir: Path) -> Sites:
    """Wait for ``min-nodes`` SuperNodes, ask each what it has, and compare.

    ``sites_dir`` holds the operator's list of sites. Nodes that are not in it are not asked. Of a
    run that goes on, sites may be at work still on a round of the run before: they are waited for
    until its orders have expired.

    Raises:
        PreflightError: too few nodes within node-timeout-s, or a site's answer forbids the run.
        SiteListError: there is no such list.
    """
    deadline = time.monotonic() + config.node_timeout_s
    answers: dict[int, Mapping[str, Any]] = {}
    silent: dict[int, str] = {}
    for attempt in range(1, ATTEMPTS + 1):
        online, listed = _wait_for_nodes(grid, config, deadline, sites_dir)
        asked = [n for n in online if n in listed and n not in answers]
        _ask(grid, asked, deadline, answers, silent)
        silent |= {n: UNLISTED for n in online if n not in listed}
        if not silent or time.monotonic() > deadline:
            break
        # A busy host loses a message now and then: ask those nodes again.
        for node_id, why in silent.items():
            name = _name(node_id, listed)
            logger.info("[preflight] try %d of %d: %s: %s", attempt, ATTEMPTS, name, why)
        time.sleep(3)
    if config.resume:
        _wait_for_busy_sites(grid, config, listed, answers, silent)
    sites = compare(answers, silent, listed, config)
    return replace(sites, left_out=dict.fromkeys(_excluded(config), EXCLUDED) | sites.left_out)


def _name(node_id: int, listed: Mapping[int, int]) -> str:
    return site_name(listed[node_id]) if node_id in listed else f"node {node_id}"


def _wait_for_busy_sites(
    grid: Grid,
    config: RunConfig,
    listed: Mapping[int, int],
    answers: dict[int, Mapping[str, Any]],
    silent: dict[int, str],
) -> None:
    deadline = time.monotonic() + config.round_timeout_s + QUERY_TIMEOUT_S
    while busy := [n for n, why in silent.items() if why == NO_ANSWER]:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        logger.info(
            "[preflight] %d sites are silent, perhaps still at work for the run before; waiting "
            "%.0f s more at most (strategy.round-timeout-s): %s",
            len(busy),
            left,
            ", ".join(_name(n, listed) for n in busy),
        )
        _ask(grid, busy, deadline, answers, silent)


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
    timeout_s = max(10.0, min(left, max(QUERY_TIMEOUT_S, left / 2)))
    contents, failed = exchange(grid, questions, timeout_s)
    for node_id in node_ids:
        if node_id in contents:
            answers[node_id] = contents[node_id].config_records.get("preflight", {})
            silent.pop(node_id, None)
        else:
            silent[node_id] = failed.get(node_id, NO_ANSWER)


def _wait_for_nodes(
    grid: Grid, config: RunConfig, deadline: float, sites_dir: Path
) -> tuple[list[int], dict[int, int]]:
    """Ids of all nodes that are online, enough of them sites; and the list, as it is now."""
    said = -1
    while True:
        node_ids, listed = _without_excluded(
            grid.get_node_ids(), read_site_list(sites_dir), _excluded(config)
        )
        sites = sum(n in listed for n in node_ids)
        if sites >= config.min_nodes:
            return node_ids, listed
        if time.monotonic() > deadline:
            others = len(node_ids) - sites
            unlisted = f"; {others} more are not in the operator's list of sites: {CURE}"
            raise SilenceError(
                f"{sites} of {config.min_nodes} SuperNodes online after "
                f"{config.node_timeout_s:.0f} s (strategy.min-nodes, strategy.node-timeout-s); "
                "flwr supernode list deployment shows which are offline"
                f"{unlisted if others else ''}"
            )
        if sites != said:
            said = sites
            tell_waiting(said, config.min_nodes)
        time.sleep(1)


def _excluded(config: RunConfig) -> list[str]:
    return sorted({*config.exclude_sites.split(",")} - {""})


def _without_excluded(
    node_ids: Iterable[int], listed: Mapping[int, int], excluded: list[str]
) -> tuple[list[int], dict[int, int]]:
    """The nodes, sorted, and the list, without these sites.

    Raises:
        PreflightError: one of them is not in the list.
    """
    if unknown := sorted(set(excluded) - {site_name(p) for p in listed.values()}):
        raise PreflightError(
            f"strategy.exclude-sites names {', '.join(unknown)}, and the operator's list of sites "
            "does not; correct the name"
        )
    out = {n for n, p in listed.items() if site_name(p) in excluded}
    return sorted(set(node_ids) - out), {n: p for n, p in listed.items() if n not in out}


def compare(
    answers: Mapping[int, Mapping[str, Any]],
    silent: Mapping[int, str],
    listed: Mapping[int, int],
    config: RunConfig,
) -> Sites:
    """Check the sites' answers (node id -> preflight record) against the list and each other.

    ``silent``: node id -> why there is no answer. ``listed``: node id -> partition id, by the
    operator. A site is left out alone, whatever it says.

    Raises:
        PreflightError: a site cannot take part, and require-all-nodes is true or fewer than
            min-nodes others are left; or no base model is that of the most sites.
        SilenceError: the first, of sites that do not answer only.
    """
    left_out = {_name(node_id, listed): why for node_id, why in silent.items()}
    usable: dict[int, Answer] = {}
    for node_id, facts in answers.items():
        answer = believed(facts, listed.get(node_id))
        if isinstance(answer, str):
            left_out[_name(node_id, listed)] = answer
        else:
            usable[answer.partition_id] = answer
    usable, groups = _of_the_most(dict(sorted(usable.items())), left_out)
    problems = "".join(f"\n  {site}: {why}" for site, why in sorted(left_out.items()))
    for site, why in sorted(left_out.items()):
        tell_last_lines("preflight", site, why)
    if left_out and (config.require_all_nodes or len(usable) < config.min_nodes):
        silence = set(left_out.values()) == {NO_ANSWER}
        error = SilenceError if silence else PreflightError
        raise error(f"{len(left_out)} sites are not ready:{problems}")
    if groups:
        raise PreflightError(
            f"the sites hold different weights of {config.model_name} (fingerprint: sites); "
            f"prepare the same weights everywhere:{groups}"
        )
    if left_out:
        logger.warning("[preflight] going on without:%s", problems)
    first = next(iter(usable.values()))
    node_of = {partition_id: node_id for node_id, partition_id in listed.items()}
    return Sites(
        node_of={p: node_of[p] for p in usable},
        num_examples={p: a.num_examples for p, a in usable.items()},
        num_holdout={p: a.num_holdout for p, a in usable.items()},
        fingerprint=first.fingerprint,
        linear_layers=first.linear_layers,
        versions={p: a.versions for p, a in usable.items()},
        left_out=left_out,
        devices={p: a.device for p, a in usable.items()},
        turns={p: a.turn for p, a in usable.items()},
        rows={p: a.rows for p, a in usable.items()},
        policies={p: a.policy for p, a in usable.items()},
    )


def _of_the_most(
    usable: dict[int, Answer], left_out: dict[str, str]
) -> tuple[dict[int, Answer], str]:
    """The sites with the base model that most sites have; the others are added to ``left_out``.

    Returns:
        Those sites, and where no model has more sites than any other: all of them, and the
        groups in words.
    """
    models: dict[tuple[str, str], list[int]] = {}
    for partition_id, answer in usable.items():
        model = answer.fingerprint, json.dumps(answer.linear_layers)
        models.setdefault(model, []).append(partition_id)
    ranked = sorted(models.items(), key=lambda m: len(m[1]), reverse=True)
    if len(ranked) > 1 and len(ranked[0][1]) == len(ranked[1][1]):
        return usable, "".join(
            f"\n  {fingerprint}: {', '.join(map(site_name, sites))}"
            for (fingerprint, _), sites in models.items()
        )
    for (fingerprint, _), sites in ranked[1:]:
        (usual, _), most = ranked[0]
        other = f"base model {fingerprint}" if fingerprint != usual else "other linear layers"
        for partition_id in sites:
            left_out[site_name(partition_id)] = (
                f"{other}, and {len(most)} sites have {usual}; prepare the same weights there"
            )
    return {p: usable[p] for p in (ranked[0][1] if ranked else ())}, ""
