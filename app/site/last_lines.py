"""The last lines of the log about one message, for the operator who hears that it has failed.

A line stays at the site unless its own call says that it may travel: then it holds ids, counts,
types and line numbers, in words of ours, and nothing that a file, its text or a library has said.
"""

import logging
import sys
import traceback
from collections import deque
from contextlib import suppress
from typing import Self

from app.wire.failure import LINES

OURS = "app."


def travels(words: str = "") -> dict[str, str]:
    """The ``extra`` of a logger's call whose line may leave the site, or these words instead."""
    return {"travels": words}


class LastLines(logging.Handler):
    """Keeps them in ``kept``, the oldest first, from when it is entered until it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: deque[str] = deque(maxlen=LINES)

    def __enter__(self) -> Self:
        logging.getLogger("app").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("app").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        words = getattr(record, "travels", None)
        if words is not None:
            with suppress(Exception):  # a call's mistake: the log's own handler tells it
                self.kept.append(words or record.getMessage())


def places(err: BaseException) -> str:
    """The error's type, and where it came up: in our code, and the last three places.

    Modules and line numbers, none of the words: a library's may quote a row.
    """
    _, *frames = traceback.walk_tb(err.__traceback__)  # the first is the gate's own
    # A name that no import has given could be anything.
    names = [frame.f_globals.get("__name__") for frame, _ in frames]
    known = [name if name in sys.modules else "?" for name in names]
    ours = [at for at, name in enumerate(known) if name.startswith(OURS)]
    shown = sorted({*ours[-1:], *range(len(known))[-3:]})
    where = ", ".join(f"{known[at]} line {frames[at][1]}" for at in shown)
    return f"{type(err).__name__} in {where}"
