"""Before round 1: which sites may start, and what a refusal says."""

import itertools
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from app.config import RunConfig
from app.server import preflight as module
from app.server.answer import UNLISTED
from app.server.preflight import PreflightError, SilenceError, Sites, preflight
from app.server.site_list import SiteListError
from app.wire.failure import joined
from tests.samples import run_config, write_site_list
from tests.stand_in_grid import Clock, Node, StandInGrid

COUNTS = dict.fromkeys(("read", "empty", "repeated", "known", "too_long", "cut", "used"), 0)
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
        "rows": json.dumps(rows(100 + partition_id, 10 + partition_id)),
        "policy": f"policy of {partition_id}",
        **changes,
    }


def rows(train: int, holdout: int, **lost: int) -> dict[str, dict[str, int]]:
    """What a site says that became of its rows: so many used, others lost of those to train on."""
    read = train + sum(n for why, n in lost.items() if why != "cut")
    of_train = COUNTS | lost | {"read": read, "used": train}
    return {"train": of_train, "holdout": COUNTS | {"read": holdout, "used": holdout}}


def broken(partition_id: int, why: str) -> dict[str, Any]:
    return {"partition-id": partition_id, "num-partitions": 20, "error": why}


def config(min_nodes: int = 2, strict: bool = True, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {"min_train_nodes": 1, "min_replies": 1, "require_all_nodes": strict}
    return run_config(min_nodes=min_nodes, **base, **changes)


def compare(
    answers: Mapping[int, Mapping[str, Any]],
    silent: Mapping[int, str],
    config: RunConfig,
    listed: Mapping[int, int] | None = None,
) -> Sites:
    """``listed``: as the sites say themselves, if not given."""
    if listed is None:
        listed = {n: facts["partition-id"] for n, facts in answers.items()}
    return module.compare(answers, silent, listed, config)


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
        rows={p: rows(100 + p, 10 + p) for p in (0, 3, 7)},
        policies={p: f"policy of {p}" for p in (0, 3, 7)},
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


@pytest.mark.parametrize("strict", [True, False])
def test_the_last_lines_of_a_site_that_is_not_ready_are_told_and_its_reason_is_as_without_them(
    site_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("app"), "propagate", False)  # else each comes twice
    site_log.set_level(logging.INFO, logger="app")
    why = joined("no base model", ["data/train.jsonl: 8 read", "x\x1b[2J" * 1_000_000])
    answers = {1: answer(0), 2: answer(1), 3: broken(2, why)}
    if strict:
        with pytest.raises(PreflightError) as caught:
            compare(answers, {}, config())
        assert str(caught.value) == "1 sites are not ready:\n  site-02: no base model"
    else:
        sites = compare(answers, {}, config(strict=False))
        assert sites.left_out == {"site-02": "no base model"}
    first, second = (r.getMessage() for r in site_log.records if "log of" in r.getMessage())
    assert first == "[preflight]   last in the log of site-02: data/train.jsonl: 8 read"
    assert second.isprintable()
    assert len(second) < 300


def test_all_sites_failing_is_an_error_of_the_preflight() -> None:
    with pytest.raises(PreflightError, match="site-00"):
        compare({1: broken(0, "no data")}, {}, config(min_nodes=1, strict=False))


@pytest.mark.parametrize("strict", [True, False])
def test_two_base_models_at_as_many_sites_are_both_named_with_the_sites_of_each(
    strict: bool,
) -> None:
    answers = {
        1: answer(0),
        2: answer(5, fingerprint="bbbb"),
        3: answer(9),
        4: answer(12, fingerprint="bbbb"),
    }
    with pytest.raises(PreflightError) as caught:
        compare(answers, {}, config(strict=strict))
    lines = str(caught.value).splitlines()
    assert any("aaaa" in x and "site-00, site-09" in x for x in lines)
    assert any("bbbb" in x and "site-05, site-12" in x for x in lines)


OTHER_LAYERS = {"linear-layers": json.dumps({"lm_head": [300, 32]})}


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"fingerprint": "bbbb"}, "base model bbbb, and 3 sites have aaaa; prepare the same"),
        (OTHER_LAYERS, "other linear layers, and 3 sites have aaaa; prepare the same"),
        (
            {"fingerprint": "\x1b[31mbb\nbb" + "x" * 10**6},
            r"base model \[31mbb bbx{91}, and 3 sites have aaaa; prepare the same",
        ),
    ],
    ids=["weights", "layers", "escape codes"],
)
def test_a_site_with_another_base_model_than_most_is_left_out_alone(
    odd: dict[str, Any], why: str
) -> None:
    answers = {1: answer(0), 2: answer(5, **odd), 3: answer(9), 4: answer(12)}
    sites = compare(answers, {}, config(strict=False))
    assert set(sites.node_of) == {0, 9, 12}
    assert sites.fingerprint == "aaaa"
    assert sites.linear_layers == LINEAR
    assert list(sites.left_out) == ["site-05"]
    assert re.match(why, sites.left_out["site-05"])
    for strict, min_nodes in ((True, 2), (False, 4)):
        with pytest.raises(PreflightError, match=f"1 sites are not ready:\n  site-05: {why}"):
            compare(answers, {}, config(min_nodes, strict))


