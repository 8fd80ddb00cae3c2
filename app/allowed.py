"""What a run-config key may hold: in words, and the check of a value of the right type."""

import math
import re
from collections.abc import Callable
from typing import Any

Allowed = tuple[str, Callable[[Any], bool]]


def one_of(*values: str) -> Allowed:
    return f"one of {', '.join(values)}", lambda v: v in values


def whole_from(low: int) -> Allowed:
    return f"a whole number, {low} or more", lambda v: v >= low


POSITIVE: Allowed = ("a number above 0", lambda v: 0 < v < math.inf)
FROM_0: Allowed = ("a number, 0 or more", lambda v: 0 <= v < math.inf)
SECONDS_TO_A_WEEK: Allowed = (
    "a number from 10 to 604800 (a week)", lambda v: 10 <= v <= 604800,
)  # fmt: skip
NOT_EMPTY: Allowed = ("a text that is not empty", lambda v: bool(v.strip()))
RUNS: Allowed = (
    'empty, or "latest" or run ids with commas between (0: start anew)',
    lambda v: not v or re.fullmatch(r"(latest|\d+)(,(latest|\d+))*", v) is not None,
)
SITES: Allowed = (
    'empty, or names of sites with commas between, as "site-03,site-07"',
    lambda v: not v or re.fullmatch(r"site-\d{2,}(,site-\d{2,})*", v) is not None,
)
SHARE: Allowed = ("a number above 0, at most 1", lambda v: 0 < v <= 1)
YES_NO: Allowed = ("true or false", lambda v: True)
