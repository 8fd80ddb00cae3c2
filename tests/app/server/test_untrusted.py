"""Whatever a site says, what is kept of it is short, printable and of the right form."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.server.untrusted import (
    ENTRIES,
    ENTRY,
    LINE,
    Reason,
    UnfitError,
    count,
    linear_layers,
    one_line,
    table,
)
from app.wire import failure
from app.wire.failure import BEGINS

# JSON of any form, not too deep.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.text(max_size=2000), st.integers(1, 500))
def test_whatever_a_site_says_fits_on_one_short_line(text: str, most: int) -> None:
    line = one_line(text, most)
    assert len(line) <= most
    assert line.isprintable()


# What a site may put in the place of a reason and the last lines of its log.
OVERFULL = {
    "10 MB of a reason": "x" * 10_000_000,
    "10 MB in one line": f"why{BEGINS}{'x' * 10_000_000}\n",
    "a million lines": f"why{BEGINS * 1_000_000}\n",
    "a million lines, each of a letter": "why" + f"{BEGINS}x" * 1_000_000 + "\n",
    "control characters": f"w\x1b[2Jy{BEGINS}a\x1b[1mb\x07{BEGINS}c\r\nd\u202ee\x9bf\ud800\n'>",
    "line ends, and no end": f"w\r\n\n{BEGINS}\n\n\n{BEGINS}|\n|",
    "nothing": f"{BEGINS}\n",
}


@pytest.mark.parametrize("text", OVERFULL.values(), ids=OVERFULL)
def test_of_a_sites_last_lines_few_are_kept_each_short_and_printable(text: str) -> None:
    reason = Reason.of(text)
    assert len(reason.lines) <= failure.LINES
    assert all(0 < len(line) <= failure.LINE for line in reason.lines)
    assert all(said.isprintable() for said in (reason, *reason.lines))
    assert len(reason) <= LINE


def test_a_reason_is_the_text_that_it_was_and_its_lines_come_beside_it() -> None:
    reason = Reason.of(f"<class 'E'>:<'no  room{BEGINS}first{BEGINS}a\x1b[31mb\n'>")
    assert reason == "<class 'E'>:<'no room'>"
    assert reason.lines == ("first", "a [31mb")
    assert json.dumps({"why": reason}) == json.dumps({"why": "<class 'E'>:<'no room'>"})
    assert Reason.of("two\nlines").lines == ()


def test_escape_codes_and_what_turns_the_writing_around_are_gone() -> None:
    said = one_line("a\x1b[2J\x1b]0;title\x07b\r\nc\u202ed\u200be\x9bm\ud800f")
    assert said == "a [2J ]0;title b c d e m f"


@given(st.dictionaries(st.text(), VALUES))
def test_a_table_is_small_and_printable_or_unfit(entries: dict[str, Any]) -> None:
    try:
        kept = table(json.dumps(entries), "versions")
    except UnfitError:
        return
    assert len(kept) <= ENTRIES
    assert all(len(x) <= ENTRY and x.isprintable() for pair in kept.items() for x in pair)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (json.dumps({"python": "x" * 50_000_000}), "versions has 500000.. characters, at most"),
        (json.dumps({f"p{n}": "1" for n in range(ENTRIES + 1)}), "versions has 33 entries"),
        (json.dumps(["3.11"]), "versions is no JSON object"),
        (b"{}", "versions is no text"),
        (None, "versions is no text"),
    ],
    ids=["50 MB", "33 packages", "a list", "bytes", "nothing"],
)
def test_a_table_that_is_none_is_refused_without_a_word_of_it(text: object, why: str) -> None:
    with pytest.raises(UnfitError, match=why) as caught:
        table(text, "versions")
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "layers",
    [
        {"a\x1b[31m": [1, 2]},
        {"a/../../b": [1, 2]},
        {"": [1, 2]},
        {"a" * 201: [1, 2]},
        {"a": [1]},
        {"a": [1, 2, 3]},
        {"a": "12"},
        {"a": [1, -2]},
        {"a": [1, 10**9]},
        {"a": [1, 2.0]},
        {"a": [1, True]},
        {f"l{n}": [1, 2] for n in range(50_001)},
        {f"l{n}" * 30: [1, 2] for n in range(40_000)},
    ],
)
def test_linear_layers_are_modules_with_two_sizes(layers: dict[str, Any]) -> None:
    with pytest.raises(UnfitError) as caught:
        linear_layers(json.dumps(layers))
    assert "\x1b" not in str(caught.value)


def test_linear_layers_keep_their_order() -> None:
    layers = {f"model.layers.{n}.self_attn.q-proj_1": [n, 4096] for n in (10, 2, 1)}
    assert list(linear_layers(json.dumps(layers)).items()) == list(layers.items())


@pytest.mark.parametrize("value", [-1, 10**9, True, 1.0, "1", None, [1]])
def test_a_count_is_a_whole_number_and_nothing_else(value: object) -> None:
    with pytest.raises(UnfitError, match="num-examples is no whole number"):
        count(value, "num-examples")
    assert count(10**9 - 1, "num-examples") == 10**9 - 1
