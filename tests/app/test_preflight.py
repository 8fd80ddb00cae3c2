"""Before round 1: which sites may start, and what a refusal says."""

import itertools
import json
import math
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from app.config import RunConfig
from app.preflight import PreflightError, Sites, compare, preflight
from tests.samples import run_config
from tests.stand_in_grid import Clock, Node, StandInGrid

LINEAR = {"model.layers.0.self_attn.q_proj": [32, 32], "lm_head": [300, 32]}


def answer(partition_id: int, **changes: Any) -> dict[str, Any]:
    return {
        "partition-id": partition_id,
        "num-partitions": 20,
        "device": "cpu",
        "turn": f"host of {partition_id // 4}",
        "versions": json.dumps({"python": "3.11"}),
        "num-examples": 100 + partition_id,
        "num-holdout": 10 + partition_id,
        "fingerprint": "aaaa",
        "linear-layers": json.dumps(LINEAR),
        **changes,
    }


def broken(partition_id: int, why: str) -> dict[str, Any]:
    return {"partition-id": partition_id, "num-partitions": 20, "error": why}


def config(min_nodes: int = 2, strict: bool = True, **changes: Any) -> RunConfig:
    return run_config(min_nodes=min_nodes, min_train_nodes=1, require_all_nodes=strict, **changes)


def test_sites_that_agree_may_start_and_are_known_by_their_partitions() -> None:
    sites = compare({900: answer(3), 17: answer(0), 44: answer(7)}, {}, config())
    assert sites == Sites(
        node_of={0: 17, 3: 900, 7: 44},
        num_examples={0: 100, 3: 103, 7: 107},
        num_holdout={0: 10, 3: 13, 7: 17},
        fingerprint="aaaa",
        linear_layers=LINEAR,
        versions={p: {"python": "3.11"} for p in (0, 3, 7)},
        left_out={},
        devices=dict.fromkeys((0, 3, 7), "cpu"),
        turns={0: "host of 0", 3: "host of 0", 7: "host of 1"},
    )
    assert list(sites.linear_layers) == list(LINEAR)  # their order is the adapter's


def test_every_site_that_is_not_ready_is_named_with_its_reason() -> None:
    answers = {
        1: broken(4, "data/train.jsonl, line 3: not valid JSON"),
        2: answer(0),
        3: broken(11, "no base model"),
        4: answer(1),
    }
    with pytest.raises(PreflightError) as caught:
        compare(answers, {77: "no answer to the preflight"}, config())
    lines = str(caught.value).splitlines()
    assert any("site-04" in x and "train.jsonl, line 3" in x for x in lines)
    assert any("site-11" in x and "no base model" in x for x in lines)
    assert any("77" in x and "no answer" in x for x in lines)
    assert not any("site-00" in x or "site-01" in x for x in lines)


def test_without_require_all_nodes_the_ready_ones_go_on_and_the_others_are_recorded() -> None:
    answers = {1: answer(0), 2: answer(1), 3: broken(2, "no base model")}
    sites = compare(answers, {77: "lost"}, config(min_nodes=2, strict=False))
    assert set(sites.node_of) == {0, 1}
    assert sites.left_out["site-02"] == "no base model"
    assert any("77" in site and why == "lost" for site, why in sites.left_out.items())


def test_without_require_all_nodes_min_nodes_must_still_be_ready() -> None:
    answers = {1: answer(0), 2: answer(1), 3: broken(2, "no base model")}
    with pytest.raises(PreflightError, match="site-02: no base model"):
        compare(answers, {}, config(min_nodes=3, strict=False))


def test_all_sites_failing_is_an_error_of_the_preflight() -> None:
    with pytest.raises(PreflightError, match="site-00"):
        compare({1: broken(0, "no data")}, {}, config(min_nodes=1, strict=False))


def test_different_base_models_are_named_with_the_sites_of_each() -> None:
    answers = {
        1: answer(0),
        2: answer(5, fingerprint="bbbb"),
        3: answer(9),
        4: answer(12, fingerprint="bbbb"),
    }
    with pytest.raises(PreflightError) as caught:
        compare(answers, {}, config(strict=False))
    lines = str(caught.value).splitlines()
    assert any("aaaa" in x and "site-00, site-09" in x for x in lines)
    assert any("bbbb" in x and "site-05, site-12" in x for x in lines)


def test_two_nodes_that_say_they_are_the_same_site_are_refused_with_both_ids() -> None:
    with pytest.raises(PreflightError, match="site-03") as caught:
        compare({901: answer(3), 17: answer(0), 902: answer(3)}, {}, config(strict=False))
    assert "901" in str(caught.value)
    assert "902" in str(caught.value)


