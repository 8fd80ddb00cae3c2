"""What became of the sites' rows: one line for all, and a warning for each site that loses many."""

import logging
from collections.abc import Iterator

import pytest

from app.server.site_rows import COUNTS, in_words


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("app").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("app").removeHandler(caplog.handler)


def part(read: int, **lost: int) -> dict[str, int]:
    used = read - sum(n for why, n in lost.items() if why != "cut")
    return dict.fromkeys(COUNTS, 0) | lost | {"read": read, "used": used}


def said(sites: dict[int, dict[str, dict[str, int]]]) -> str:
    return in_words({p: parts["train"]["used"] for p, parts in sites.items()}, sites)


def test_where_nothing_is_lost_only_the_rows_are_said(log: pytest.LogCaptureFixture) -> None:
    assert said({0: {"train": part(40), "holdout": part(4)}}) == "40 rows"
    assert in_words({0: 7, 1: 8}, {0: {}, 1: {}}) == "15 rows"
    assert not log.records


def test_what_is_lost_at_all_sites_is_added_up_and_much_at_one_is_a_warning(
    log: pytest.LogCaptureFixture,
) -> None:
    sites = {
        3: {"train": part(60, too_long=54), "holdout": part(10, known=10)},
        1: {"train": part(100, empty=10, repeated=10, cut=10), "holdout": part(10, cut=1)},
        2: {"train": part(100, cut=11), "holdout": part(0)},
    }
    assert said(sites) == "186 rows of 260 (10 empty, 10 repeated, 54 too long, 21 cut)"
    assert list(dict.fromkeys(r.getMessage() for r in log.records)) == [
        "[preflight] site-02: many rows are lost or cut: 100 of 100 in train are used (11 cut)",
        "[preflight] site-03: many rows are lost or cut: 6 of 60 in train are used (54 too long)",
        "[preflight] site-03: many rows are lost or cut: 0 of 10 in holdout are used (10 known)",
    ]
    assert {r.levelname for r in log.records} == {"WARNING"}
