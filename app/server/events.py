"""What happens in a run, as JSON lines in events.jsonl beside metrics.jsonl.

Each line of the run's log is an event, and so is what the log leaves out for being too much of it
(which site has answered). Every event has ``time`` (UTC), ``event`` (its kind), ``level`` and
``text`` (the line, with no more of a site than ``untrusted.one_line`` lets through). By kind also:

| event      | fields                                                                            |
|------------|-----------------------------------------------------------------------------------|
| start      | rounds: of the whole run                                                          |
| waiting    | online, needed: SuperNodes                                                        |
| ready      | sites: by name num_examples, num_holdout, device; left_out: by name the reason    |
| training   | round, attempt (from 0), sites                                                    |
| evaluating | round (0: before the first), sites                                                |
| arrived    | round, site, of (train or evaluate), bytes: of adapters in the reply              |
| left-out   | round, site, of, why                                                              |
| before     | held_out_loss: the initial adapter's, median of the sites                         |
| checkpoint | round, folder                                                                     |
| round      | round, train_loss, held_out_loss (null: not measured), sites, and in their order  |
|            | losses, shares, alphas; bytes_down, bytes_up, mb_sent, mb_left (MiB), seconds,    |
|            | left_s (of the run)                                                               |
| end        | status (completed or failed), error                                               |
| log        | none: any other line; each of the last in a failing site's log is one, below its  |
|            | left-out, or in the preflight above the error                                     |

A line is written at once, as a whole: a reader that finds one without an end reads it later.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

logger = logging.getLogger("app")


def event(kind: str, **fields: Any) -> dict[str, Any]:
    """The ``extra`` of a call of a logger, which makes its line an event of this kind."""
    return {"event": {"event": kind, **fields}}


def tell_waiting(online: int, needed: int) -> None:
    """So many SuperNodes are online, before the preflight asks them."""
    extra = event("waiting", online=online, needed=needed)
    logger.info("[preflight] %d of %d SuperNodes online", online, needed, extra=extra)


def tell_left_out(where: str, server_round: int, of: str, sites: Mapping[str, str]) -> None:
    """Each of these sites, and why it was left out: a line of the log, and an event."""
    for name, why in sites.items():
        extra = event("left-out", round=server_round, site=name, of=of, why=why)
        logger.warning("[%s] without %s: %s", where, name, why, extra=extra)
        tell_last_lines(where, name, why)


def tell_last_lines(where: str, name: str, why: str) -> None:
    """Of the site's own log, where they came with why it fails (``untrusted.Reason``)."""
    for line in getattr(why, "lines", ()):
        logger.info("[%s]   last in the log of %s: %s", where, name, line)


class EventFile(logging.Handler):
    """Appends what is logged to ``path``. A disk that takes no more of it does not end a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.DEBUG)
        self._path, self._torn, self._told = path, False, False

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "event": "log",
            "level": record.levelname.lower(),
            "text": record.getMessage(),
            **getattr(record, "event", {}),
        }
        # What a full disk has cut off ends here, and spoils nothing but itself.
        data = b"\n" * self._torn + json.dumps(line).encode() + b"\n"
        try:
            self._append(data)
        except OSError as err:
            if not self._told:
                self._told = True  # before: this line comes here as well
                logger.warning("[results] cannot write %s: %s", self._path, err.strerror)

    def _append(self, data: bytes) -> None:
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._torn = True
            written = os.write(handle, data)
            if written < len(data):  # what is left of the disk; the rest says why
                os.write(handle, data[written:])
            self._torn = False
        finally:
            os.close(handle)
