"""What became of the rows that each site read, as the sites say it: checked, and in words."""

import logging
from collections import Counter
from collections.abc import Mapping

from app.server.site_list import site_name
from app.server.untrusted import UnfitError, count, json_object

logger = logging.getLogger(__name__)
# A site's data -> the rows of it that the run can use, in an answer to the preflight.
PARTS = {"train": "num-examples", "holdout": "num-holdout"}
# Why a row is left out. One that is cut loses the end of its answer, and is used all the same.
LEFT_OUT = "empty", "repeated", "known", "too_long"
COUNTS = "read", *LEFT_OUT, "cut", "used"
MUCH = 0.1  # of a site's rows, left out for one reason or cut, is worth a warning
Counts = Mapping[str, int]


def row_counts(text: object, used: Counts) -> dict[str, dict[str, int]]:
    """The counts of a site, by part of its data: whole numbers that add up to ``used``.

    Raises UnfitError, and json's own errors.
    """
    given = json_object(text, "rows", 1000, len(PARTS))
    found = {}
    for part, rows in used.items():
        counts = given.get(part)
        if not isinstance(counts, dict) or set(counts) != set(COUNTS):
            raise UnfitError(f"rows are not the counts of {part}")
        found[part] = {key: count(counts[key], f"rows: {key}") for key in COUNTS}
        left = found[part]["read"] - sum(found[part][key] for key in LEFT_OUT)
        if not found[part]["used"] == left == rows or found[part]["cut"] > rows:
            raise UnfitError(f"the counts of the rows in {part} do not add up")
    return found


def in_words(used: Mapping[int, int], sites: Mapping[int, Mapping[str, Counts]]) -> str:
    """The training rows of all sites, by partition id; logs a warning for each that loses many."""
    total = Counter[str]()
    for partition_id, parts in sorted(sites.items()):
        total.update(parts.get("train", {}))
        for part, counts in parts.items():
            if max(_lost(counts).values(), default=0) > MUCH * counts["read"]:
                logger.warning(
                    "[preflight] %s: many rows are lost or cut: %d of %d in %s are used (%s)",
                    site_name(partition_id), counts["used"], counts["read"], part, _told(counts),
                )  # fmt: skip
    told = f" of {total['read']} ({_told(total)})" if _lost(total) else ""
    return f"{sum(used.values())} rows{told}"


def _lost(counts: Counts) -> dict[str, int]:
    return {key: counts[key] for key in (*LEFT_OUT, "cut") if counts[key]}


def _told(counts: Counts) -> str:
    return ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in _lost(counts).items())
