"""Flower's SuperExec as it starts ClientApps here: with real forks of a process that has Flower."""

import os
import subprocess
import sys
from pathlib import Path

from tests.samples import REPOSITORY

# Flower's executor is its own; what it starts tells of itself instead of asking a SuperNode.
CODE = """
import os, signal, subprocess, sys, threading, time
from types import SimpleNamespace
from flwr.supercore.constant import TaskType
from flwr.supercore.exit import add_exit_handler, exit_handler, register_signal_handlers
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.superexec.executor.types import ExecutionSpec
from supernode.warm import superexec

def tell():
    print("argv", *sys.argv)
    print("parent", os.getppid(), "name", open("/proc/self/comm").read().strip())
    print("handlers", exit_handler.registered_exit_handlers,
          signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT).__name__)
    sys.exit(int(os.environ.get("STATUS", "3")))

superexec.flwr_clientapp = tell

def flower_superexec():
    print("own", os.getpid(), *sys.argv[1:], flush=True)
    register_signal_handlers(event_type=None, exit_handlers=[lambda: print("the parent's")])
    if os.environ.get("THREAD"):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    subprocess_executor.SubprocessExecutor().launch(
        ExecutionSpec(
            TaskType.CLIENT_APP, "127.0.0.1:1", "t", True, None, False, os.getpid(), False, 1
        )
    )
    if not os.environ.get("THREAD"):
        while superexec._tokens:
            time.sleep(0.01)
        print("lost", *(f for f in os.listdir(os.environ["LOST"]) if f.startswith("lost")))
    while superexec.subprocess._active:
        superexec.subprocess._cleanup()

superexec.flower_superexec = flower_superexec
superexec.main()
"""


def run(tmp_path: Path, **env: str) -> list[str]:
    program = tmp_path / "flwr-clientapp"
    program.write_text('#!/bin/sh\necho "cold $*"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", CODE, "--insecure", "--parent-pid", str(os.getpid())],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin", "FLWR_TELEMETRY_ENABLED": "0",
            "LOST": str(tmp_path), "APPS_SEEN": str(tmp_path / "apps-seen.json"),
            "WARM_SOCKET": str(tmp_path / "nobody.socket"),
        } | env,
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


COMMAND = "--runtime-api-address 127.0.0.1:1 --token t --insecure --parent-pid"


def test_a_clientapp_is_a_fork_that_keeps_nothing_of_its_parents_handlers(tmp_path: Path) -> None:
    own, argv, parent, handlers, lost = run(tmp_path)
    pid = own.split()[1]
    assert own == f"own {pid} --insecure"  # Flower starts no thread to look at a parent
    assert argv == f"argv flwr-clientapp {COMMAND} {pid}"
    assert parent == f"parent {pid} name flwr-clientapp"
    assert handlers == f"handlers [] {0} default_int_handler"
    assert lost.startswith("lost lost-")  # it ended with 3: its SuperNode is to know


def test_one_that_ends_well_is_not_lost(tmp_path: Path) -> None:
    assert run(tmp_path, STATUS="0")[-1] == "lost"


def test_with_another_thread_the_clientapp_is_a_cold_one_and_the_log_says_so(
    tmp_path: Path,
) -> None:
    own, said, cold = run(tmp_path, THREAD="1")
    assert said == "supernode: a cold ClientApp: SuperExec cannot fork: it has 2 threads"
    assert cold == f"cold {COMMAND} {own.split()[1]}"


# What Flower does in SuperExec when its SuperNode no longer answers; the SuperNode ends meanwhile.
ENDING = """
import os, signal, subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, "-c", os.environ["ENDING"], "--parent-pid", str(os.getpid())])
    os.close(1), os.close(2)
    sys.stdin.readline()
    os._exit(0)
from flwr.supercore.exit import register_signal_handlers
from supernode.warm import superexec

def flower_superexec():
    def tell():
        print("ending", flush=True)
        time.sleep(30)
    register_signal_handlers(event_type=None, exit_handlers=[tell])
    os.kill(os.getpid(), signal.SIGINT)

superexec.flower_superexec = flower_superexec
superexec.main()
"""


def test_one_whose_supernode_ends_while_it_ends_itself_writes_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDING], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "FLWR_TELEMETRY_ENABLED": "0", "ENDING": ENDING},
    ) as supernode:  # fmt: skip
        assert supernode.stdout
        said = supernode.stdout.readline()
        # Only SuperExec has these streams: they end with it.
        _, errors = supernode.communicate("end\n", timeout=20)
    assert said == "ending\n", errors
    assert "Traceback" not in errors