def test_whatever_else_a_site_writes_is_kept_as_one_short_line() -> None:
    odd = "\x1b[31mx\ny" + "z" * 10**6
    answers = {1: answer(0), 2: answer(1, device=odd, turn=odd), 3: broken(2, odd)}
    sites = compare(answers, {}, config(strict=False))
    kept = sites.devices[1], sites.turns[1], sites.left_out["site-02"]
    assert all(re.fullmatch(r"\[31mx yz{90,500}", text) for text in kept), kept
    assert max(map(len, kept)) <= 500


@pytest.mark.parametrize("told", [answer(3), broken(3, "no data"), answer(19)])
def test_a_site_that_says_it_is_another_is_left_out_alone_under_its_true_name(
    told: dict[str, Any],
) -> None:
    """Whether that one is ready, is broken or is not there."""
    answers = {1: answer(0), 2: answer(3), 4: answer(5), 3: told}
    listed = {1: 0, 2: 3, 4: 5, 3: 7}
    sites = compare(answers, {}, config(strict=False), listed)
    assert sites.node_of == {0: 1, 3: 2, 5: 4}
    said = f"site-{told['partition-id']:02d}"
    why = (
        f"it says that it is {said}, and its key is that of site-07; correct PARTITION_ID in "
        "its site.env"
    )
    assert sites.left_out == {"site-07": why}
    with pytest.raises(PreflightError) as caught:
        compare(answers, {}, config(), listed)
    assert str(caught.value) == f"1 sites are not ready:\n  site-07: {why}"


def test_a_node_that_the_operator_does_not_know_is_left_out_by_its_id_with_the_cure() -> None:
    answers = {1: answer(0), 2: answer(1), 99: answer(1)}
    sites = compare(answers, {}, config(strict=False), {1: 0, 2: 1})
    assert sites.node_of == {0: 1, 1: 2}
    assert sites.left_out == {"node 99": UNLISTED}
    assert "run superlink.register" in UNLISTED


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
        answer(2, **{"num-examples": 103}),  # and 102 in its counts
        answer(2, rows="[]"),
        answer(2, rows=json.dumps({"train": rows(102, 12)["train"]})),
        answer(2, rows=json.dumps(rows(102, 13))),
        answer(2, rows=json.dumps(rows(102, 12, cut=103))),
        answer(2, rows=json.dumps(rows(102, 12, empty=-1))),
        answer(2, rows=json.dumps(rows(102, 12, empty=True))),
        answer(2, rows=json.dumps(rows(102, 12, patients=1))),
        answer(2, rows=json.dumps(rows(102, 12) | {"train": COUNTS | {"used": 102}})),
        answer(2, rows="[" * 100_000),
        answer(2, versions=json.dumps({"python": "x" * 50_000_000})),
    ],
)
def test_an_answer_that_cannot_be_read_is_that_sites_alone(facts: dict[str, Any]) -> None:
    answers = {1: answer(0), 2: answer(1), 66: facts}
    listed = {1: 0, 2: 1, 66: 2}
    unreadable = "an answer to the preflight that cannot be read"
    sites = compare(answers, {}, config(strict=False), listed)
    assert set(sites.node_of) == {0, 1}
    assert list(sites.left_out) == ["site-02"]
    assert sites.left_out["site-02"].startswith(unreadable)
    assert len(sites.left_out["site-02"]) < 200
    with pytest.raises(PreflightError, match=f"site-02: {unreadable}"):
        compare(answers, {}, config(), listed)


@pytest.fixture
def sites_dir(tmp_path: Path) -> Path:
    return write_site_list(tmp_path, {40: 0, 50: 1, 60: 2})


