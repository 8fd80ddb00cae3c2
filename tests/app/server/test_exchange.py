"""Messages to sites and what comes back, whatever comes back."""

import json
import time
from collections.abc import Iterable

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from app.server.exchange import NOBODYS, POLL_S, REFUSED, exchange
from tests.stand_in_grid import Clock, Node, StandInGrid


def messages(*nodes: int) -> dict[str, Message]:
    return {f"to {n}": Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes}


def says(word: str) -> Node:
    return lambda m: Message(RecordDict({"said": ConfigRecord({"word": word})}), reply_to=m)


def word(content: RecordDict) -> object:
    return content.config_records["said"]["word"]


def silent(message: Message) -> None:
    return None


@pytest.mark.parametrize("reverse", [False, True])
def test_each_reply_belongs_to_the_site_that_was_asked(reverse: bool) -> None:
    grid = StandInGrid({n: says(f"I am {n}") for n in (1, 2, 3)}, reverse)
    contents, failed = exchange(grid, messages(3, 1, 2), 60)
    assert {k: word(c) for k, c in contents.items()} == {f"to {n}": f"I am {n}" for n in (1, 2, 3)}
    assert failed == {}


def test_a_reply_that_names_another_sites_message_counts_for_its_sender() -> None:
    grid = StandInGrid({1: says("honest"), 2: lambda m: other(m, grid)})

    def other(message: Message, grid: StandInGrid) -> Message:
        reply = says("liar")(message)
        assert isinstance(reply, Message)
        honest = grid.sent[0].metadata.message_id
        reply.metadata.__dict__["_reply_to_message_id"] = honest
        return reply

    contents, failed = exchange(grid, messages(1, 2), 60)
    assert {k: word(c) for k, c in contents.items()} == {"to 1": "honest", "to 2": "liar"}
    assert failed == {}


@pytest.mark.parametrize(
    "raised", [json.JSONDecodeError("x", "y", 0), AttributeError("has_error"), KeyError("")]
)
def test_a_reply_that_flower_cannot_read_is_its_senders_failure_alone(raised: Exception) -> None:
    grid = StandInGrid({1: lambda m: raised, 2: says("fine")})
    contents, failed = exchange(grid, messages(1, 2), 60)
    assert list(contents) == ["to 2"]
    assert failed == {"to 1": f"unreadable reply ({type(raised).__name__})"}


def test_the_superlinks_own_failure_is_nobodys_reply() -> None:
    grid = StandInGrid({1: lambda m: httpx.ReadTimeout("away")})
    with pytest.raises(httpx.ReadTimeout):
        exchange(grid, messages(1), 60)


