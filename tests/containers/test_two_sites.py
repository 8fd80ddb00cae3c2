"""A federation of two sites, beside that of twenty."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from superlink.onehost.processes import free_port
from tests.containers.conftest import (
    CPU,
    GIVEN_UP_AFTER_S,
    NODES,
    ONLINE_TIMEOUT_S,
    RUN_TIMEOUT_S,
    Federation,
    crash,
    ended,
    is_back,
    online_since,
    restarts,
    wait,
)

FEW = """
volumes:
  results: {driver_opts: {type: tmpfs, device: tmpfs, o: "size=256m,uid=10003,gid=10001"}}
"""


@pytest.fixture(scope="module")
def few(images: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """SuperLink and two SuperNodes; their results have 256 MiB."""
    file = tmp_path_factory.mktemp("few") / "few.yaml"
    file.write_text(FEW)
    env = {"FLEET_PORT": str(free_port()), "CONTROL_PORT": str(free_port())}
    made = Federation(f"fedllm-few-{os.getpid()}", env, (*CPU, str(file)))
    try:
        up = made.compose("up", "-d", "serverapp", *NODES[:2])
        assert up.returncode == 0, up.stderr[-3000:]
        yield made
    finally:
        made.compose("down", "-v")
        ended(Path(__file__).name, tmp_path_factory).touch()


def test_a_full_results_volume_ends_the_run_with_one_line(few: Federation) -> None:
    filled = few.shell("serverapp", "dd if=/dev/zero of=/results/filler bs=64k")
    assert "No space left on device" in filled
    few.shell("serverapp", "truncate -s -128K /results/filler")  # room for run.json
    run_config = "num-server-rounds=1 strategy.min-nodes=2 strategy.min-train-nodes=2"
    done = few.compose("run", "--rm", "-T", "submit", RUN_CONFIG=run_config)
    few.shell("serverapp", "rm /results/filler")
    assert done.returncode == 1
    lines = [x for x in done.stdout.splitlines() if x.startswith("submit: run") and "failed" in x]
    assert len(lines) == 1, done.stdout + done.stderr
    assert "1 checkpoints need" in lines[0]
    assert "0 MiB are free; make room or set RESULTS_DIR to another disk" in lines[0]


def test_after_a_reboot_in_any_order_the_nodes_find_the_superlink(
    few: Federation, tmp_path: Path
) -> None:
    """At boot the engine starts what ran, without compose and its order."""
    containers = few.containers()
    for name in ("superlink", "serverapp", *NODES[:2]):
        containers[name].stop()
    stopped = time.time()
    for name in ("serverapp", *NODES[:2]):
        containers[name].start()

    def looked_in_vain(node: str) -> bool:
        return b"Connection attempt failed" in containers[node].logs(since=stopped)

    assert wait(lambda: all(map(looked_in_vain, NODES[:2])))
    containers["superlink"].start()
    control = few.control(few.public(tmp_path))
    control.wait_until_up(ONLINE_TIMEOUT_S)
    assert wait(lambda: online_since(control, stopped) == 2, ONLINE_TIMEOUT_S)


def test_a_clientapp_that_runs_out_of_memory_misses_the_round_and_no_more(few: Federation) -> None:
    few["supernode-01"].update(mem_limit="800m", memswap_limit="800m")
    run_config = "num-server-rounds=1 strategy.min-nodes=2 strategy.min-train-nodes=2 "
    run_config += (
        "strategy.min-replies=1 strategy.fraction-evaluate=0.0 train.training-arguments.max-steps=1"
    )
    done = few.compose("run", "--rm", "-T", "submit", RUN_CONFIG=run_config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    line = json.loads(few.shell("superlink", "cat /results/latest/metrics.jsonl"))
    assert line["partitions"] == [0]
    assert list(line["rejected"]) == ["site-01"]
    assert "ClientApp stopped responding" in line["rejected"]["site-01"]
    # cgroup version 2 or 1
    files = "/sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control"
    events = few.shell("supernode-01", f"cat {files} 2>/dev/null").splitlines()
    assert int(dict(x.split() for x in events)["oom_kill"]) >= 1
    assert restarts(few, "supernode-01") == (0, "running")


def test_a_run_whose_submit_and_then_superlink_are_killed_comes_to_its_end(few: Federation) -> None:
    """The second submit finds the run going on, and resumes it when the SuperLink was away."""
    few["supernode-01"].update(mem_limit="4g", memswap_limit="4g")
    run_config = "num-server-rounds=5 strategy.min-nodes=2 strategy.min-train-nodes=2 "
    run_config += "strategy.fraction-evaluate=0.0 train.training-arguments.max-steps=1"

    def up_and_wait_for(line: str) -> None:
        up = few.compose("up", "-d", "--no-deps", "submit", RUN_CONFIG=run_config)
        assert up.returncode == 0, up.stderr[-3000:]
        assert wait(lambda: line in few.logs("submit"), ONLINE_TIMEOUT_S), few.logs("submit")

    def rounds() -> list[int]:
        """Those that are done, wherever the log of them went meanwhile."""
        lines = few.shell("serverapp", "cat /results/latest/metrics.jsonl").splitlines()
        return [json.loads(x)["round"] for x in lines]

    up_and_wait_for("[round 2/5] training at")
    few["submit"].kill()
    up_and_wait_for("is going on; following it")
    crash(few, "superlink")  # back in seconds: the ServerApp, in its own container, goes on
    assert wait(lambda: is_back(few, "superlink"))
    assert wait(lambda: 2 in rounds(), RUN_TIMEOUT_S)
    few["superlink"].stop()
    time.sleep(GIVEN_UP_AFTER_S)
    done = rounds()
    assert len(done) < 5  # or there is nothing to resume
    few["superlink"].start()
    assert few["submit"].wait(timeout=RUN_TIMEOUT_S)["StatusCode"] == 0, few.logs("submit")[-3000:]
    facts = json.loads(few.shell("superlink", "cat /results/latest/run.json"))
    assert facts["status"] == "completed"
    assert facts["resumed_from"][-1]["last_round"] == done[-1]
    print(f"resumed {len(facts['resumed_from'])} times")  # once, where a crash takes no minute
    assert rounds() == [1, 2, 3, 4, 5]
    assert "flwr-serverapp" not in few.shell("serverapp", "cat /proc/[0-9]*/cmdline 2>/dev/null")
