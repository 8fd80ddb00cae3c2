"""The held-out loss of a round, from figures of which any may be a lie."""

import json
from typing import Any

import pytest
from flwr.app import MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from app.server.strategy import Strategy
from app.wire.adapter import Vector, initial_adapter
from tests.app.server.stand_in_sites import LAYOUT, failing, node, scored, silent, strategy
from tests.stand_in_grid import Node, StandInGrid


def evaluating(nodes: dict[int, Node]) -> Strategy:
    return strategy([0, 1, 2], nodes, fraction_evaluate=1.0)


def test_the_held_out_loss_is_a_mean_over_all_tokens_not_over_sites() -> None:
    s = evaluating({p: node(p, scored) for p in range(3)})
    result = s.evaluate(4, initial_adapter(s.layout, 1))
    assert result["eval_tokens"] == 60
    assert result["eval_loss"] == pytest.approx((3 + 6 + 9) / 60)
    assert result["eval_token_accuracy"] == pytest.approx((0 + 1 + 2) / 60)
    assert result["eval_partitions"] == [0, 1, 2]


def telling(loss: float, tokens: int, partition_id: int = 1) -> Node:
    """A site that is evaluated with this loss a token."""

    def reply(_: int, adapter: Vector) -> RecordDict:
        metrics: dict[str, Any] = {
            "num-examples": 5, "loss-sum": loss * tokens, "num-correct": 0, "num-tokens": tokens,
        }  # fmt: skip
        return RecordDict({"metrics": MetricRecord(metrics)})

    return node(partition_id, reply)


@settings(max_examples=40)
@given(st.integers(3, 9), st.data(), st.floats(0, 100), st.integers(1, 5 * 512))
def test_a_minority_of_liars_cannot_move_the_median_beyond_what_honest_sites_say(
    k: int, data: st.DataObject, lie: float, tokens: int
) -> None:
    honest = data.draw(st.lists(st.floats(1, 4), min_size=k, max_size=k))
    liars = data.draw(st.sets(st.integers(0, k - 1), max_size=(k - 1) // 2))
    nodes = {
        p: telling(lie, tokens, p) if p in liars else telling(loss, 20, p)
        for p, loss in enumerate(honest)
    }
    s = strategy(list(range(k)), nodes, fraction_evaluate=1.0)
    result = s.evaluate(1, initial_adapter(s.layout, 1))
    true = [loss for p, loss in enumerate(honest) if p not in liars]
    assert min(true) * (1 - 1e-9) <= result["eval_loss_median"] <= max(true) * (1 + 1e-9)
    assert result["eval_site_losses"] == pytest.approx(
        [lie if p in liars else loss for p, loss in enumerate(honest)]
    )
    assert result["eval_partitions"] == list(range(k))


def test_one_site_of_three_does_not_decide_the_accuracy() -> None:
    nodes = {0: node(0, scored), 1: scored_as("num-correct", 20), 2: node(2, scored)}
    result = evaluating(nodes).evaluate(1, initial_adapter(LAYOUT, 1))
    assert result["eval_site_accuracies"] == pytest.approx([0, 1, 2 / 30])
    assert result["eval_token_accuracy_median"] == pytest.approx(2 / 30)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_site_that_has_other_tokens_than_at_first_is_left_out_of_the_figure_by_name(
    resumed: bool,
) -> None:
    s = evaluating({0: node(0, scored), 1: telling(2.0, 40), 2: node(2, scored)})
    adapter = initial_adapter(s.layout, 1)
    first = s.evaluate(1, adapter)
    assert first["eval_site_tokens"] == [10, 40, 30]
    if resumed:
        s = evaluating({0: node(0, scored), 1: telling(2.0, 40), 2: node(2, scored)})
        line = {"mb_sent": 0.0, "client_update_norms": [], "steps": [], **first}
        s.take_up([json.loads(json.dumps(line))])
    assert isinstance(s.grid, StandInGrid)
    s.grid.nodes[s.sites.node_of[1]] = telling(0.0, 2000)
    for _ in range(2):  # what was left out is no measure for later
        second = s.evaluate(2, adapter)
        assert second["eval_partitions"] == [0, 2]
        assert second["eval_rejected"] == {
            "site-01": "2000 answer tokens, 40 when it was evaluated first in this run"
        }


def scored_as(key: str, value: Any) -> Node:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = scored(partition_id, adapter)
        content.metric_records["metrics"][key] = value
        return content

    return node(1, reply)


@pytest.mark.parametrize(
    "bad",
    [
        failing,
        silent,
        node(1, lambda p, a: RecordDict()),
        scored_as("num-tokens", -40),
        scored_as("num-tokens", 1.7e308),
        scored_as("num-correct", 10**9),
        scored_as("loss-sum", 1.7e308),
        scored_as("loss-sum", -1.0),
        scored_as("loss-sum", 2001.0),
        telling(0.0, 5 * 512 + 1),
        scored_as("num-tokens", 20.5),
        telling(0.0, 0),
    ],
    ids=[
        "error", "late", "malformed", "tokens below zero", "tokens without end",
        "more hits than tokens", "loss without end", "loss below zero", "loss of no model",
        "more tokens than its rows hold", "half a token", "no token",
    ],
)  # fmt: skip
def test_a_site_that_cannot_be_evaluated_is_left_out_of_the_figure(bad: Node) -> None:
    s = evaluating({0: node(0, scored), 1: bad, 2: node(2, scored)})
    result = s.evaluate(4, initial_adapter(s.layout, 1))
    assert result["eval_partitions"] == [0, 2]
    assert result["eval_loss"] == pytest.approx((3 + 9) / 40)
    assert list(result["eval_rejected"]) == ["site-01"]


def test_if_nobody_can_be_evaluated_there_is_no_figure() -> None:
    s = evaluating(dict.fromkeys(range(3), silent))
    assert s.evaluate(4, initial_adapter(s.layout, 1)) == {}
