"""Messages to sites and what comes back, whatever comes back."""

import json

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from app.exchange import POLL_S, REFUSED, exchange, one_line
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


def test_a_reply_is_told_when_it_comes_and_not_when_all_are_there(clock: Clock) -> None:
    grid = StandInGrid({1: says("fine"), 2: silent, 3: lambda m: KeyError()})
    arrived: list[tuple[object, float]] = []

    def note(content: RecordDict) -> None:
        arrived.append((word(content), clock.now))

    exchange(grid, messages(1, 2, 3), 33.0, arrived=note)
    assert arrived == [("fine", 0.0)]


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


@given(st.text(max_size=2000))
def test_whatever_a_site_says_fits_on_one_short_line(text: str) -> None:
    line = one_line(text)
    assert len(line) <= 500
    assert line.isprintable()
