"""SuperLink and ServerApps in one container or two: flags, and what stops before it starts."""

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from superlink import entrypoint, serverapp
from superlink.entrypoint import arguments
from superlink.onehost.processes import free_port
from superlink.provision import provision
from tests.samples import IDLE


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    provision(tmp_path / "federation", 1, "localhost:9092", [])
    (tmp_path / "results").mkdir()
    return {
        "SUPERLINK_DIR": str(tmp_path / "federation" / "superlink"),
        "SERVERAPP_DIR": str(tmp_path / "federation" / "serverapp"),
        "STATE_DIR": str(tmp_path / "state"),
        "RESULTS_DIR": str(tmp_path / "results"),
        "SITES_DIR": str(tmp_path / "sites"),
        "FLEET_ADDRESS": f"127.0.0.1:{free_port()}",
        "CONTROL_ADDRESS": f"127.0.0.1:{free_port()}",
        "RUNTIME_PORT": str(free_port()),
        "HEALTH_PORT": str(free_port()),
    }


def flags(argv: list[str]) -> dict[str, str]:
    return {a: b for a, b in pairwise(argv) if a.startswith("--")}


def test_serverapps_are_child_processes_unless_a_runtime_address_is_set(
    env: dict[str, str],
) -> None:
    given = flags(arguments(env))
    assert given["--host"] == "127.0.0.1"
    assert "--isolation" not in given
    address = f"localhost:{free_port()}"
    apart = flags(arguments(env | {"RUNTIME_ADDRESS": address}))
    assert f"{apart['--host']}:{apart['--port']}" == address
    assert apart["--isolation"] == "process"
    for flag in ("--appio-ssl-certfile", "--appio-ssl-keyfile", "--superexec-auth-secret-file"):
        assert Path(apart[flag]).is_file()
    theirs = flags(serverapp.arguments(env | {"RUNTIME_ADDRESS": address}))
    secrets = (apart, theirs)
    assert len({Path(f["--superexec-auth-secret-file"]).read_bytes() for f in secrets}) == 1
    assert theirs["--runtime-api-address"] == address
    assert Path(theirs["--root-certificates"]).is_file()


def test_what_asks_for_no_login_is_on_the_loopback_unless_somebody_says_otherwise(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entrypoint, "_check_free", lambda *_: None)  # the port's real number
    given = flags(arguments({k: v for k, v in env.items() if k != "CONTROL_ADDRESS"}))
    hosts = {flag: given[flag].split(":")[0] for flag in ("--control-api-address", "--host")}
    assert set(hosts.values()) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SERVERAPP_DIR": "/nowhere"}, "/nowhere/ca.crt is missing or not readable by user"),
        ({"RUNTIME_ADDRESS": ""}, "RUNTIME_ADDRESS is not set"),
        ({"RUNTIME_ADDRESS": "superlink"}, "RUNTIME_ADDRESS: 'superlink' is no address"),
        ({"SITES_DIR": ""}, "SITES_DIR is not set"),
        ({"RESULTS_DIR": "/nowhere"}, "RESULTS_DIR=/nowhere cannot be written by user .* CHOWN"),
    ],
)
def test_a_serverapp_container_that_cannot_work_says_why(
    env: dict[str, str], change: dict[str, str], words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        serverapp.arguments({"RUNTIME_ADDRESS": "x:1"} | env | change)


def test_a_missing_secret_is_named_before_the_superlink_starts(env: dict[str, str]) -> None:
    (Path(env["SUPERLINK_DIR"]) / "runtime.secret").unlink()
    arguments(env)  # not needed there
    with pytest.raises(SystemExit, match=r"runtime\.secret is missing; run superlink\.provision"):
        arguments(env | {"RUNTIME_ADDRESS": "localhost:1"})


def test_where_nobody_can_listen_the_systems_own_reason_is_told(env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for address, why in (
            (f"127.0.0.1:{port}", "Address already in use; another program does"),
            ("192.0.2.1:9092", "Cannot assign requested address; this host has no such address"),
            ("no-such-host.invalid:9092", "; check the name"),
            ("https://localhost:9092", "host:port is needed"),
            ("127.0.0.1:99999", "with a port from 1 to 65535"),
        ):
            with pytest.raises(SystemExit) as ended:
                arguments(env | {"FLEET_ADDRESS": address})
            assert str(ended.value).startswith("superlink: FLEET_ADDRESS: ")
            assert why in str(ended.value)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_ipv6_address_is_an_address(env: dict[str, str]) -> None:
    address = f"[::1]:{free_port()}"
    assert flags(arguments(env | {"FLEET_ADDRESS": address}))["--fleet-api-address"] == address


SUPEREXEC = """\
#!{python}
import os, subprocess, sys, time
app = "import signal, sys, time; from pathlib import Path\\n"
app += "def stop(*_):\\n time.sleep(1)\\n Path('{ended}').rename('{told}')\\n sys.exit()\\n"
app += "signal.signal(signal.SIGTERM, stop)\\n"
app += "Path('{up}').touch()\\n" + {idle!r}
subprocess.Popen([sys.executable, "-c", app])
time.sleep(60)
"""


def test_when_stopped_a_serverapp_has_its_time_to_write_down_how_it_ended(
    env: dict[str, str], tmp_path: Path
) -> None:
    """A container ends with its first process: the ServerApp has to end before.

    And of a run that has ended, now or before, there is the page.
    """
    programs = tmp_path / "bin"
    programs.mkdir()
    told, up = Path(env["RESULTS_DIR"]) / "5" / "run.json", tmp_path / "up"
    told.parent.mkdir()
    ended = tmp_path / "ended.json"
    ended.write_text('{"status": "failed", "error": "stopped by its operator"}')
    before = told.parent.with_name("4")
    before.mkdir()
    (before / "run.json").write_text('{"status": "completed"}')
    superexec = programs / "flower-superexec"
    superexec.write_text(
        SUPEREXEC.format(python=sys.executable, ended=ended, told=told, up=up, idle=IDLE)
    )
    superexec.chmod(0o755)
    code = "import sys; from pathlib import Path; from superlink import link_log, serverapp; "
    code += f"link_log.PROGRAMS = Path({str(programs)!r}); sys.exit(serverapp.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env, "RUNTIME_ADDRESS": "localhost:1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (up.exists() and (before / "report.html").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not told.exists()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert told.exists()
        assert "stopped by its operator" in told.with_name("report.html").read_text()
    finally:
        process.kill()
