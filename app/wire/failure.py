"""What a site fails with, in one text, as Flower's errors are: why, and the last of its log."""

from collections.abc import Iterable

LINES, LINE = 10, 200  # of the log, at most; characters of one
BEGINS = "\n| "  # each of them, so that they are read below the error in the site's own log as well


def joined(why: str, lines: Iterable[str]) -> str:
    """``why``, and each line below it, cut to LINE characters."""
    below = "".join(BEGINS + " ".join(line.split())[:LINE] for line in lines)
    return f"{why}{below}\n" if below else why


def parted(text: str) -> tuple[str, list[str]]:
    """``why``, and at most LINES lines of about LINE characters, whoever has joined them.

    What follows the last of them (Flower's closing of the text) belongs to ``why``.
    """
    why, begins, below = text.partition(BEGINS)
    if not begins:
        return text, []
    below, _, end = below.rpartition("\n")
    return why + end, below[: LINES * (LINE + len(BEGINS))].split(BEGINS)[:LINES]
