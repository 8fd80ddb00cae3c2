"""What a site fails with: joined there, parted here, through Flower's own words around it."""

from hypothesis import given
from hypothesis import strategies as st

from app.wire.failure import BEGINS, LINE, LINES, joined, parted

SAID = st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=300)


@given(SAID, st.lists(SAID, max_size=LINES))
def test_what_was_joined_is_parted_again(why: str, lines: list[str]) -> None:
    text = joined(why, lines)
    kept = [" ".join(line.split())[:LINE] for line in lines]
    assert parted(text) == (why, kept)
    assert parted(f"<class 'SiteError'>:<'{text}'>") == (f"<class 'SiteError'>:<'{why}'>", kept)
    assert text.count("\n") == len(lines) + bool(lines)


@given(st.text())
def test_a_text_that_nobody_has_joined_is_all_why(text: str) -> None:
    if BEGINS not in text:
        assert parted(text) == (text, [])


@given(st.text(st.sampled_from("a|' \n\x1e"), max_size=5000))
def test_whoever_has_joined_them_there_are_few_lines_and_short_ones(text: str) -> None:
    lines = parted(text)[1]
    assert len(lines) <= LINES
    assert sum(map(len, lines)) <= LINES * (LINE + len(BEGINS))
