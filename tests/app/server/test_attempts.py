"""A round that is repeated, and the bytes of all its attempts."""

from typing import Any

import pytest
from flwr.app import Error, Message

from app.server.exchange import REFUSED
from app.server.strategy import HopelessError, RoundError, Strategy
from app.wire.adapter import initial_adapter
from tests.app.server.bad_replies import BAD
from tests.app.server.stand_in_sites import (
    ALL,
    aggregate_of,
    failing,
    moved,
    node,
    scored,
    silent,
    strategy,
)
from tests.stand_in_grid import Clock, Node, StandInGrid


def of_twenty(bad: set[int], reply: Node, **changes: Any) -> tuple[Strategy, StandInGrid]:
    nodes = {p: reply if p in bad else node(p) for p in range(20)}
    s = strategy(list(range(20)), nodes, min_nodes=20, **changes)
    assert isinstance(s.grid, StandInGrid)
    return s, s.grid


def asked(s: Strategy, grid: StandInGrid) -> list[int]:
    partition_of = {n: p for p, n in s.sites.node_of.items()}
    return [partition_of[m.metadata.dst_node_id] for m in grid.sent]


@pytest.mark.parametrize(
    "bad", [failing, silent, node(0, BAD["nan"])], ids=["error", "late", "nan"]
)
def test_a_round_without_usable_replies_is_repeated_with_the_next_sample(bad: Node) -> None:
    first, second = (set(strategy(list(range(20))).sample(4, a)) for a in (0, 1))
    assert not first & second  # or this test needs another round
    s, grid = of_twenty(first, bad, max_share=1.0)
    new, line = s.train_round(4, initial_adapter(s.layout, 1))
    assert asked(s, grid) == sorted(first) + sorted(second)
    assert line["attempts"] == 2
    assert line["partitions"] == sorted(second)
    assert sorted(line["rejected"]) == [f"site-{p:02}" for p in sorted(first)]
    assert all(line["rejected"].values())
    # Each attempt starts from the same adapter, and what failed leaves no trace in the result.
    assert len({m.content.array_records["adapter"]["payload"].data for m in grid.sent}) == 1
    expected, _ = aggregate_of({p: moved(p, initial_adapter(s.layout, 1)) for p in second})
    assert new.tobytes() == expected.tobytes()


def test_one_usable_reply_is_enough_unless_more_are_wanted() -> None:
    one = {strategy(list(range(20))).sample(1)[0]}
    s, grid = of_twenty(one, failing, min_replies=1)
    assert s.train_round(1, initial_adapter(s.layout, 1))[1]["attempts"] == 1
    assert len(grid.sent) == 2
    s, grid = of_twenty(one, failing, min_replies=2)
    assert s.train_round(1, initial_adapter(s.layout, 1))[1]["attempts"] == 2
    assert len(grid.sent) == 4


def test_the_bytes_of_all_attempts_are_counted_those_of_unused_replies_as_well() -> None:
    one = {strategy(list(range(20))).sample(1)[0]}
    s, _ = of_twenty(one, failing, min_replies=2)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["attempts"] == 2
    assert line["bytes_down"] == 4 * 4 * s.layout.size
    assert line["bytes_up"] == 3 * 4 * s.layout.size
    assert s.bytes_sent == line["bytes_down"] + line["bytes_up"]


def refusing_in_words(message: Message) -> Message:
    """The SuperLink's words in a site's mouth: it got the order all the same."""
    return Message(Error(code=1, reason=REFUSED), reply_to=message)


def test_an_order_that_the_superlink_refused_is_not_counted_as_sent() -> None:
    nodes = {0: node(0), 1: node(1), 2: refusing_in_words}
    s = strategy([0, 1, 2], nodes, fraction_evaluate=1.0, max_retries=0, **ALL)
    assert isinstance(s.grid, StandInGrid)
    s.grid.revoked = {s.sites.node_of[1]}
    kept: list[int] = []
    s.keep = kept.append
    each = 4 * s.layout.size
    adapter, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["rejected"] == {"site-01": REFUSED, "site-02": REFUSED}
    assert (line["bytes_down"], line["bytes_up"]) == (2 * each, each)
    assert s.bytes_sent == 3 * each
    s.grid.nodes[s.sites.node_of[0]] = node(0, scored)
    assert s.evaluate(1, adapter)["eval_bytes_down"] == 2 * each
    assert s.bytes_sent == kept[-1] == 5 * each


