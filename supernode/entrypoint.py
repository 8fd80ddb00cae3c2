"""Start this site's SuperNode from its environment: all its flags are here.

| variable     | default          | what                                                     |
|--------------|------------------|----------------------------------------------------------|
| SITE_DIR     | (required)       | supernode.key, superlink-ca.crt, site.env, data/, state/ |
| MODELS_DIR   | (required)       | prepared base models, read-only                          |
| DEVICE       | cuda             | cuda or cpu                                              |
| SUPERNODE_GPU| partition mod GPUs | index of the GPU among the visible ones                |
| DATA_COLUMNS | (none)           | QUESTION,ANSWER: columns of data/ with names of their own |
| LOCK_DIR     | (required)       | shared by the SuperNodes of a host: one computes a GPU   |
| SUPERLINK, PARTITION_ID, NUM_PARTITIONS | from site.env | set them only to override it   |
| RUNTIME_PORT | 9094             | ClientApp process, on 127.0.0.1 only                     |
| HEALTH_PORT  | (none)           | liveness, on 127.0.0.1 only                              |
| APP_SHA256   | from app.sha256  | the app that runs may bring; app.sha256 is the image's   |
| ALLOW_APP_UPDATES | (none)      | 1: run whatever app a run brings                         |
| PYTHONWARNINGS | ignore         | default: the log also holds what libraries warn of       |
| WARM_S       | 600              | idle seconds that the loaded libraries are kept; 0: not at all |
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supernode import verify
from supernode.gpus import set_gpu
from supernode.node_log import QUIET, Joining, plain
from supernode.own_folder import own_folder
from supernode.pinned import ANY, UNCHECKED
from supernode.reach import direct, parsed, why_not
from supernode.site_env import read_site

STOP_AFTER_S = 10
EX_TEMPFAIL = 75
# A SuperNode that was killed counts as online for a minute, and its successor is refused.
ACTIVATION_TIMEOUT_S, ACTIVATION_PAUSE_S = 75, 10
WARM_PROGRAMS = Path(__file__).parent / "warm" / "bin"

NOT_ACTIVATED = "Failed to activate SuperNode"
# Then Flower tries again. At a good start its own processes say it of each other, once or twice.
AWAY, SAID_AFTER = "Connection attempt failed", 4
# What Flower gives as the reason when joining can't work, and what to tell the hospital. Flower
# itself would go on running without ever working, so that no restart policy could help. The first
# sign in a reason counts; of TLS, what is seen by then is told.
HOPELESS = {
    NOT_ACTIVATED: "the SuperLink does not know this site's key (its operator must run "
    "superlink.register with this site's .pub file), or the key was revoked (superlink.provision "
    "rotate makes a new one), or another process of this site still counts as online",
    "certificate has expired": "the SuperLink's certificate has expired (its operator must run "
    "superlink.provision renew and restart the SuperLink), or the CA's in superlink-ca.crt has "
    "(get a new one), or this host's clock is wrong",
    "Tls handshake failed": "the SuperLink's certificate was not issued by the CA in "
    "superlink-ca.crt, or not for this address; get a new site kit",
}
REFUSED = (
    "the SuperLink refuses this site's key: it was revoked or replaced while the SuperNode ran "
    "(ask the operator for a new supernode.key), or this host's clock is ahead of the SuperLink's"
)


def pinned_app(env: dict[str, str]) -> str:
    """SHA-256 of the only app that this site runs; empty if it runs any.

    Raises:
        SystemExit: neither is said.
    """
    allowed = env.get("ALLOW_APP_UPDATES", "")
    if allowed not in ("", "0", "1"):
        raise SystemExit(f"supernode: ALLOW_APP_UPDATES={allowed}: 1, or leave it out")
    if allowed == "1":
        print(f"supernode: WARNING: {UNCHECKED}", file=sys.stderr, flush=True)
        return ""
    stored = Path(__file__).parents[1] / "app.sha256"
    pin = env.get("APP_SHA256") or (stored.read_text().strip() if stored.is_file() else "")
    if not re.fullmatch(r"[0-9a-f]{64}", pin):
        raise SystemExit(
            f"supernode: APP_SHA256={pin!r} is no SHA-256 (python -m supernode.pinned hash FOLDER "
            "prints that of a checkout's app); ALLOW_APP_UPDATES=1 runs whatever comes"
        )
    return pin


def command(env: dict[str, str]) -> list[str]:
    """The SuperNode's command line; TLS and authentication are no options."""
    pin, site_name = pinned_app(env), f"site-{int(env['PARTITION_ID']):02d}"
    site = Path(env["SITE_DIR"])
    partition, partitions = int(env["PARTITION_ID"]), int(env["NUM_PARTITIONS"])
    health = env.get("HEALTH_PORT")
    return [
        sys.executable, "-m", "supernode.pinned", "run", pin or ANY, site_name,
        "--superlink", env["SUPERLINK"],
        "--root-certificates", str(site / "superlink-ca.crt"),
        "--auth-supernode-private-key", str(site / "supernode.key"),
        "--node-config", f"partition-id={partition} num-partitions={partitions}",
        "--host", "127.0.0.1", "--port", env.get("RUNTIME_PORT") or "9094",
        *(["--health-server-address", f"127.0.0.1:{health}"] if health else []),
    ]  # fmt: skip


