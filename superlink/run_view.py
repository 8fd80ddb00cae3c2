"""Where a run stands, below its lines, as long as they are printed to a terminal.

It is told by the run's events, as the page is (superlink.page.state).
"""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from threading import Thread

import grpc
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from superlink import run_files
from superlink.control import Control
from superlink.page.runs import Json, number
from superlink.page.state import State, take

LAST_EVENTS_S = 5  # so long after the log's end they may come
_showing: list["Status"] = []  # in this process's terminal; one at most
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_FIGURES = {
    "train_loss": "train loss {:.4f}", "held_out_loss": "held-out loss {:.4f}",
    "mb_sent": "{:.1f} MiB sent", "mb_left": "{:.0f} of the budget left",
}  # fmt: skip


class Status:
    """The state of a run, as far as its events have told."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._state, self._figures = State("running", 0, 0), dict[str, float]()

    def follow(self, control: Control, run_id: int) -> Thread:
        """Take its events, as they come; the thread ends with the run."""
        self._state, self._figures = State("running", 0, 0), {}

        def read() -> None:
            with suppress(grpc.RpcError):  # why it is away, or gone, submit finds out
                for reply in control.events(run_id):
                    self.take(run_files.table(run_files.parsed(reply.task_event.data)))

        reader = Thread(target=read, daemon=True)
        reader.start()
        return reader

    def take(self, event: Json) -> None:
        take(self._state, event)
        self._figures |= {k: v for k in _FIGURES if (v := number(event, k)) is not None}

    def __rich__(self) -> Table:
        state, said = self._state, self._figures
        first = [state.phase, str(timedelta(seconds=round(time.monotonic() - self._started)))]
        if state.ready_in and (left := state.ready_in - datetime.now(UTC)) > timedelta(0):
            first.append(f"about {timedelta(seconds=round(left.total_seconds()))} left")
        sites = [f"{s.name} {s.state}" for s in list(state.sites.values()) if s.state != "ready"]
        shown = Table.grid()
        shown.add_row(ProgressBar(state.total or 1, state.done))
        for part in (first, sites, [f.format(said[k]) for k, f in _FIGURES.items() if k in said]):
            if part:
                line = run_files.text(", ".join(part))
                shown.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
        return shown


@contextmanager
def shown() -> Iterator[Status | None]:
    """Show it while this lasts; its last state stays. Without a terminal there is none."""
    # Lines as they are: the terminal's to break, and in brackets nothing but text.
    console = Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False, highlight=False)
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        yield None
        return
    status = Status()
    with Live(status, console=console, refresh_per_second=2):
        _showing.append(status)
        try:
            yield status
        finally:
            _showing.clear()


@contextmanager
def followed(control: Control, run_id: int) -> Iterator[None]:
    """What is shown takes the run's events while its log is printed, and those of its end."""
    readers = [status.follow(control, run_id) for status in _showing]
    yield
    for reader in readers:
        reader.join(LAST_EVENTS_S)


def ended(status: str) -> None:
    """Tell what is shown: a ServerApp that was stopped, or killed, may never say so."""
    for view in _showing:
        view.take({"event": "end", "status": status.removeprefix("finished:")})


def plain(line: str) -> str:
    """``line`` without colours."""
    return _ESCAPES.sub("", line)
