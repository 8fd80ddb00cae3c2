"""Where a run stands, below its lines, as long as they are printed to a terminal.

It reads the very lines that are printed, submit's and the ServerApp's, and knows nothing else.
"""

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# What the lines say, by what they say it of; a later line's counts.
_SAYS = {
    "phase": r"submit: (run .*|the SuperLink is away.*)|\[(preflight|round \d+/\d+)\] ",
    "sites": r"submit: (\d+ of \d+ SuperNodes online)|\[round \d+/\d+\] (training at .*)",
    "done": r"\[round (\d+/\d+)\] train loss",
    "loss": r"\[before\] (held-out loss \S+),|\[round \d+/\d+\] (train loss [^;]*);",
    "sent": r"\[round \d+/\d+\] train loss .*; (\S+ MiB sent, \d+) of the budget left; ",
    "left_s": r"\[round \d+/\d+\] train loss .*; (?:about (\d+) s left|last round)",
}


class Status:
    """The state of a run, as far as its lines have told."""

    def __init__(self) -> None:
        self.said = dict.fromkeys(_SAYS, "")
        self._started = self._told = time.monotonic()

    def read(self, line: str) -> None:
        for what, pattern in _SAYS.items():
            if found := re.match(pattern, line):
                self.said[what] = next(filter(None, found.groups()), "")
                self._told = time.monotonic() if what == "left_s" else self._told

    def __rich__(self) -> Table:
        said, now = self.said, time.monotonic()
        done, total = (int(n) for n in (said["done"] or "0/1").split("/"))
        first = [said["phase"], str(timedelta(seconds=round(now - self._started)))]
        if (left_s := round(int(said["left_s"] or 0) + self._told - now)) > 0:
            first += [f"about {timedelta(seconds=left_s)} left"]
        sent = said["sent"] and f"{said['sent']} of the budget left"
        shown = Table.grid()
        shown.add_row(ProgressBar(total, done))
        for part in (first, [said["sites"]], [said["loss"], sent]):
            if line := ", ".join(filter(None, part)):
                shown.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
        return shown


class _Lines(io.TextIOBase):
    """In the place of stdout: each line goes to the terminal and is read."""

    def __init__(self, console: Console, status: Status) -> None:
        self._console, self._status, self.begun = console, status, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self._status.read(line)
            self._console.print(Text(line), soft_wrap=True)
        return len(text)


@contextmanager
def shown() -> Iterator[None]:
    """Show it while this lasts; its last state stays. Without a terminal nothing changes."""
    console, status = Console(file=sys.stdout), Status()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        yield
        return
    lines = _Lines(console, status)
    with Live(status, console=console, refresh_per_second=2, redirect_stdout=False):
        with redirect_stdout(lines):
            yield
        lines.write("\n" * bool(lines.begun))


def plain(line: str) -> str:
    """``line`` without colours."""
    return _ESCAPES.sub("", line)
