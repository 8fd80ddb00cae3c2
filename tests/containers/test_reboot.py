"""A power cut of the host in the middle of a round, and nobody who does anything after it.

Only of an engine that .ci/docker-engine has started: one kill -9 ends that, all its containers and
their mounts. It comes after test_stops.py, with the same containers.
"""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.containers.conftest import (
    APART,
    NODES,
    REPOSITORY,
    RUN_TIMEOUT_S,
    Federation,
    ended,
    wait,
)

POWER = Path("/var/lib/fedllm-engine/power")  # the process id
SITES = NODES[:4]
RUN_CONFIG = (
    "num-server-rounds=2 strategy.min-nodes=4 strategy.fraction-evaluate=0.0 "
    "train.training-arguments.max-steps=4"  # time to see that it trains
)


@pytest.fixture(scope="module")
def power(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> int:
    pid = int(POWER.read_text()) if POWER.is_file() else 0
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        command = b""
    if os.getuid() or not command.startswith(b"unshare\0"):
        why = "this engine is not .ci/docker-engine's: it may have other containers"
        assert not os.environ.get("REQUIRE_DOCKER"), why
        pytest.skip(why)
    if "PYTEST_XDIST_WORKER" in os.environ:  # at the same time, on this very engine
        for other in {item.path.name for item in request.session.items} & {*APART}:
            assert wait(ended(other, tmp_path_factory).exists, RUN_TIMEOUT_S)
    return pid


def test_after_a_power_cut_in_round_2_the_run_goes_on_by_itself_and_its_adapter_is_scored(
    federation: Federation, power: int
) -> None:
    assert federation.compose("stop", *NODES[len(SITES) :]).returncode == 0
    up = federation.compose("up", "-d", "--no-deps", "submit", RUN_CONFIG=RUN_CONFIG)
    assert up.returncode == 0, up.stderr[-3000:]
    trained = "round 2: "  # by a ClientApp, when it has loaded the model
    in_round_2 = wait(lambda: trained in federation.logs(*SITES), RUN_TIMEOUT_S)
    assert in_round_2, federation.logs("submit")[-3000:]

    os.kill(power, signal.SIGKILL)
    assert wait(lambda: not Path(f"/proc/{power}").exists())
    assert subprocess.run(["docker", "version"], capture_output=True, check=False).returncode
    boot = [REPOSITORY / ".ci/docker-engine"]
    booted = subprocess.run(boot, check=False, capture_output=True, text=True)
    assert booted.returncode == 0, booted.stderr

    submitted = federation["submit"]
    assert submitted.wait(timeout=RUN_TIMEOUT_S)["StatusCode"] == 0, federation.logs("submit")
    log = federation.logs("submit")
    cut_off, *_ = re.findall(r"submit: run (\d+) started", log)
    # By then Flower may have given its ServerApp up, or does so while it is followed.
    again = f"run {cut_off} (of these settings was cut off; going on|is going on; following)"
    assert re.search(again, log), log
    facts = json.loads(federation.shell("superlink", "cat /results/latest/run.json"))
    assert facts["status"] == "completed"
    assert facts["resumed_from"] == [{"run_id": cut_off, "last_round": 1}]
    lines = federation.shell("superlink", "cat /results/latest/metrics.jsonl").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    containers = federation.containers()
    up_again = {name for name, c in containers.items() if c.status == "running"}
    assert up_again == {"superlink", "serverapp", "page", *SITES}  # what was stopped stays stopped

    score = ("--profile", "eval", "run", "--rm", "eval", "--limit", "2")
    done = federation.compose(*score, EVAL_DATASETS="demo-yesno")
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout.rsplit("report: ", 1)[1].strip().replace(".html", ".json")
    scored = json.loads(federation.shell("superlink", f"cat {report}"))
    assert [subject["name"] for subject in scored["subjects"]] == ["base", "peft_2"]
