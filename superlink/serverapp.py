"""Start what runs ServerApps in a container of their own, from its environment.

| variable        | default    | what                                                   |
|-----------------|------------|--------------------------------------------------------|
| SERVERAPP_DIR   | (required) | ca.crt, runtime.secret, from provision                 |
| RUNTIME_ADDRESS | (required) | the SuperLink's Runtime API, host:port (HTTP, TLS)     |
| RESULTS_DIR     | (required) | where a ServerApp writes checkpoints                   |
| SITES_DIR       | (required) | sites.json, from register: who is who                  |
| HEALTH_PORT     | 9195       | liveness, on 127.0.0.1 only                            |

A ServerApp is code that somebody submitted. Here it sees neither the SuperLink's key nor its
database, and reaches nothing but the SuperLink. Whoever may write results is here, so the page of a
run that has ended (report.html) is written here as well.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

from superlink import link_log
from superlink.page.reports import Reports
from supernode.reach import AddressError, direct, parsed

STOP_AFTER_S = 10


def arguments(env: dict[str, str]) -> list[str]:
    """The command line of flower-superexec. TLS and its secret are no options.

    Raises:
        SystemExit: a setting or file is missing or cannot be used; the message names it.
    """
    for name in ("SERVERAPP_DIR", "RUNTIME_ADDRESS", "RESULTS_DIR", "SITES_DIR"):
        if not env.get(name):
            raise SystemExit(f"serverapp: {name} is not set")
    try:
        parsed(env["RUNTIME_ADDRESS"])
    except AddressError as err:
        raise SystemExit(f"serverapp: RUNTIME_ADDRESS: {err}") from None
    own, results = Path(env["SERVERAPP_DIR"]), Path(env["RESULTS_DIR"])
    for file in ("ca.crt", "runtime.secret"):
        if not os.access(own / file, os.R_OK):
            raise SystemExit(
                f"serverapp: {own / file} is missing or not readable by user {os.getuid()}; run "
                "superlink.provision first"
            )
    if not os.access(results, os.W_OK):
        raise SystemExit(
            f"serverapp: RESULTS_DIR={results} cannot be written by user {os.getuid()}; change the "
            "owner of a folder of this host, or (a volume of an older version): docker compose "
            f"run --rm --no-deps --user 0 --cap-add CHOWN serverapp chown {os.getuid()} {results}"
        )
    return [
        str(link_log.PROGRAMS / "flower-superexec"),
        "--plugin-type", "serverapp",
        "--runtime-api-address", env["RUNTIME_ADDRESS"],
        "--root-certificates", str(own / "ca.crt"),
        "--superexec-auth-secret-file", str(own / "runtime.secret"),
        "--health-server-address", f"127.0.0.1:{env.get('HEALTH_PORT', '9195')}",
    ]  # fmt: skip


def _children(pid: int) -> set[int]:
    """Its processes that have not ended."""
    alive = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            try:
                state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if state != "Z":
                alive.add(int(child))
    return alive


def main() -> int:
    argv = arguments(dict(os.environ))
    env = (
        os.environ
        | direct(os.environ, parsed(os.environ["RUNTIME_ADDRESS"])[0])
        | {
            "PATH": link_log.path(),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
    )
    reports = Reports(Path(os.environ["RESULTS_DIR"]))
    Thread(target=reports.keep, daemon=True).start()
    superexec = subprocess.Popen(argv, env=env)

    def stop(*_: object) -> None:
        # The ServerApps first, while there is somebody to tell: or run.json would say "running"
        # for ever. A container ends with its first process.
        deadline, told = time.monotonic() + STOP_AFTER_S, set[int]()
        while (left := _children(superexec.pid)) and time.monotonic() < deadline:
            for child in left - told:
                os.kill(child, signal.SIGTERM)
            told |= left
            time.sleep(0.1)
        superexec.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    code = superexec.wait()
    reports.write()  # of what has ended with it
    return code


if __name__ == "__main__":
    sys.exit(main())