def ready(facts: dict[str, Any]) -> Node:
    return lambda m: Message(RecordDict({"preflight": ConfigRecord(facts)}), reply_to=m)


def lost(message: Message) -> Message:
    return Message(Error(code=3, reason="node unavailable"), reply_to=message)


def lost_without_a_reason(message: Message) -> Message:
    return Message(Error(code=3), reply_to=message)


def silent(message: Message) -> None:
    return None


def test_every_node_is_asked_once_and_the_answers_are_compared(sites_dir: Path) -> None:
    grid = StandInGrid({50: ready(answer(1)), 40: ready(answer(0))}, reverse=True)
    sites = preflight(grid, config(node_timeout_s=5.0), sites_dir)
    assert sites.node_of == {0: 40, 1: 50}
    assert sorted(m.metadata.dst_node_id for m in grid.sent) == [40, 50]


@pytest.mark.parametrize("node", [lost, lost_without_a_reason, silent])
def test_a_site_that_fails_or_keeps_silent_is_named_when_the_time_is_up(
    node: Node, sites_dir: Path
) -> None:
    grid = StandInGrid({40: ready(answer(0)), 50: ready(answer(1)), 60: node})
    with pytest.raises(PreflightError, match="site-02: "):
        preflight(grid, config(node_timeout_s=0.5), sites_dir)
    sites = preflight(grid, config(strict=False, node_timeout_s=0.5), sites_dir)
    assert set(sites.node_of) == {0, 1}
    assert list(sites.left_out) == ["site-02"]


def test_excluded_sites_are_not_asked_and_count_nowhere(sites_dir: Path) -> None:
    """Neither as one that is there, nor as one that is not ready."""
    grid = StandInGrid({40: ready(answer(0)), 50: ready(answer(1)), 60: ready(answer(2))})
    without = config(exclude_sites="site-02", node_timeout_s=5.0)
    sites = preflight(grid, without, sites_dir)
    assert set(sites.node_of) == {0, 1}
    assert sites.left_out == {"site-02": "left out by strategy.exclude-sites"}
    assert sorted(m.metadata.dst_node_id for m in grid.sent) == [40, 50]
    with pytest.raises(SilenceError, match="2 of 3 SuperNodes online"):
        preflight(grid, config(3, exclude_sites="site-02", node_timeout_s=0.5), sites_dir)
    with pytest.raises(PreflightError, match="names site-77, and the operator's list"):
        preflight(grid, config(exclude_sites="site-02,site-77"), sites_dir)


def test_a_site_that_answers_something_else_is_named(sites_dir: Path) -> None:
    nodes = {40: ready(answer(0)), 50: ready(answer(1))}
    grid = StandInGrid({**nodes, 60: lambda m: Message(RecordDict(), reply_to=m)})
    with pytest.raises(PreflightError, match="site-02"):
        preflight(grid, config(node_timeout_s=0.5), sites_dir)


def test_a_site_whose_first_answer_is_lost_is_asked_again_and_nobody_else_is(
    sites_dir: Path,
) -> None:
    answers = iter([lost, ready(answer(1))])
    grid = StandInGrid({40: ready(answer(0)), 50: lambda m: next(answers)(m)})
    assert preflight(grid, config(node_timeout_s=30.0), sites_dir).node_of == {0: 40, 1: 50}
    assert [m.metadata.dst_node_id for m in grid.sent] == [40, 50, 50]


def test_a_site_on_a_busy_host_has_time_to_answer_before_it_is_asked_again(
    clock: Clock, sites_dir: Path
) -> None:
    asked: list[float] = []
    nodes = {40: ready(answer(0)), 50: ready(answer(1)), 60: lambda m: asked.append(clock.now)}
    with pytest.raises(PreflightError, match="site-02: no answer"):
        preflight(StandInGrid(nodes), config(node_timeout_s=600.0), sites_dir)
    first, second, third = asked
    assert second - first > 300
    assert third - second > 120
    assert clock.now < 610