def http(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://superlink/v1/runtime/pull-messages")
    response = httpx.Response(status, request=request)
    return httpx.HTTPStatusError("Internal Server Error", request=request, response=response)


def test_a_reply_that_the_superlink_cannot_read_is_its_senders_failure_alone() -> None:
    grid = StandInGrid({1: lambda m: http(500), 2: says("fine")})
    contents, failed = exchange(grid, messages(1, 2), 60)
    assert list(contents) == ["to 2"]
    assert failed == {"to 1": "the SuperLink cannot read its reply (HTTP 500)"}


@pytest.mark.parametrize("probe", [http(500), httpx.ConnectError("away")])
def test_a_superlink_that_can_read_nothing_fails_itself(probe: Exception) -> None:
    grid = StandInGrid({1: lambda m: http(500), 2: says("fine")})
    grid._replies[NOBODYS] = probe
    with pytest.raises(type(probe)):
        exchange(grid, messages(1, 2), 60)


def test_a_superlink_that_refuses_the_run_fails_itself() -> None:
    with pytest.raises(httpx.HTTPStatusError):
        exchange(StandInGrid({1: lambda m: http(404)}), messages(1), 60)


def test_a_site_whose_key_was_revoked_meanwhile_is_told_from_the_others() -> None:
    grid = StandInGrid({1: says("fine"), 2: says("never asked")}, revoked=[2])
    contents, failed = exchange(grid, messages(1, 2), 60)
    assert list(contents) == ["to 1"]
    assert failed == {"to 2": REFUSED}


def test_a_silent_site_is_waited_for_until_the_time_is_up_and_is_in_neither(clock: Clock) -> None:
    grid = StandInGrid({1: silent, 2: says("fine")})
    contents, failed = exchange(grid, messages(1, 2), 33.0)
    assert list(contents) == ["to 2"]
    assert failed == {}
    assert 33.0 <= clock.now <= 33.0 + POLL_S


def test_a_message_lives_as_long_as_it_is_waited_for() -> None:
    grid = StandInGrid({1: says("fine"), 2: says("fine")})
    old = messages(1, 2)  # made long before they are sent
    for message in old.values():
        message.metadata.created_at -= 1000
    exchange(grid, old, 33.0)
    assert [m.metadata.ttl for m in grid.sent] == [33.0, 33.0]
    assert all(abs(time.time() - m.metadata.created_at) < 100 for m in grid.sent)


def test_a_message_that_has_expired_is_asked_for_once_more_and_is_no_failure(clock: Clock) -> None:
    """What Flower answers then: it deletes the message, and any reply to it, when asked."""
    asked: list[float] = []

    class Expiring(StandInGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            asked.append(clock.now)
            if clock.now >= 33.0:
                (message,) = self.sent
                yield Message(Error(code=3, reason="Message Unavailable"), reply_to=message)

    contents, failed = exchange(Expiring({1: silent}), messages(1), 33.0)
    assert (contents, failed) == ({}, {})
    assert asked[-1] >= 33.0 > asked[-2]


def test_a_message_that_expires_while_it_is_asked_for_is_no_failure(clock: Clock) -> None:
    class Expiring(StandInGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            if clock.now >= 30.0:
                clock.now = 33.1
                (message,) = self.sent
                yield Message(Error(code=3, reason="Message Unavailable"), reply_to=message)

    assert exchange(Expiring({1: silent}), messages(1), 33.0) == ({}, {})


def test_a_reply_is_told_when_it_comes_and_not_when_all_are_there(clock: Clock) -> None:
    grid = StandInGrid({1: says("fine"), 2: silent, 3: lambda m: KeyError()})
    arrived: list[tuple[object, float]] = []

    def note(_: object, content: RecordDict) -> None:
        arrived.append((word(content), clock.now))

    exchange(grid, messages(1, 2, 3), 33.0, arrived=note)
    assert arrived == [("fine", 0.0)]


def after(clock: Clock, delay_s: float, grid: StandInGrid) -> Node:
    """Replies ``delay_s`` after it was asked; until then the grid has nothing."""
    return lambda m: grid.later(m, says("done"), clock, delay_s)


@pytest.mark.parametrize("shared", [True, False])
def test_sites_that_take_turns_have_their_time_one_after_the_other(
    clock: Clock, shared: bool
) -> None:
    # Each works 20 s on the device that 1 to 3 share; 4 has its own and keeps silent.
    grid = StandInGrid({4: silent})
    grid.nodes |= {n: after(clock, 20.0 * n, grid) for n in (1, 2, 3)}
    turns = {f"to {n}": "a" for n in (1, 2, 3)} | {"to 4": "b"}
    contents, failed = exchange(grid, messages(1, 2, 3, 4), 30.0, turns=turns if shared else None)
    assert failed == {}
    assert set(contents) == ({"to 1", "to 2", "to 3"} if shared else {"to 1"})
    assert clock.now == pytest.approx(60 if shared else 30, abs=2 * POLL_S)


def test_a_silent_site_is_waited_for_once_for_each_site_on_its_device(clock: Clock) -> None:
    grid = StandInGrid(dict.fromkeys((1, 2, 3), silent))
    turns = {"to 1": "a", "to 2": "a", "to 3": "b"}
    assert exchange(grid, messages(1, 2, 3), 30.0, turns=turns) == ({}, {})
    assert [m.metadata.ttl for m in grid.sent] == [60.0, 60.0, 30.0]
    assert clock.now == pytest.approx(60, abs=POLL_S)


def test_nobody_is_waited_for_when_all_have_answered(clock: Clock) -> None:
    exchange(StandInGrid({1: says("fine")}), messages(1), 33.0)
    assert clock.now == 0


def test_an_error_is_given_with_its_reason_on_one_line() -> None:
    reason = "line 1\n\tline 2\x1b[31m" + "x" * 9999
    grid = StandInGrid({
        1: lambda m: Message(Error(code=3, reason=reason), reply_to=m),
        2: lambda m: Message(Error(code=3), reply_to=m),
    })  # fmt: skip
    _, failed = exchange(grid, messages(1, 2), 60)
    assert failed["to 1"].startswith("line 1 line 2 [31mxxx")
    assert failed["to 2"] == "error without a reason"
