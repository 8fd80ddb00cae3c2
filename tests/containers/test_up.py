"""`docker compose up` with all 20 SuperNodes on the CPU and the real 135M-parameter model."""

import json
import re
import subprocess

import docker
import pytest

from tests.containers.conftest import NODES, Federation


def test_the_job_succeeds_and_its_container_says_so(federation: Federation) -> None:
    state = federation["submit"].attrs["State"]
    assert state["ExitCode"] == 0, federation.logs("submit")
    assert "20 sites ready" in federation.logs("submit")


def test_all_20_supernodes_are_up_and_healthy(federation: Federation) -> None:
    containers = federation.containers()
    states = {n: containers[n].attrs["State"]["Health"]["Status"] for n in NODES}
    assert set(states.values()) == {"healthy"}, states
    assert {containers[n].attrs["RestartCount"] for n in NODES} == {0}


def _eval(federation: Federation, *arguments: str) -> subprocess.CompletedProcess[str]:
    return federation.compose("--profile", "eval", "run", "--rm", *arguments)


def test_the_evaluation_scores_base_and_final_adapter(federation: Federation) -> None:
    done = _eval(federation, "eval", "--limit", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    page = done.stdout.rsplit("report: ", 1)[1].strip()
    assert re.fullmatch(r"/results/\d+/eval/report.html", page)
    read = _eval(federation, "--entrypoint", "cat", "eval", page.replace(".html", ".json"))
    report = json.loads(read.stdout)
    assert [s["name"] for s in report["subjects"]] == ["base", "peft_1"]
    for subject in report["subjects"]:
        assert {d: s["n"] for d, s in subject["scores"].items()} == {
            "demo-yesno": 6, "demo-four": 6, "demo-five": 6,
        }  # fmt: skip
    assert report["model"]["kind"] == "fp4"
    assert [line["round"] for line in report["rounds"]] == [1]


def test_the_evaluation_cannot_change_an_adapter(federation: Federation) -> None:
    tries = "cd /results/latest && for f in run.json peft_1/round.json new peft_1/new ../new "
    tries += "/models/new /cache/new /opt/fedllm-medical/new; do "
    tries += "(echo x >> $f) 2>/dev/null && echo wrote $f; done; for c in 'rm -f run.json' "
    tries += "'mv peft_1 gone' 'ln -sfn / ../latest' 'rmdir eval'; do $c 2>/dev/null && echo $c; "
    tries += "done; echo x > eval/new && echo allowed"
    done = _eval(federation, "--entrypoint", "sh", "eval", "-c", tries)
    assert done.stdout.split() == ["allowed"], done.stderr


def test_a_supernode_sees_its_own_site_only(federation: Federation) -> None:
    seen = federation["supernode-07"].exec_run(["ls", "-A", "/site", "/federation"])
    assert "supernode.key" in seen.output.decode()
    assert "ca.key" not in seen.output.decode()
    settings = federation["supernode-07"].exec_run(["cat", "/site/site.env"]).output.decode()
    assert "PARTITION_ID=7\n" in settings
    written = federation["supernode-07"].exec_run(["touch", "/models/x"])
    assert written.exit_code != 0  # read-only


def test_the_superlink_image_holds_no_torch(federation: Federation) -> None:
    found = federation["superlink"].exec_run(["python3", "-c", "import torch"])
    assert b"No module named 'torch'" in found.output


def test_a_refused_run_config_gives_one_line_and_exit_code_1(federation: Federation) -> None:
    wrong = "RUN_CONFIG=strategy.fraction-train=0"
    done = federation.compose("run", "--rm", "-e", wrong, "submit")
    assert done.returncode == 1
    assert "strategy.fraction-train = 0 must be a number above 0, at most 1" in done.stderr


def test_up_without_gpu_says_that_the_driver_is_missing(federation: Federation) -> None:
    if "nvidia" in docker.from_env().info().get("Runtimes", {}):
        pytest.skip("this host has the NVIDIA runtime")
    other = Federation(f"{federation.project}-gpu", federation.env, ("compose.yaml",))
    try:
        assert other.compose("run", "--rm", "-T", "provision").returncode == 0
        done = other.compose("up", "-d", "--no-deps", "prepare")
        assert done.returncode != 0
        assert "could not select device driver" in done.stderr
    finally:
        other.compose("down", "-v")