def test_what_is_sent_and_what_comes_is_kept_at_once(clock: Clock) -> None:
    """A SuperLink that dies while it waits for a site has the others' bytes on its disk."""
    s = strategy([0, 1], {0: node(0), 1: silent}, round_timeout_s=33.0, max_retries=0, **ALL)
    kept: list[tuple[int, float]] = []
    s.keep = lambda size: kept.append((size, clock.now))
    s.train_round(1, initial_adapter(s.layout, 1))
    each = 4 * s.layout.size
    assert kept == [(2 * each, 0.0), (3 * each, 0.0)]


def test_a_site_that_failed_once_may_take_part_in_the_next_attempt() -> None:
    calls: list[int] = []

    def second_time_lucky(partition_id: int) -> Node:
        def answer(message: Message) -> Message | Exception | None:
            calls.append(partition_id)
            at_first = calls.count(partition_id) == 1
            return (failing if at_first else node(partition_id))(message)

        return answer

    s = strategy([0, 1], {p: second_time_lucky(p) for p in (0, 1)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert calls == [0, 1, 0, 1]
    assert line["partitions"] == [0, 1]
    assert line["attempts"] == 2
    assert sorted(line["rejected"]) == ["site-00", "site-01"]  # as it was, once


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_after_max_retries_the_round_fails_and_names_everyone(max_retries: int) -> None:
    s, grid = of_twenty(set(range(20)), failing, max_retries=max_retries)
    with pytest.raises(RoundError) as caught:
        s.train_round(2, initial_adapter(s.layout, 1))
    samples = [s.sample(2, a) for a in range(max_retries + 1)]
    assert asked(s, grid) == [p for sample in samples for p in sample]
    message = str(caught.value)
    everyone = {p for sample in samples for p in sample}
    for partition_id in range(20):
        assert (f"site-{partition_id:02}: " in message) == (partition_id in everyone)
    for part in ("round 2", "0 usable", "min-replies", "max-retries", "FloatingPointError"):
        assert part in message
    assert "\n" not in message
    assert s.bytes_sent == len(grid.sent) * 4 * s.layout.size  # also of a round that failed


def raising(text: str) -> Node:
    """A site whose ClientApp raised this, in Flower's words."""
    reason = f"<class 'app.site.partition.SiteError'>:<'{text}'>"
    return lambda message: Message(Error(code=2, reason=reason), reply_to=message)


def own_reason(message: Message) -> Any:
    return raising(str(message.metadata.dst_node_id))(message)


NO_ROW = "no row keeps an answer within 8 tokens"


def test_what_fails_alike_at_two_samples_of_sites_is_tried_no_further() -> None:
    s, grid = of_twenty(set(range(20)), raising(NO_ROW), max_retries=5)
    with pytest.raises(HopelessError, match=rf"site-\d\d.* fail alike: .*{NO_ROW}") as caught:
        s.train_round(2, initial_adapter(s.layout, 1))
    assert len(grid.sent) == len(s.sample(2, 0)) + len(s.sample(2, 1))
    assert all(f"site-{p:02}" in str(caught.value) for p in asked(s, grid))


def test_what_fails_alike_at_all_sites_is_tried_once() -> None:
    s, grid = of_twenty(set(range(20)), raising(NO_ROW), fraction_train=1.0, max_retries=5)
    with pytest.raises(HopelessError):
        s.train_round(2, initial_adapter(s.layout, 1))
    assert len(grid.sent) == 20


@pytest.mark.parametrize(
    "reply",
    [failing, silent, node(0, BAD["nan"]), own_reason],
    ids=["Flower's own error", "late", "nan", "each its own reason"],
)
def test_what_may_be_otherwise_next_time_is_tried_as_often_as_asked(reply: Node) -> None:
    s, grid = of_twenty(set(range(20)), reply, max_retries=2)
    with pytest.raises(RoundError, match=r"strategy\.max-retries") as caught:
        s.train_round(2, initial_adapter(s.layout, 1))
    assert not isinstance(caught.value, HopelessError)
    assert len(grid.sent) == sum(len(s.sample(2, a)) for a in range(3))


def test_sites_of_one_sample_that_fail_alike_leave_it_to_the_next() -> None:
    first, second = (set(strategy(list(range(20))).sample(4, a)) for a in (0, 1))
    s, _ = of_twenty(first, raising(NO_ROW), max_share=1.0)
    assert s.train_round(4, initial_adapter(s.layout, 1))[1]["partitions"] == sorted(second)
