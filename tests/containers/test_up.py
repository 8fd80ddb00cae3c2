"""`docker compose up` with all 20 SuperNodes on the CPU and the real 135M-parameter model."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest

from superlink.processes import free_port
from tests.containers.conftest import compose
from tests.containers.test_compose_file import CPU, NODES

PROJECT = f"fedllm-test-{os.getpid()}"
RUN_CONFIG = (
    "num-server-rounds=1 train.training-arguments.max-steps=2 strategy.min-evaluate-nodes=1"
)
START_TIMEOUT_S, RUN_TIMEOUT_S = 600, 900


@pytest.fixture(scope="module")
def federation() -> Iterator[dict[str, Any]]:
    """All containers of one `up -d`, by service, when the job has ended."""
    ports = {"FLEET_PORT": str(free_port()), "CONTROL_PORT": str(free_port())}
    env = {"RUN_CONFIG": RUN_CONFIG, **ports}
    built = compose("--profile", "eval", "build", files=CPU, project=PROJECT)
    assert built.returncode == 0, built.stderr[-3000:]
    try:
        started = time.monotonic()
        up = compose("up", "-d", files=CPU, project=PROJECT, **env)
        assert up.returncode == 0, up.stderr[-3000:] + _logs("prepare")
        print(f"up -d: {time.monotonic() - started:.0f} s")
        containers = _containers()
        containers["submit"].wait(timeout=RUN_TIMEOUT_S)
        print(f"job ended after {time.monotonic() - started:.0f} s")
        yield _containers()
    finally:
        compose("--profile", "eval", "down", "-v", files=CPU, project=PROJECT)


def _containers() -> dict[str, Any]:
    client = docker.from_env()
    label = f"com.docker.compose.project={PROJECT}"
    found = client.containers.list(all=True, filters={"label": label})
    return {c.labels["com.docker.compose.service"]: c for c in found}


def _logs(*services: str) -> str:
    return compose("logs", "--no-log-prefix", *services, files=CPU, project=PROJECT).stdout[-3000:]


def test_the_job_succeeds_and_its_container_says_so(federation: dict[str, Any]) -> None:
    state = federation["submit"].attrs["State"]
    assert state["ExitCode"] == 0, _logs("submit")
    assert "20 sites ready" in _logs("submit")


def test_all_20_supernodes_are_up_and_healthy(federation: dict[str, Any]) -> None:
    states = {n: federation[n].attrs["State"]["Health"]["Status"] for n in NODES}
    assert set(states.values()) == {"healthy"}, states
    assert {federation[n].attrs["RestartCount"] for n in NODES} == {0}


def _eval(*arguments: str) -> subprocess.CompletedProcess[str]:
    return compose("--profile", "eval", "run", "--rm", *arguments, files=CPU, project=PROJECT)


def test_the_evaluation_scores_base_and_final_adapter(federation: dict[str, Any]) -> None:
    done = _eval("eval", "--limit", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    page = done.stdout.rsplit("report: ", 1)[1].strip()
    assert re.fullmatch(r"/results/\d+/eval/report.html", page)
    read = _eval("--entrypoint", "cat", "eval", page.replace(".html", ".json"))
    report = json.loads(read.stdout)
    assert [s["name"] for s in report["subjects"]] == ["base", "peft_1"]
    for subject in report["subjects"]:
        assert {d: s["n"] for d, s in subject["scores"].items()} == {
            "demo-yesno": 6, "demo-four": 6, "demo-five": 6,
        }  # fmt: skip
    assert report["model"]["kind"] == "fp4"
    assert [line["round"] for line in report["rounds"]] == [1]


def test_the_evaluation_cannot_change_an_adapter(federation: dict[str, Any]) -> None:
    tries = "cd /results/latest && for f in run.json peft_1/round.json new peft_1/new ../new "
    tries += "/models/new /cache/new /opt/fedllm-medical/new; do "
    tries += "(echo x >> $f) 2>/dev/null && echo wrote $f; done; for c in 'rm -f run.json' "
    tries += "'mv peft_1 gone' 'ln -sfn / ../latest' 'rmdir eval'; do $c 2>/dev/null && echo $c; "
    tries += "done; echo x > eval/new && echo allowed"
    done = _eval("--entrypoint", "sh", "eval", "-c", tries)
    assert done.stdout.split() == ["allowed"], done.stderr


def test_a_supernode_sees_its_own_site_only(federation: dict[str, Any]) -> None:
    seen = federation["supernode-07"].exec_run(["ls", "-A", "/site", "/federation"])
    assert "supernode.key" in seen.output.decode()
    assert "ca.key" not in seen.output.decode()
    settings = federation["supernode-07"].exec_run(["cat", "/site/site.env"]).output.decode()
    assert "PARTITION_ID=7\n" in settings
    written = federation["supernode-07"].exec_run(["touch", "/models/x"])
    assert written.exit_code != 0  # read-only


def test_processes_run_as_an_ordinary_user_without_capabilities(
    federation: dict[str, Any],
) -> None:
    for name in ("superlink", "supernode-00"):
        status = federation[name].exec_run(["cat", "/proc/1/status"]).output.decode()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        assert fields["Uid"].split()[0] == "10001"
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
        assert fields["NoNewPrivs"].strip() == "1"


def test_the_superlink_image_holds_no_torch(federation: dict[str, Any]) -> None:
    found = federation["superlink"].exec_run(["python3", "-c", "import torch"])
    assert b"No module named 'torch'" in found.output


def test_a_refused_run_config_gives_one_line_and_exit_code_1(federation: dict[str, Any]) -> None:
    done = compose(
        "run", "--rm", "-e", "RUN_CONFIG=strategy.fraction-train=0", "submit",
        files=CPU, project=PROJECT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "strategy.fraction-train = 0 must be a number above 0, at most 1" in done.stderr


def test_up_without_gpu_says_that_the_driver_is_missing(federation: dict[str, Any]) -> None:
    if "nvidia" in docker.from_env().info().get("Runtimes", {}):
        pytest.skip("this host has the NVIDIA runtime")
    done = compose("up", "-d", "--no-deps", "supernode-00", project=PROJECT)
    assert done.returncode != 0
    assert "could not select device driver" in done.stderr
