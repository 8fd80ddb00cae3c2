"""The page of a run as a file, in the containers' own hands: also of one that was stopped."""

import os
import subprocess
from pathlib import Path

from app.config import merged_config
from superlink.connection import write_connection
from superlink.onehost.processes import free_port
from superlink.submit import _flwr, _start
from tests.containers.conftest import REPOSITORY, Federation, wait


def test_a_run_that_was_stopped_has_its_page_and_gets_it_anew_when_it_was_evaluated(
    images: None, tmp_path: Path
) -> None:
    ports = {n: str(free_port()) for n in ("FLEET_PORT", "CONTROL_PORT", "PAGE_PORT")}
    few = Federation(f"fedllm-report-{os.getpid()}", ports)
    try:
        up = few.compose("up", "-d", "serverapp", "register")  # no site: the run waits for them
        assert up.returncode == 0, up.stderr[-3000:]
        few["register"].wait(timeout=120)
        public = few.public(tmp_path)
        write_connection(tmp_path, few.control(public).address, public / "ca.crt")
        env = {"FLWR_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        flat, _ = merged_config(REPOSITORY, ["strategy.node-timeout-s=600"])
        run_id = _start(REPOSITORY, flat, tmp_path, env)
        folder = f"/results/{run_id}"
        assert wait(lambda: '"waiting"' in few.shell("serverapp", f"cat {folder}/events.jsonl"))
        assert "No such file" in few.shell("superlink", f"ls {folder}/report.html")
        stop = [_flwr(), "stop", str(run_id), "deployment"]
        subprocess.run(stop, env=env, check=True, capture_output=True)
        page = f"cat {folder}/report.html"
        assert wait(lambda: '<span class="chip failed">' in few.shell("superlink", page))
        few["serverapp"].exec_run(
            ["sh", "-c", f"echo none > {folder}/eval/report.json"], user="10002:10001"
        )
        assert wait(lambda: "eval/report.json is no JSON" in few.shell("superlink", page))
    finally:
        few.compose("down", "-v")
