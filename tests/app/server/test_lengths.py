"""Lengths of changes at other learning rates and with other numbers of steps."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from app.server.strategy import Strategy
from app.wire.adapter import initial_adapter
from tests.app.server.stand_in_sites import (
    changed,
    node,
    plus,
    received,
    replace_nodes,
    silent,
    strategy,
)
from tests.stand_in_grid import Node


def adam(
    s: Strategy, partition_id: int, factor: float = 1.0, growth: float = 0.75, claim: int = 0
) -> Node:
    """A site whose change is ``factor`` times as long as Adam's would be in its round.

    Honest lengths go with the learning rate and with steps to the power of ``growth``. ``claim``:
    rows, and so steps, that it says it took instead.
    """
    config, rows = s.config, 10 * (partition_id + 1)

    def answer(message: Message) -> Message:
        server_round = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
        rng = np.random.default_rng([partition_id, server_round])
        direction = rng.standard_normal(480) / 480**0.5  # about 1 long
        length = factor * 3000 * config.learning_rate(server_round) * config.steps(rows) ** growth
        change = plus((length * direction).astype(np.float32))
        content = changed(change)(partition_id, received(message))
        content.metric_records["metrics"]["num-examples"] = claim or rows
        content.metric_records["metrics"]["steps"] = config.steps(claim or rows)
        return Message(content, reply_to=message)

    return answer


def of_the_reference(sites: int = 20, growth: float = 0.75, **changes: Any) -> Strategy:
    """Two honest sites a round, the learning rate from 5e-5 to 1e-6 in ten rounds."""
    nodes = dict.fromkeys(range(sites), silent)
    s = strategy(list(range(sites)), {**nodes}, min_nodes=sites, max_retries=0, **changes)
    assert (s.config.lr_max, s.config.lr_min, s.config.num_server_rounds) == (5e-5, 1e-6, 10)
    replace_nodes(s, lambda p: adam(s, p, growth=growth))
    return s


@pytest.mark.parametrize("resumed_after", [None, 1, 5, 9])
@pytest.mark.parametrize("factor", [1.0, 12.0, 255.0])
def test_in_round_10_a_change_of_12_times_the_honest_length_is_refused_and_no_honest_one_ever(
    factor: float, resumed_after: int | None
) -> None:
    s = of_the_reference()
    adapter, lines = initial_adapter(s.layout, 1), []
    for server_round in range(1, 10):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round
        lines.append(json.loads(json.dumps(line | s.budget())))
        if server_round == resumed_after:
            s = of_the_reference()
            s.take_up(lines)
    bad = s.sample(10)[0]
    replace_nodes(s, lambda p: adam(s, p, factor), bad)
    _, line = s.train_round(10, adapter)
    if factor == 1:
        assert line["rejected"] == {}
    else:
        assert list(line["rejected"]) == [f"site-{bad:02d}"]
        assert "strategy.max-norm-ratio = 10" in line["rejected"][f"site-{bad:02d}"]


@pytest.mark.parametrize("growth", [0.5, 0.75, 1.0])
def test_sites_of_30_times_the_steps_of_others_all_take_part_in_every_round(growth: float) -> None:
    """Whole epochs: rows from 10 to 320, batches of 2, so 5 to 160 steps and more lengths yet."""
    s = of_the_reference(32, growth, max_steps=-1, num_train_epochs=1, batch_size=2)
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 11):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round


@pytest.mark.parametrize("growth", [0.75, 1.0])
def test_a_site_of_30_times_the_steps_of_the_only_other_one_takes_part(growth: float) -> None:
    s = strategy([0, 31], max_retries=0, max_steps=-1, num_train_epochs=1, batch_size=2)
    replace_nodes(s, lambda p: adam(s, p, growth=growth))
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 4):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round


def test_steps_that_a_site_claims_make_room_for_eight_times_the_length_and_no_more() -> None:
    s = of_the_reference(max_steps=-1, num_train_epochs=1, batch_size=2)
    s.sites.num_examples.update(dict.fromkeys(s.sites.num_examples, 10**9 - 1))
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 10):
        adapter, line = s.train_round(server_round, adapter)
    bad = s.sample(10)[0]
    replace_nodes(s, lambda p: adam(s, p, 200, claim=10**9 - 1), bad)
    _, line = s.train_round(10, adapter)
    assert list(line["rejected"]) == [f"site-{bad:02d}"]


def test_a_learning_rate_of_nothing_lets_nothing_pass_that_is_longer_than_a_late_rest() -> None:
    s = of_the_reference()
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 10):
        adapter, _ = s.train_round(server_round, adapter)
    s.config = replace(s.config, lr_min=0.0)
    assert s.config.learning_rate(10) == 0
    usual, bad = max(c.norm for c in s.changes), s.sample(10)[0]
    for part, fine in ((0.1, True), (0.5, False)):  # int4 leaves out a tenth
        step = np.full(480, part * usual * 480**-0.5, np.float32)
        replace_nodes(s, lambda p: node(p, changed(plus(0.0))))
        replace_nodes(s, partial(node, reply=changed(plus(step))), bad)
        _, line = s.train_round(10, adapter)
        assert line["rejected"].keys() == (set() if fine else {f"site-{bad:02d}"})


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_clipped_and_noisy_changes_are_as_long_in_round_10_as_in_round_1_and_take_part(
    noise: float,
) -> None:
    s = of_the_reference(clip_norm=0.3, noise_multiplier=noise)

    def private(message: Message) -> Message:
        rng = np.random.default_rng(int(message.content.config_records["job"]["round"]))  # type: ignore[arg-type]
        step = rng.standard_normal(480) * 0.3 / 480**0.5
        reply = changed(plus(step.astype(np.float32)))
        return Message(reply(1, received(message)), reply_to=message)

    replace_nodes(s, lambda _: private)
    s.sites.num_examples.update(dict.fromkeys(s.sites.num_examples, 20))
    adapter = initial_adapter(s.layout, 1)
    for server_round in range(1, 11):
        adapter, line = s.train_round(server_round, adapter)
        assert line["rejected"] == {}, server_round
