"""Submit a run and stay with it: wait for the nodes, run, follow, and tell the truth.

    python -m superlink.submit [--run-config FILE.toml | 'key=value ...'] ...

The exit code is 0 exactly if the run finished as completed. (``flwr run --stream`` returns 0
even when the ServerApp died.) A run that failed is resumed after its last complete round,
MAX_RESUMES times at most, unless it ended for a reason that would end it again (bad settings, a
site that is not ready, a full disk). Where an earlier submission of this config and this very app
was cut off (a reboot of the host), this one goes on with it: a run that is going on is followed,
one that was cut off is resumed. A run that has completed, or was stopped, is followed by a new one.

Unlike flwr's own --run-config, files and pairs can be mixed; later ones win, RUN_CONFIG (from the
environment) last. CONTROL_ADDRESS and PUBLIC_DIR say where the SuperLink and its keys are.
"""

import argparse
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from app.config import GIVEN_UP, SILENT, ConfigError, merged_config
from superlink import run_view
from superlink.connection import write_connection
from superlink.control import (
    Control,
    ControlError,
    KnownRun,
    RunLostError,
    RunStatus,
    connected,
    public_keys,
)
from supernode.fab import build as build_fab

_POLL_S = 2
_STALLED_AFTER_S = 60  # after this long without another node, say where to look
MAX_RESUMES = 3
PENDING_S = 180
DEAD_AFTER_S = 90  # Flower takes up to 60 s to see that a ServerApp is gone
# compose.yaml's restart policy starts a submission that failed once more, at once: it must not
# repeat a run that has ended for good.
JUST_ENDED_S = 30
_RAISED = "ServerApp failed with exception: "  # Flower's words before ours
# While so many of these sites are waited for: raises ControlError if they cannot come any more.
Check = Callable[[Collection[str], int], None]


def wait_for_nodes(
    control: Control,
    public: Path,
    needed: int,
    timeout_s: float,
    without: Collection[str] = (),
    check: Check = lambda *_: None,
) -> None:
    """Wait until ``needed`` of the registered sites are online, those ``without`` not counted.

    Raises:
        ControlError: too few after ``timeout_s``, names those that are not online; or ``check``'s.
    """
    sites = {s: key for s, key in public_keys(public).items() if s not in without}
    deadline, said = time.monotonic() + timeout_s, -1
    stalled_at = time.monotonic() + _STALLED_AFTER_S
    while True:
        try:
            status = control.node_status()
        except ControlError:  # it was up a moment ago
            if time.monotonic() > deadline:
                raise
            status = {}
        missing = [s for s, key in sites.items() if status.get(key) != "online"]
        online = len(sites) - len(missing)
        if online != said:
            _say(f"{online} of {needed} SuperNodes online")
            said = online
            stalled_at = time.monotonic() + _STALLED_AFTER_S
        if online >= needed:
            return
        check(sites, needed)
        if missing and time.monotonic() > stalled_at:
            stalled_at = math.inf
            _say(
                f"not online: {', '.join(missing)}; the log of each one's SuperNode says why "
                f"(compose: docker compose logs {missing[0].replace('site', 'supernode')}); waiting"
            )
        if time.monotonic() > deadline:
            raise ControlError(
                f"{online} of {needed} SuperNodes online after {timeout_s:.0f} s; "
                f"{len(sites)} sites have keys, not online: {', '.join(missing) or 'none'} "
                "(strategy.min-nodes, strategy.node-timeout-s)"
            )
        time.sleep(_POLL_S)


