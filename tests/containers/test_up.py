"""`docker compose up` with all 20 SuperNodes on the CPU and the real 135M-parameter model."""

import http.client
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.conftest import NODES, Federation, wait


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
    run_page = page.replace("/eval/", "/")  # written again by itself, with what was scored
    assert wait(lambda: "The whole report" in federation.shell("superlink", f"cat {run_page}"))


def test_an_adapter_is_taken_home_with_the_evaluations_container(
    federation: Federation, tmp_path: Path
) -> None:
    """Merged and as it is; both out of the one folder where it may write."""
    for to, more in (("/results/latest/eval/mine", ()), ("/results/latest/eval/one", ("--merge",))):
        words = ("eval", "export", "--round", "best", "--to", to, *more)
        done = _eval(federation, "--no-deps", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        copied = federation.compose("cp", f"superlink:{to}", str(tmp_path))
        assert copied.returncode == 0, copied.stderr
    assert "by several sites: a LoRA adapter" in (tmp_path / "mine" / "README.md").read_text()
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "one").iterdir()}
    refused = _eval(federation, "--no-deps", "eval", "export", "--to", "/results/mine")
    assert refused.returncode == 1
    assert "cannot write /results/mine: Permission denied" in refused.stderr


def test_the_results_can_be_copied_out(federation: Federation, tmp_path: Path) -> None:
    done = federation.compose("cp", "superlink:/results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    latest = (tmp_path / "results" / "latest").readlink().name
    assert (tmp_path / "results" / latest / "peft_1" / "adapter_model.safetensors").is_file()


def test_this_host_sees_the_run_on_its_page_which_is_a_file_by_itself_and_by_a_command(
    federation: Federation,
) -> None:
    run_id = federation.shell("superlink", "readlink /results/latest").strip()
    asked = http.client.HTTPConnection("127.0.0.1", int(federation.env["PAGE_PORT"]), timeout=60)
    asked.request("GET", f"/runs/{run_id}")
    html = asked.getresponse().read().decode()
    assert "fine-tuned by 20 sites together" in html
    assert "1 of 1" in html
    assert "site-19</th>" in html
    file = f"/results/{run_id}/report.html"
    assert wait(lambda: "site-19</th>" in federation.shell("superlink", f"cat {file}"))
    report = ("run", "--rm", "--no-deps", "-T", "serverapp", "python3", "-m")
    done = federation.compose(*report, "superlink.page", "report", run_id)
    assert done.stdout.strip() == file, done.stderr
    refused = federation.shell("page", f"touch /results/{run_id}/x")
    assert "Read-only file system" in refused


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


@pytest.fixture
def bare_engine(tmp_path: Path) -> Iterator[str]:
    """The address of another engine, with nothing in it, and without what grants GPUs."""
    dockerd = shutil.which("dockerd") or "/usr/local/lib/fedllm-engine/usr/sbin/dockerd"
    if os.getuid() or not Path(dockerd).is_file():
        pytest.skip("only root can start another engine")
    if shutil.which("nvidia-container-runtime-hook"):
        pytest.skip("this host has the NVIDIA container toolkit")
    with tempfile.TemporaryDirectory(prefix="engine") as folder:  # a socket's path must be short
        places = [f"--{n}-root={folder}/{n}" for n in ("data", "exec")]
        address = f"unix://{folder}/sock"
        # In a network of its own, or it would take docker0 away from the other engine.
        command = [
            "unshare",
            "--net",
            dockerd,
            *places,
            f"--pidfile={folder}/pid",
            "-H",
            address,
            "--bridge=none",
        ]
        command += ["--iptables=false", "--ip6tables=false"]
        with (tmp_path / "log").open("w") as log:
            there = Path(dockerd).parent  # and its helpers
            programs = [str(there), str(there.with_name("bin")), os.environ["PATH"]]
            env = os.environ | {"PATH": os.pathsep.join(programs)}
            engine = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        try:
            asked = ["docker", "-H", address, "version"]
            deadline = time.monotonic() + 60
            while subprocess.run(asked, capture_output=True, check=False).returncode:
                assert engine.poll() is None, (tmp_path / "log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield address
        finally:
            engine.terminate()
            engine.wait(60)


def test_up_without_gpu_says_that_the_driver_is_missing(bare_engine: str) -> None:
    image = f"fedllm-medical/eval:{os.environ.get('TAG', '0.1.0')}"
    nothing = bytes(1024)  # an empty tar
    load = ["docker", "-H", bare_engine, "import", "--change", 'CMD ["true"]', "-", image]
    subprocess.run(load, input=nothing, check=True, capture_output=True)
    other = Federation("fedllm-gpu", {"DOCKER_HOST": bare_engine}, ("compose.yaml",))
    try:
        done = other.compose("--profile", "eval", "up", "-d", "--no-deps", "--no-build", "eval")
    finally:
        other.compose("--profile", "eval", "down", "-v")
    assert done.returncode != 0
    assert "could not select device driver" in done.stderr
