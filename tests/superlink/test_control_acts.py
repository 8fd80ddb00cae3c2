"""What Flower's own Control API is asked for, over TLS, is in the operator's record."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from flwr.common.constant import FAB_MAX_SIZE
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.servicer.control.control_grpc import run_control_api_grpc
from flwr.superlink.servicer.control.control_servicer import ControlServicer

from superlink import control_acts
from superlink.control import Control, ControlError, public_keys
from superlink.onehost.processes import free_port
from superlink.provision import provision
from superlink.register import register
from superlink.site_keys import fingerprint, revoke
from supernode import fab as app_fab
from tests.full_disk import full_disk
from tests.samples import REPOSITORY


@pytest.fixture
def home(tmp_path: Path) -> Path:
    provision(tmp_path, 2, "localhost:9092", [])
    return tmp_path


@pytest.fixture
def control(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """Of a Control API in this process, as the SuperLink starts it."""
    for name, method in list(vars(ControlServicer).items()):
        if name[0].isupper():
            monkeypatch.setattr(ControlServicer, name, method)  # so that it is put back
    control_acts.install(home / "audit")
    objects = ObjectStoreFactory()
    states = LinkStateFactory(str(home / "superlink.db"), NoOpFederationManager(), objects)
    own = home / "superlink"
    files = [(own / name).read_bytes() for name in ("ca.crt", "server.crt", "server.key")]
    port = free_port()
    server = run_control_api_grpc(
        f"127.0.0.1:{port}", states, objects, (files[0], files[1], files[2]),
        NoOpControlAuthnPlugin(),
    )  # fmt: skip
    client = Control(f"localhost:{port}", home / "public" / "ca.crt")
    yield client
    client.close()
    server.stop(None)


def record(home: Path) -> list[dict[str, Any]]:
    path = home / "audit" / "audit.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def test_keys_that_come_and_go_are_recorded_by_their_fingerprints(
    home: Path, control: Control
) -> None:
    public = home / "public"
    register(control, public, home / "sites")
    of = {site: fingerprint(public / f"{site}.pub") for site in public_keys(public)}
    revoke(home, "site-01")
    register(control, public, home / "sites")
    assert not control.register(public_keys(public)["site-00"])  # it is there already
    with pytest.raises(ControlError):
        control.register(b"\x1b[31m no key\n")
    assert [(x["act"], x["subject"], x["outcome"]) for x in record(home)] == [
        ("register", of["site-00"], "done"), ("register", of["site-01"], "done"),
        ("unregister", of["site-01"], "done"), ("register", of["site-00"], "failed"),
        ("register", "not a key", "failed"),
    ]  # fmt: skip
    assert all(x["by"].startswith("ipv4:127.0.0.1:") for x in record(home))
    assert all(x["reason"] for x in record(home) if x["outcome"] == "failed")


def test_runs_that_are_submitted_and_stopped_are_recorded_and_questions_are_not(
    home: Path, control: Control
) -> None:
    fab = app_fab.build(REPOSITORY)
    app = hashlib.sha256(fab).hexdigest()
    run_id = control._stub.StartRun(StartRunRequest(fab=Fab(hash_str=app, content=fab))).run_id
    control._stub.StopRun(StopRunRequest(run_id=run_id))
    with pytest.raises(grpc.RpcError):
        control._stub.StopRun(StopRunRequest(run_id=run_id))
    with pytest.raises(grpc.RpcError):
        control._stub.StartRun(StartRunRequest(fab=Fab(content=b"no app")))
    too_large = Fab(content=bytes(FAB_MAX_SIZE + 1))
    assert not control._stub.StartRun(StartRunRequest(fab=too_large)).run_id
    assert (control.runs()[0].run_id, control.runs()[0].app) == (run_id, app)
    assert control.nodes() == []
    started, stopped, again, *failed = record(home)
    assert (started["act"], started["subject"], started["app"]) == ("submit", f"run {run_id}", app)
    assert (stopped["act"], stopped["subject"], stopped["outcome"]) == (
        "stop", f"run {run_id}", "done",
    )  # fmt: skip
    assert (again["subject"], again["outcome"]) == (f"run {run_id}", "failed")
    assert "already finished" in again["reason"]
    assert [(x["act"], x["outcome"]) for x in failed] == [("submit", "failed")] * 2
    assert [x["reason"] for x in failed] == ["File is not a zip file", "Flower has started no run"]


def test_what_cannot_be_recorded_is_told_as_failed(home: Path, control: Control) -> None:
    register(control, home / "public", home / "sites")
    size = (home / "audit" / "audit.jsonl").stat().st_size
    run = StopRunRequest(run_id=7)
    with full_disk(size + 10), pytest.raises(grpc.RpcError):
        control._stub.StopRun(run)
    assert len(record(home)) == 2
    with pytest.raises(grpc.RpcError):
        control._stub.StopRun(run)
    assert len(record(home)) == 3


def test_a_superlink_that_could_record_nothing_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file")
    with pytest.raises(
        SystemExit, match=rf"AUDIT_DIR={tmp_path / 'audit' / 'x'} cannot be written"
    ):
        control_acts.install(tmp_path / "audit" / "x")