@run_view.shown()
def submit(
    app_dir: Path,
    overrides: list[str],
    control: Control,
    public: Path,
    check: Check = lambda *_: None,
) -> int:
    """One run from start to end, resumed where it was cut off; returns the exit code.

    Raises:
        ConfigError, ControlError: it could not be started or followed.
    """
    flat, config = merged_config(app_dir, overrides)
    fab = build_fab(app_dir)
    app = hashlib.sha256(fab).hexdigest()  # so Flower names a run's app
    control.wait_until_up(config.node_timeout_s)
    before = _newest(control, app, flat)
    just_ended = before and _for_good(before) and before.ended_s_ago < JUST_ENDED_S
    if before and just_ended and not config.resume:  # who names one, if only "0", wants a new run
        _say(f"run {before.run_id} of these settings has just ended: {before.state.details}")
        return 1
    if before and _cut_off(before.state) and not config.resume:
        flat["resume"] = _resume_after(before.run_id, before.config.get("resume"), before.state)
        _say(f"run {before.run_id} of these settings was cut off; going on with it")
    with tempfile.TemporaryDirectory() as home:
        alone = Path(home, "app")  # what flwr run then makes the same FAB of, in less time
        zipfile.ZipFile(io.BytesIO(fab)).extractall(alone)
        write_connection(Path(home), control.address, public / "ca.crt")
        env = {
            **os.environ,
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        for resumes in range(MAX_RESUMES + 1):
            control.wait_until_up(config.node_timeout_s)
            run = _newest(control, app, flat)
            if run and not run.state.status.startswith("finished"):
                run_id, resume = run.run_id, run.config.get("resume")
                _say(f"run {run_id} is going on; following it")
            else:
                excluded, within_s = config.exclude_sites.split(","), config.node_timeout_s
                wait_for_nodes(control, public, config.min_nodes, within_s, excluded, check)
                run_id, resume = _start(alone, flat, Path(home), env), flat.get("resume")
                _say(f"run {run_id} started")
            state = _follow(control, run_id, env, config.node_timeout_s)
            run_view.ended(state.status)
            _say(f"run {run_id} {state.status}{': ' + state.details if state.details else ''}")
            if not _cut_off(state) or resumes == MAX_RESUMES:
                break
            flat["resume"] = _resume_after(run_id, resume or config.resume, state)
            _say(f"going on after its last complete round ({resumes + 1} of {MAX_RESUMES} times)")
    return 0 if state.status == "finished:completed" else 1


def _newest(control: Control, app: str, flat: dict[str, Any]) -> KnownRun | None:
    """The newest run of this app and config, whatever it resumed."""
    same = flat | {"resume": ""}
    runs = control.runs()
    return next((r for r in runs if r.app == app and r.config | {"resume": ""} == same), None)


def _cut_off(state: RunStatus) -> bool:
    """Failed, but not for a reason that would end it again."""
    given_up = state.details.startswith(_RAISED + GIVEN_UP)
    return state.status == "finished:failed" and not given_up


def _for_good(run: KnownRun) -> bool:
    """A submission has given this run up: it would fail again, or was resumed often enough."""
    often = str(run.config.get("resume") or "").count(",") >= MAX_RESUMES
    given_up = not _cut_off(run.state) or (often and run.state.details.startswith(_RAISED))
    return run.state.status == "finished:failed" and given_up


def _resume_after(run_id: int, resume: Any, state: RunStatus) -> str:
    """The key resume of the run that goes on with this one, which itself had ``resume``."""
    if state.details.startswith(_RAISED + SILENT):
        return str(resume or "")
    return f"{run_id},{resume or '0'}"


def _follow(control: Control, run_id: int, env: dict[str, str], timeout_s: float) -> RunStatus:
    """Print the run's log until the run has ended; a SuperLink that is away is waited for.

    Raises:
        ControlError: the SuperLink stays away for ``timeout_s``, or no longer knows the run, or
            nobody has taken it up.
    """
    while True:
        _wait_until_taken_up(control, run_id)
        with run_view.followed(control, run_id):
            _print_log(run_id, env | {"PYTHONUNBUFFERED": "1"})
        # The log ends a moment before the run's status is written; or it broke off, and the run
        # goes on, or died with its SuperLink.
        deadline = time.monotonic() + DEAD_AFTER_S
        while time.monotonic() < deadline:
            try:
                state = control.run_status(run_id)
                if state.status.startswith("finished"):
                    return state
            except RunLostError:
                raise
            except ControlError:
                _say("the SuperLink is away; waiting for it")
                control.wait_until_up(timeout_s)
                deadline = time.monotonic() + DEAD_AFTER_S
            time.sleep(_POLL_S)


def _wait_until_taken_up(control: Control, run_id: int) -> None:
    """Flower would wait for ever for a ServerApp that nobody starts, and say nothing.

    Raises:
        ControlError: nobody has for PENDING_S, or the SuperLink no longer knows the run.
    """
    deadline = time.monotonic() + PENDING_S
    while True:
        try:
            if control.run_status(run_id).status != "pending":
                return
        except RunLostError:
            raise
        except ControlError:  # it is away: _follow waits for it
            return
        if time.monotonic() > deadline:
            raise ControlError(
                f"run {run_id} has been pending for {PENDING_S} s: nobody has started its "
                "ServerApp; the log of the SuperLink, or of the container serverapp, says why "
                f"(flwr stop {run_id} deployment takes the run back)"
            )
        time.sleep(_POLL_S)


def _print_log(run_id: int, env: dict[str, str]) -> None:
    """Flower's own follower prints it; its colours are for a terminal, which this pipe is not."""
    flwr = [_flwr(), "log", str(run_id), "deployment", "--stream"]
    with subprocess.Popen(
        flwr, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as log:
        try:
            for line in log.stdout or ():
                print(run_view.plain(line), end="", flush=True)
        except BaseException:
            log.kill()
            raise


def _start(app_dir: Path, flat: dict[str, Any], home: Path, env: dict[str, str]) -> int:
    command = [_flwr(), "run", str(app_dir), "deployment", "--format", "json"]
    if flat:
        file = home / "run-config.toml"
        file.write_text(
            "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in flat.items())
        )
        command += ["--run-config", str(file)]
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    try:
        return int(json.loads(done.stdout[done.stdout.index("{") :])["run-id"])
    except (ValueError, KeyError):
        output = (done.stdout + done.stderr).strip()
        raise ControlError(f"flwr run failed (exit code {done.returncode}):\n{output}") from None


def _flwr() -> str:
    return str(Path(sys.executable).with_name("flwr"))


def _say(text: str) -> None:
    print(f"submit: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.submit", description=__doc__.split("\n")[0])
    parser.add_argument("--run-config", action="append", default=[], metavar="FILE|PAIRS")
    parser.add_argument("--app", type=Path, default=Path.cwd(), help="the app's folder")
    args = parser.parse_args()
    public = Path(os.environ.get("PUBLIC_DIR", "federation/public"))
    address = os.environ.get("CONTROL_ADDRESS", "localhost:9093")
    overrides = [*args.run_config, *filter(None, [os.environ.get("RUN_CONFIG")])]
    try:
        return submit(args.app, overrides, connected(address, public / "ca.crt"), public)
    except (ConfigError, ControlError) as err:
        print(f"submit: ERROR: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("submit: left; the run goes on (flwr stop RUN_ID deployment)", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
