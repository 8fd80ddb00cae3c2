"""Whatever a site says, what is kept of it is short, printable and of the right form."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.server.untrusted import ENTRIES, ENTRY, UnfitError, count, linear_layers, one_line, table

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