@pytest.mark.parametrize("both_broken", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_the_same_site_twice_is_refused_even_if_one_of_the_two_is_not_ready(
    both_broken: bool, turned: bool
) -> None:
    twins = [broken(3, "no data"), broken(3, "no base model") if both_broken else answer(3)]
    pair = dict(zip((901, 902), twins[::-1] if turned else twins, strict=True))
    with pytest.raises(PreflightError, match="site-03") as caught:
        compare({17: answer(0), 18: answer(1), **pair}, {}, config(strict=False))
    assert "901" in str(caught.value)
    assert "902" in str(caught.value)


def test_the_order_of_the_answers_does_not_matter() -> None:
    answers = {1: answer(0), 2: answer(5), 3: answer(9), 4: broken(7, "no data")}
    orders = itertools.permutations(answers.items())
    first, *others = [compare(dict(o), {}, config(strict=False)) for o in orders]
    assert all(other == first for other in others)
    assert list(first.node_of) == [0, 5, 9]


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {k: v for k, v in answer(2).items() if k != "fingerprint"},
        answer(2, **{"partition-id": [2]}),
        answer(2, **{"partition-id": "2"}),
        answer(-1),
        answer(2, **{"partition-id": True}),
        answer(2, **{"num-examples": "many"}),
        answer(2, **{"num-examples": math.nan}),
        answer(2, **{"num-holdout": -1}),
        answer(2, versions="not JSON"),
        answer(2, **{"linear-layers": json.dumps(["a list"])}),
        answer(2, **{"linear-layers": json.dumps({"lm_head": [1]})}),
        answer(2, **{"linear-layers": "[" * 100_000}),
    ],
)
def test_an_answer_that_cannot_be_read_is_that_nodes_alone(facts: dict[str, Any]) -> None:
    answers = {1: answer(0), 2: answer(1), 66: facts}
    unreadable = "an answer to the preflight that cannot be read"
    sites = compare(answers, {}, config(strict=False))
    assert set(sites.node_of) == {0, 1}
    assert sites.left_out == {"node 66": unreadable}
    with pytest.raises(PreflightError, match=f"node 66: {unreadable}"):
        compare(answers, {}, config())


def test_a_site_with_other_layers_of_the_same_weights_is_told_from_the_others() -> None:
    other = answer(5, **{"linear-layers": json.dumps({"lm_head": [300, 32]})})
    with pytest.raises(PreflightError) as caught:
        compare({1: answer(0), 2: other, 3: answer(9)}, {}, config(strict=False))
    assert [x.strip() for x in str(caught.value).splitlines()[1:]] == [
        "aaaa: site-00, site-09",
        "aaaa: site-05",
    ]


def ready(facts: dict[str, Any]) -> Node:
    return lambda m: Message(RecordDict({"preflight": ConfigRecord(facts)}), reply_to=m)


def lost(message: Message) -> Message:
    return Message(Error(code=3, reason="node unavailable"), reply_to=message)


def lost_without_a_reason(message: Message) -> Message:
    return Message(Error(code=3), reply_to=message)


def silent(message: Message) -> None:
    return None


def test_every_node_is_asked_once_and_the_answers_are_compared() -> None:
    grid = StandInGrid({50: ready(answer(1)), 40: ready(answer(0))}, reverse=True)
    sites = preflight(grid, config(node_timeout_s=5.0))
    assert sites.node_of == {0: 40, 1: 50}
    assert sorted(m.metadata.dst_node_id for m in grid.sent) == [40, 50]


@pytest.mark.parametrize("node", [lost, lost_without_a_reason, silent])
def test_a_node_that_fails_or_keeps_silent_is_named_when_the_time_is_up(node: Node) -> None:
    grid = StandInGrid({40: ready(answer(0)), 50: ready(answer(1)), 60: node})
    with pytest.raises(PreflightError, match="60"):
        preflight(grid, config(node_timeout_s=0.5))
    sites = preflight(grid, config(strict=False, node_timeout_s=0.5))
    assert set(sites.node_of) == {0, 1}
    assert len(sites.left_out) == 1


def test_a_node_that_answers_something_else_is_named() -> None:
    nodes = {1: ready(answer(0)), 2: ready(answer(1))}
    grid = StandInGrid({**nodes, 66: lambda m: Message(RecordDict(), reply_to=m)})
    with pytest.raises(PreflightError, match="node 66"):
        preflight(grid, config(node_timeout_s=0.5))


def test_a_node_whose_first_answer_is_lost_is_asked_again_and_nobody_else_is() -> None:
    answers = iter([lost, ready(answer(1))])
    grid = StandInGrid({40: ready(answer(0)), 50: lambda m: next(answers)(m)})
    assert preflight(grid, config(node_timeout_s=30.0)).node_of == {0: 40, 1: 50}
    assert [m.metadata.dst_node_id for m in grid.sent] == [40, 50, 50]


def test_a_site_on_a_busy_host_has_time_to_answer_before_it_is_asked_again(clock: Clock) -> None:
    asked: list[float] = []
    nodes = {40: ready(answer(0)), 50: ready(answer(1)), 60: lambda m: asked.append(clock.now)}
    with pytest.raises(PreflightError, match="node 60: no answer"):
        preflight(StandInGrid(nodes), config(node_timeout_s=600.0))
    first, second, third = asked
    assert second - first > 300
    assert third - second > 120
    assert clock.now < 610


def test_too_few_nodes_end_the_wait_with_an_error_that_says_how_many() -> None:
    grid = StandInGrid({40: ready(answer(0))})
    with pytest.raises(PreflightError, match="1 of 2 SuperNodes"):
        preflight(grid, config(node_timeout_s=0.01))
    assert not grid.sent
