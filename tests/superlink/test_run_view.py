"""A run that is followed in a terminal: a real one (2026-11-30), its lines and its events anew."""

import re
import subprocess
import sys
from typing import Any

import pytest

from tests.samples import REPOSITORY
from tests.terminal import Terminal

LINES = """\
submit: 2 of 2 SuperNodes online
submit: run 16379072472962782269 started
INFO :      Starting logstream for run_id `16379072472962782269`
[preflight] 2 sites ready with 396 rows; base model HuggingFaceTB/SmolLM2-135M-Instruct, \
fingerprint 5edd8f8fc9336cae; adapter of 921600 parameters, 3.5 MiB
[before] held-out loss 4.0606, token accuracy 0.3047 (medians of 2 sites)
[round 1/2] training at site-00, site-01
[round 1/2] without site-01: [bold]no reply[/bold] within strategy.round-timeout-s = 9
[round 1/2] train loss 3.7537, held-out loss 3.8838; 34 s; 28.1 MiB sent, 199972 of the budget \
left; about 34 s left
[round 2/2] training at site-00, site-01
[round 2/2] train loss 3.7247, held-out loss 3.8581; 34 s; 49.2 MiB sent, 199951 of the budget \
left; last round
[done] /results/16379072472962782269/peft_2
submit: run 16379072472962782269 finished:completed
""".splitlines()
ALL = len(LINES)
AMID = LINES.index("[round 2/2] training at site-00, site-01") + 1
BOTH = ["site-00", "site-01"]


def figures(server_round: int, **more: float) -> dict[str, Any]:
    return {"event": "round", "round": server_round, "sites": BOTH, **more}


# What stands in events.jsonl with some of the lines, by their beginning.
EVENTS: dict[str, list[dict[str, Any]]] = {
    "[preflight]": [
        {"event": "start", "rounds": 2},
        {"event": "ready", "sites": {n: {"num_examples": 198} for n in BOTH}, "left_out": {}},
        {"event": "evaluating", "round": 0, "sites": BOTH},
    ],
    "[before]": [{"event": "before", "held_out_loss": 4.0606}],
    "[round 1/2] training": [{"event": "training", "round": 1, "sites": BOTH}],
    "[round 1/2] without": [
        {"event": "left-out", "round": 1, "site": "site-01", "why": "no reply within 9 s"},
    ],
    "[round 1/2] train loss": [
        figures(
            1, train_loss=3.7537, held_out_loss=3.8838, mb_sent=28.1, mb_left=199972.0,
            left_s=34.0,
        )
    ],
    "[round 2/2] training": [
        {"event": "training", "round": 2, "sites": BOTH},
        {"event": "arrived", "round": 2, "site": "site-00", "of": "train"},
        {"event": "left-out", "round": 2, "site": "site-01", "why": "no reply within 9 s"},
    ],
    "[round 2/2] train loss": [
        figures(
            2, train_loss=3.7247, held_out_loss=3.8581, mb_sent=49.2, mb_left=199951.0, left_s=0.0
        )
    ],
    "[done]": [{"event": "end", "status": "completed"}],
}  # fmt: skip


def follow(count: int, then: str = "") -> list[str]:
    """A process that prints so many of the lines, is told their events, and does something else."""
    code = """
import time
from datetime import UTC, datetime
from superlink.run_view import shown
def told(event):
    view and view.take({"time": datetime.now(UTC).isoformat(), **event})
with shown() as view:
"""
    for line in LINES[:count]:
        code += f" print({line!r}, flush=True)\n"
        for event in (e for start, some in EVENTS.items() if line.startswith(start) for e in some):
            code += f" told({event!r})\n"
    return [sys.executable, "-c", f"{code} {then or 'pass'}"]


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}])
def test_without_a_terminal_there_are_the_lines_and_nothing_else(env: dict[str, str]) -> None:
    done = subprocess.run(
        follow(ALL), cwd=REPOSITORY, check=True, capture_output=True, text=True, env=env
    )
    assert done.stdout.splitlines() == LINES
    assert done.stderr == ""


def test_a_terminal_that_can_do_nothing_gets_the_lines_alone() -> None:
    terminal = Terminal(follow(ALL), TERM="dumb")
    assert terminal.end() == 0
    assert terminal.output.splitlines() == LINES


def test_at_the_end_there_are_the_lines_and_below_them_the_last_state() -> None:
    terminal = Terminal(follow(ALL), columns=200)
    assert terminal.end() == 0
    screen = terminal.screen()
    assert screen[:ALL] == LINES
    bar, first, said, *rest = screen[ALL:]
    assert re.fullmatch("━+", bar)
    assert re.fullmatch(r"the run has completed, 0:00:\d\d", first)
    assert said == (
        "train loss 3.7247, held-out loss 3.8581, 49.2 MiB sent, 199951 of the budget left"
    )
    assert not any(rest)
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")  # its cursor


def test_amid_a_run_it_says_how_long_it_will_take_and_ctrl_c_leaves_that_readable() -> None:
    terminal = Terminal(follow(AMID, "print('waiting', flush=True); time.sleep(60)"))
    terminal.read_until("waiting")
    terminal.read_until(
        "training at 2 sites, 0:00:02"
    )  # nothing is printed any more, but the clock goes on
    terminal.type(b"\x03")
    assert terminal.end() == -2  # Python's own end by this signal
    screen = terminal.screen()
    where = screen.index("waiting") + 1
    first = r"round 2 of 2: training at 2 sites, 0:00:\d\d, about 0:00:3\d left"
    assert re.fullmatch(first, screen[where + 1])
    assert screen[where + 2] == "site-00 answered, site-01 late"
    assert "KeyboardInterrupt" in screen
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_in_a_narrow_terminal_the_state_is_cut_and_the_lines_are_whole() -> None:
    terminal = Terminal(follow(ALL), columns=24)
    assert terminal.end() == 0
    screen = terminal.screen()
    assert screen[:ALL] == LINES  # the terminal's own business to break
    assert [len(line) <= 24 for line in screen[ALL:]] == [True] * len(screen[ALL:])
    assert screen[ALL + 2] == "train loss 3.7247, held…"


def test_who_wants_no_colours_gets_none() -> None:
    plain, coloured = Terminal(follow(ALL), NO_COLOR="1"), Terminal(follow(ALL))
    assert (plain.end(), coloured.end()) == (0, 0)
    colour = re.compile(r"\x1b\[[\d;]*(?:3\d|38;[\d;]+)m")
    assert colour.search(coloured.output)
    assert not colour.search(plain.output)
    assert plain.screen()[:ALL] == coloured.screen()[:ALL]