@contextmanager
def warm_client_apps(env: dict[str, str]) -> Iterator[None]:
    """Have the ClientApps forked from a process that has the libraries (``supernode.warm``).

    Its socket lies in a folder that is this user's and this SuperNode's alone.

    Raises:
        SystemExit: WARM_S is no number of seconds.
    """
    seconds = env.get("WARM_S") or "600"
    if not re.fullmatch(r"\d{1,7}", seconds):
        raise SystemExit(
            f"supernode: WARM_S={seconds}: whole seconds, or 0 so that every ClientApp loads its "
            "libraries anew"
        )
    if seconds == "0" or sys.platform != "linux":
        yield
        return
    with own_folder() as folder:
        env["PATH"] = f"{WARM_PROGRAMS}{os.pathsep}{env['PATH']}"
        env |= {"WARM_S": seconds, "WARM_SOCKET": f"{folder}/warm.socket"}
        yield


def main() -> int:
    env = QUIET | read_site(dict(os.environ))
    env |= direct(env, parsed(env["SUPERLINK"])[0])
    device = env["DEVICE"] = env.get("DEVICE") or "cuda"
    if device == "cuda":
        set_gpu(env)
    elif device == "cpu":
        # Threads that wait for each other spin for milliseconds, which is ten times slower where
        # others use the cores as well (tests/benchmarks/wait_policy.py).
        env.setdefault("GOMP_SPINCOUNT", "1000")
    else:
        raise SystemExit(f"supernode: DEVICE={device}: cuda or cpu")
    programs = Path(sys.executable).parent  # Flower starts flower-superexec by its bare name
    env |= {
        "PATH": f"{programs}{os.pathsep}{env.get('PATH', os.defpath)}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",  # the base model is prepared; nothing is fetched during a run
        "TOKENIZERS_PARALLELISM": "false",
        # bitsandbytes would load torch's compiler, 1 s of a CPU, for an operation not used here.
        "TORCHDYNAMO_DISABLE": "1",
        "MODELS_VERIFIED": str(verify.start(Path(env["MODELS_DIR"]))),
    }
    env["APPS_SEEN"] = str(Path(env["MODELS_VERIFIED"]).with_name("apps-seen.json"))
    argv = command(env)
    deadline = time.monotonic() + ACTIVATION_TIMEOUT_S
    with warm_client_apps(env):
        while True:
            code = watch(argv, env)
            if code != EX_TEMPFAIL or time.monotonic() > deadline:
                return code
            time.sleep(ACTIVATION_PAUSE_S)


def _why_not(env: dict[str, str]) -> str:
    address = env["SUPERLINK"]
    reason = why_not(address, Path(env["SITE_DIR"]) / "superlink-ca.crt", env)
    return reason and f"no connection to the SuperLink at {address}: {reason}"


def watch(argv: list[str], env: dict[str, str]) -> int:
    """Run the SuperNode, pass its log on as plain text, and end it when it cannot join.

    Returns its exit code; EX_TEMPFAIL if it was not activated, 1 if it can never connect or was
    shut out.
    """
    started: list[subprocess.Popen[str]] = []
    hopeless: list[str] = []
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        for node in started:
            node.terminate()
            late = threading.Timer(STOP_AFTER_S, node.kill)
            late.daemon = True
            late.start()

    def forward() -> None:
        joining, away = Joining(), 0
        for line in map(plain, started[0].stdout or ()):
            print(line, end="", flush=True)
            reason = joining.reason(line)
            away += AWAY in line
            if AWAY in line and away == SAID_AFTER and (seen := _why_not(env)):
                print(f"supernode: {seen}; trying on", flush=True)
            for sign, advice in HOPELESS.items():
                if sign in reason and not hopeless:
                    told = (sign != NOT_ACTIVATED and _why_not(env)) or advice
                    print(f"supernode: ERROR: {told}", file=sys.stderr, flush=True)
                    hopeless.append(sign)
                    stop()

    # Before there is a SuperNode: it would outlive this process.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    node = subprocess.Popen(
        argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    started.append(node)
    if asked:
        stop()
    # In a thread: Flower's child processes keep the pipe open until they see that the SuperNode
    # is gone, and it is gone for them only when it has been waited for.
    reader = threading.Thread(target=forward, daemon=True)
    reader.start()
    # Nor in one wait here: a signal that comes just before it would be looked at after it.
    waiting = threading.Thread(target=node.wait, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(1)
    code = node.returncode
    reader.join(timeout=2)  # with STOP_AFTER_S well within a container's 15 s
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hopeless:
        return EX_TEMPFAIL if hopeless == [NOT_ACTIVATED] else 1
    if code != os.EX_NOPERM:
        return code
    if asked:  # it could not sign off
        return 0
    print(f"supernode: ERROR: {REFUSED}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
