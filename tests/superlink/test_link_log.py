"""What Flower says of itself, through its own logger, in a process whose log is set up."""

import os
import pty
import subprocess
import sys

import pytest

from superlink import link_log
from tests.samples import REPOSITORY

# As Flower 1.36 and its HTTP server call their loggers.
SAYS = """
import logging
from superlink.link_log import set_up
set_up()
from flwr.supercore import log
access = logging.getLogger("uvicorn.access")
access.addHandler(logging.StreamHandler())
access.setLevel(logging.INFO)
log(logging.INFO, "[Fleet.PullMessages] node_id=%s", 7)
log(logging.INFO, "")
log(logging.INFO, "ControlServicer.ListNodes")
log(logging.INFO, "ControlServicer.StartRun")
log(logging.INFO, "[Fleet.ActivateNode] Activated node_id=%s", 7)
log(logging.WARNING, "[door] %s", "refused")
asks = "[/flwr.proto.Fleet/ActivateNode][ApiError:%d] Attempted …, exception: %s"
log(logging.ERROR, asks % (2003, "Heartbeat interval 0.0 is out of bounds [10, 1800]."))
log(logging.ERROR, asks % (2004, "No SuperNode found with the given public key."))
call = '%s - "%s %s HTTP/%s" %d'
for status in (200, 404):
    access.info(call, "127.0.0.1:1", "POST", "/v1/runtime/pull-pending-tasks", "1.1", status)
"""
EVENTS = [
    "INFO :      ControlServicer.StartRun",
    "INFO :      [Fleet.ActivateNode] Activated node_id=7",
    "WARNING :   [door] refused",
    "ERROR :     [/flwr.proto.Fleet/ActivateNode][ApiError:2004] Attempted …, exception: "
    "No SuperNode found with the given public key.",
    '127.0.0.1:1 - "POST /v1/runtime/pull-pending-tasks HTTP/1.1" 404',
]


def said(**env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SAYS], cwd=REPOSITORY, env=os.environ | env, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_log_holds_a_line_an_event_and_no_colour() -> None:
    assert said() == EVENTS


def test_whoever_looks_for_a_fault_sees_all_of_it() -> None:
    assert {"[Fleet.PullMessages] node_id=7", "ControlServicer.ListNodes"} <= {
        line.partition(":      ")[2] for line in said(FLWR_LOG_LEVEL="DEBUG")
    }


def test_in_a_terminal_levels_have_their_colours() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", SAYS], cwd=REPOSITORY, check=True, stderr=theirs)
    assert b"\x1b[92mINFO" in os.read(ours, 4096)


@pytest.mark.parametrize("program", ["flower-superexec", "flwr-serverapp"])
def test_what_flower_starts_by_name_is_its_own_program_with_this_log(program: str) -> None:
    done = subprocess.run(
        [program, "--help"], cwd=REPOSITORY, env=os.environ | {"PATH": link_log.path()},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"usage: {program}")
    assert (link_log.PROGRAMS / program).is_file()
