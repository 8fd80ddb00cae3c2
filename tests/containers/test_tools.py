"""The operator's commands in compose: status, backup, restore, and the record of acts."""

import json
import os
from pathlib import Path
from typing import Any

from superlink.onehost.processes import free_port
from tests.containers.conftest import Federation, wait

RUN = "run", "--rm", "-T"


def _serving(federation: Federation) -> dict[str, Any]:
    """Its SuperLink is up and knows the keys; what status says of it then."""
    up = federation.compose("up", "-d", "--no-deps", "superlink")
    assert up.returncode == 0, up.stderr
    assert wait(lambda: federation["superlink"].health == "healthy")
    assert federation.compose(*RUN, "--no-deps", "register").returncode == 0
    told = federation.compose(*RUN, "status", "--format", "json")
    assert told.returncode == 4, told.stderr
    said: dict[str, Any] = json.loads(told.stdout)
    return said


def _record(federation: Federation) -> list[dict[str, Any]]:
    shown = federation.compose(*RUN, "provision", "cat", "/audit/audit.jsonl")
    return [json.loads(line) for line in shown.stdout.splitlines()]


def test_a_federation_comes_back_out_of_its_backup(images: None, tmp_path: Path) -> None:
    """With no SuperNode: that sites come back is tests/federation/test_backup.py's."""
    saved = tmp_path / "saved"
    saved.mkdir()
    saved.chmod(0o777)  # where there is no root, nor uid 10001
    env = {
        "FLEET_PORT": str(free_port()),
        "CONTROL_PORT": str(free_port()),
        "BACKUP_DIR": str(saved),
    }
    made = Federation(f"fedllm-tools-{os.getpid()}", env)
    try:
        assert made.compose(*RUN, "provision").returncode == 0
        down = made.compose(*RUN, "status")
        assert (down.returncode, down.stdout) == (1, "")
        (line,) = [x for x in down.stderr.splitlines() if "status: " in x]
        assert "no connection to the SuperLink at superlink:9093" in line
        before = _serving(made)
        assert {s["state"] for s in before["sites"]} == {"registered"}
        assert len(before["sites"]) == 20
        done = made.compose(*RUN, "backup", "--results")
        assert done.returncode == 0, done.stderr
        (archive,) = saved.iterdir()
        restore = (*RUN, "restore", f"/backup/{archive.name}")
        refused = made.compose(*restore)
        assert refused.returncode == 1
        assert "is put back into an empty folder only" in refused.stderr
        acts = [(line["act"], line["outcome"]) for line in _record(made)]
        assert acts == [("provision", "done"), *[("register", "done")] * 20, ("backup", "done")]
        made.compose("--profile", "tools", "down", "-v")

        done = made.compose(*restore)
        assert done.returncode == 0, done.stderr
        assert "left in the archive: results" in done.stdout
        assert made.compose(*RUN, "provision").stdout.startswith("provision: everything was there")
        assert _serving(made)["sites"] == before["sites"]
        acts = [(line["act"], line["by"].split(":")[0]) for line in _record(made)]
        assert acts[-2:] == [("restore", "superlink.restore"), ("provision", "superlink.provision")]
        keys = "stat -c %a /federation/*/*.key /federation/*/*.secret | sort | uniq -c"
        modes = made.compose(*RUN, "provision", "sh", "-c", keys).stdout.split()
        assert modes == ["23", "600", "1", "640"]
    finally:
        made.compose("--profile", "tools", "down", "-v")