def test_of_a_run_that_goes_on_a_site_at_work_is_waited_for_until_its_order_has_expired(
    sites_dir: Path, clock: Clock
) -> None:
    def busy(message: Message) -> Message | Exception | None:
        """Takes no order before its last has expired; ask it what it has then."""
        return ready(answer(2))(message) if clock.now > 7000 else None

    nodes = {40: ready(answer(0)), 50: ready(answer(1)), 60: busy}
    waits: dict[str, Any] = {"node_timeout_s": 600.0, "round_timeout_s": 7200.0}
    with pytest.raises(SilenceError, match="site-02: no answer"):
        preflight(StandInGrid(nodes), config(**waits), sites_dir)
    assert clock.now < 610
    clock.now = 0.0
    sites = preflight(StandInGrid(nodes), config(**waits, resume="12,0"), sites_dir)
    assert set(sites.node_of) == {0, 1, 2}
    assert 7000 < clock.now < 7000 + 600 + 120


def test_a_site_that_never_answers_is_waited_for_no_longer_than_its_last_order_can_live(
    sites_dir: Path, clock: Clock
) -> None:
    nodes = {40: ready(answer(0)), 50: ready(answer(1)), 60: silent}
    with pytest.raises(SilenceError, match="site-02: no answer"):
        preflight(StandInGrid(nodes), config(round_timeout_s=7200.0, resume="12,0"), sites_dir)
    assert 7200 < clock.now < 7200 + 600 + 2 * 120


def test_silence_alone_is_told_from_reasons_that_stay(sites_dir: Path) -> None:
    listed = {n: n - 1 for n in (1, 2, 3)}

    def error(answers: dict[int, dict[str, Any]], silent: dict[int, str]) -> type[Exception]:
        with pytest.raises(PreflightError) as caught:
            compare(answers, silent, config(), listed)
        return caught.type

    fine, quiet = {1: answer(0)}, "no answer to the preflight"
    assert error(fine, {2: quiet, 3: quiet}) is SilenceError
    assert error(fine, {2: quiet, 3: "site-03 runs app 28a1 only"}) is PreflightError
    assert error({1: broken(0, "no data")}, {2: quiet}) is PreflightError
    with pytest.raises(SilenceError, match="1 of 2 SuperNodes"):
        preflight(StandInGrid({40: ready(answer(0))}), config(node_timeout_s=0.01), sites_dir)


def test_too_few_nodes_end_the_wait_with_an_error_that_says_how_many(sites_dir: Path) -> None:
    grid = StandInGrid({40: ready(answer(0))})
    with pytest.raises(PreflightError, match="1 of 2 SuperNodes") as caught:
        preflight(grid, config(node_timeout_s=0.01), sites_dir)
    assert "operator's list" not in str(caught.value)
    assert not grid.sent


def test_nodes_that_are_not_sites_do_not_make_up_the_number_and_are_never_asked(
    sites_dir: Path,
) -> None:
    strangers = {n: ready(answer(n % 3)) for n in (97, 98, 99)}
    grid = StandInGrid({40: ready(answer(0)), **strangers})
    with pytest.raises(PreflightError, match="1 of 2 SuperNodes online") as caught:
        preflight(grid, config(node_timeout_s=5.0), sites_dir)
    assert "3 more are not in the operator's list of sites: run superlink.register" in str(
        caught.value
    )
    grid = StandInGrid({40: ready(answer(0)), 50: ready(answer(1)), **strangers})
    sites = preflight(grid, config(strict=False, node_timeout_s=5.0), sites_dir)
    assert {m.metadata.dst_node_id for m in grid.sent} == {40, 50}
    assert sites.left_out == {f"node {n}": UNLISTED for n in strangers}


def test_a_site_that_is_entered_in_the_list_meanwhile_takes_part(
    sites_dir: Path, clock: Clock
) -> None:
    """As where register has let a node in and is about to write the list."""
    nodes = {40: ready(answer(0)), 50: ready(answer(1)), 99: ready(answer(5))}
    grid = StandInGrid(nodes)
    sleep = clock.sleep

    def enter(seconds: float) -> None:
        write_site_list(sites_dir, {40: 0, 50: 1, 60: 2, 99: 5})
        sleep(seconds)

    clock.sleep = enter  # type: ignore[method-assign]
    sites = preflight(grid, config(node_timeout_s=60.0), sites_dir)
    assert sites.node_of == {0: 40, 1: 50, 5: 99}
    assert sites.left_out == {}


def test_without_a_list_of_the_sites_nobody_is_asked(tmp_path: Path) -> None:
    grid = StandInGrid({40: ready(answer(0)), 50: ready(answer(1))})
    with pytest.raises(SiteListError, match=r"run superlink\.register"):
        preflight(grid, config(), tmp_path)
    assert not grid.sent
