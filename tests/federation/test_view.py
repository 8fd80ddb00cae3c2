"""A run in the terminal of somebody who has its SuperLink's address, and nothing of its results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import merged_config
from superlink.connection import write_connection
from superlink.onehost.processes import LocalFederation
from superlink.register import register
from superlink.submit import _flwr, _start
from tests.samples import REPOSITORY
from tests.terminal import Terminal

pytestmark = pytest.mark.faults
OVERRIDES = ["strategy.min-nodes=2 strategy.node-timeout-s=600"]


def test_whoever_follows_a_run_from_elsewhere_sees_where_it_stands_and_that_it_was_stopped(
    tmp_path: Path,
) -> None:
    with LocalFederation(tmp_path, tmp_path / "models", tmp_path / "results", 2) as federation:
        federation.provision()
        control = federation.start_superlink()  # no site ever comes: the run waits
        register(control, federation.public, federation.sites_dir)
        home = tmp_path / "home"
        home.mkdir()
        write_connection(home, control.address, federation.public / "ca.crt")
        own = {"FLWR_HOME": str(home), "PATH": "/usr/bin:/bin"}
        flat, _ = merged_config(REPOSITORY, OVERRIDES)
        run_id = _start(REPOSITORY, flat, home, own)
        terminal = Terminal(
            [sys.executable, "-m", "superlink.submit", "--run-config", *OVERRIDES],
            CONTROL_ADDRESS=control.address, PUBLIC_DIR=str(federation.public),
        )  # fmt: skip
        terminal.read_until("0 of 2 sites are online, 0:")
        subprocess.run(
            [_flwr(), "stop", str(run_id), "deployment"], env=own, check=True, capture_output=True
        )
        assert terminal.end() == 1
    screen = [line for line in terminal.screen() if line]
    assert f"submit: run {run_id} is going on; following it" in screen
    assert f"submit: run {run_id} finished:stopped" in screen
    assert re.fullmatch(r"the run has stopped, 0:\d\d:\d\d", screen[-1])
