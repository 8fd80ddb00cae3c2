"""A host with GPUs, rehearsed without one: compose.yaml as it is, on an engine that grants GPUs.

What the engine needs for that: .ci/docker-engine. It turns SuperNodes of the federation that all
these tests share into such with a GPU, and comes last.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.containers.conftest import NODES, Federation

REHEARSED = NODES[:5]
# As on a host with four, so that the fifth site shares the first.
NVIDIA_SMI = """#!/bin/sh
case "$1" in
  -L) for n in 0 1 2 3; do echo "GPU $n: NVIDIA Stand-in (UUID: GPU-$n)"; done ;;
  *) echo 550.54.15, 24000 ;;
esac
"""


@pytest.fixture(scope="module")
def gpu_host(federation: Federation) -> Federation:
    """The same project by compose.yaml alone, where the engine grants GPUs and there are none."""
    image = f"fedllm-medical/supernode:{os.environ.get('TAG', '0.1.0')}"
    run = ["docker", "run", "--rm", "--gpus", "all", "--network", "none", image]
    tried = subprocess.run([*run, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        why = f"this engine grants no GPUs: {tried.stderr.strip()[-200:]}"
        assert not os.environ.get("REQUIRE_DOCKER"), why
        pytest.skip(why)
    if not subprocess.run([*run, "nvidia-smi"], capture_output=True, check=False).returncode:
        pytest.skip("this host has GPUs: no rehearsal")
    env = {
        "MODEL_NAME": "HuggingFaceTB/SmolLM2-135M-Instruct", "DATA_SOURCE": "bundled",
        "PROFILE": "demo",
    }  # fmt: skip
    return Federation(federation.project, federation.env | env, ("compose.yaml",))


def refused(host: Federation) -> tuple[str, dict[str, str]]:
    """Submit a run that must end in the preflight: its output, and the reason of each site."""
    nodes = sum(c.status == "running" and n in NODES for n, c in host.containers().items())
    config = f"RUN_CONFIG=strategy.min-nodes={nodes} strategy.require-all-nodes=true"
    config += ' resume="0"'  # a run of its own, though the test before has just had one
    done = host.compose("run", "--rm", "--no-deps", "-e", config, "submit")
    output = done.stdout + done.stderr
    assert done.returncode == 1, output[-3000:]
    assert "training at" not in output
    reasons: dict[str, str] = {}
    for site, why in re.findall(r"^\s+(site-\d\d): (.*?)\s*$", output, re.MULTILINE):
        assert reasons.setdefault(site, why) == why  # in the log, and in the run's status
    return output, reasons


def test_supernodes_share_four_gpus_out_and_what_torch_cannot_use_is_refused_by_the_preflight(
    gpu_host: Federation, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    mount = {"volumes": [f"{program}:/usr/local/bin/nvidia-smi:ro"]}
    override = tmp_path / "nvidia-smi.yaml"
    override.write_text(json.dumps({"services": dict.fromkeys(REHEARSED, mount)}))
    host = Federation(gpu_host.project, gpu_host.env, ("compose.yaml", str(override)))
    up = host.compose("up", "-d", "--no-deps", *REHEARSED)
    assert up.returncode == 0, up.stderr[-3000:]
    output, reasons = refused(host)
    assert set(reasons) == {f"site-{n:02d}" for n in range(5)}, output[-3000:]
    for number, name in enumerate(REHEARSED):
        assert f"supernode: GPU {number % 4}, one of 4\n" in host.logs(name)
        assert re.fullmatch(
            rf"DEVICE=cuda, but torch cannot use GPU {number % 4}: torch \S+ "
            r"(is built for the CPU|finds no GPU.*); mend that, or set DEVICE=cpu",
            reasons[f"site-{number:02d}"],
        )


def test_supernodes_that_see_no_gpu_come_online_and_the_preflight_says_why_no_run_starts(
    gpu_host: Federation,
) -> None:
    up = gpu_host.compose("up", "-d", "--no-deps", *REHEARSED)
    assert up.returncode == 0, up.stderr[-3000:]
    output, reasons = refused(gpu_host)
    assert set(reasons) == {f"site-{n:02d}" for n in range(5)}, output[-3000:]
    (why,) = set(reasons.values())
    assert why.startswith("DEVICE=cuda but no NVIDIA GPU is visible here; ")
    containers = gpu_host.containers()
    assert {containers[n].attrs["RestartCount"] for n in REHEARSED} == {0}
    assert f"supernode: ERROR: {why}; no run can start with it\n" in gpu_host.logs("supernode-00")
