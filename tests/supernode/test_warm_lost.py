"""A ClientApp that was killed, as the SuperNode's own state of Flower sees it."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from supernode.warm import lost
from tests.samples import REPOSITORY

RUN = 7
# A SuperNode's process, but for its work: what it would wait for a ClientApp to start.
STARTED = """
from datetime import UTC, datetime
from flwr.supernode import cli

def flower_supernode():
    from flwr.supercore.constant import TaskType
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
    state = InMemoryNodeState(ObjectStoreFactory().store())
    number = state.create_task(TaskType.CLIENT_APP, 7)
    state.claim_task(number)
    print((state.task_token_store[number].active_until - datetime.now(UTC)).total_seconds())

cli.flower_supernode = flower_supernode
from supernode import pinned
pinned.main()
"""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InMemoryNodeState:
    """One with an order that a ClientApp has fetched."""
    for name in ("_cleanup_expired_task_tokens_locked", "claim_task"):
        monkeypatch.setattr(InMemoryNodeState, name, getattr(InMemoryNodeState, name))
    lost.install(tmp_path)
    state = InMemoryNodeState(ObjectStoreFactory().store())
    order = Message(RecordDict(), dst_node_id=1, message_type="train")
    order.metadata.__dict__.update(_run_id=RUN, _message_id="order")
    state.store_message(order)
    assert len(state.get_messages(run_ids=[RUN], is_reply=False)) == 1
    return state


def claim(state: InMemoryNodeState) -> tuple[int, str]:
    number = state.create_task(TaskType.CLIENT_APP, RUN)
    assert number
    token = state.claim_task(number)
    assert token
    return number, token


def test_the_order_of_one_that_was_lost_is_answered_with_an_error(
    state: InMemoryNodeState, tmp_path: Path
) -> None:
    number, token = claim(state)
    state.activate_task(number)
    lost.tell(tmp_path, "of another")
    assert state.get_messages(is_reply=True) == []
    lost.tell(tmp_path, token)
    (reply,) = state.get_messages(is_reply=True)
    assert "ClientApp" in str(reply.error.reason)
    assert reply.metadata.reply_to_message_id == "order"
    assert list(tmp_path.iterdir()) == []


def test_one_that_has_said_how_it_ended_is_not_lost(
    state: InMemoryNodeState, tmp_path: Path
) -> None:
    number, token = claim(state)
    state.activate_task(number)
    state.finish_task(number, SubStatus.COMPLETED, "")
    lost.tell(tmp_path, token)
    assert state.get_messages(is_reply=True) == []


def test_one_that_was_lost_at_its_start_is_left_to_flower_which_starts_it_anew(
    state: InMemoryNodeState, tmp_path: Path
) -> None:
    number, token = claim(state)
    lost.tell(tmp_path, token)
    assert state.get_messages(is_reply=True) == []
    assert state.activate_task(number)


def after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so much time have passed, as Flower sees it."""
    then = datetime.now(UTC) + timedelta(seconds=seconds)
    monkeypatch.setattr(in_memory_corestate, "now", lambda: then)


@pytest.mark.parametrize(("seconds", "waited_for"), [(290, True), (310, False)])
def test_one_that_takes_long_to_start_is_waited_for(
    state: InMemoryNodeState, monkeypatch: pytest.MonkeyPatch, seconds: float, waited_for: bool
) -> None:
    number, _ = claim(state)
    after(seconds, monkeypatch)
    assert state.activate_task(number) == waited_for
    assert (state.claim_task(number) is None) == waited_for  # or another takes its place


@pytest.mark.parametrize("warm", [{}, {"WARM_SOCKET": "/nowhere/warm.socket", "WARM_S": "60"}])
def test_so_it_is_whether_or_not_clientapps_are_warm(tmp_path: Path, warm: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, "start", "0" * 64, "site-00"],
        env={
            "PATH": os.defpath, "SITE_DIR": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0",
            "APPS_SEEN": str(tmp_path / "apps-seen.json"), **warm,
        },
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 290 < float(done.stdout) <= 300


@pytest.mark.parametrize(("seconds", "waited_for"), [(20, True), (40, False)])
def test_one_that_was_lost_at_its_start_is_not(
    state: InMemoryNodeState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float,
    waited_for: bool,
) -> None:  # fmt: skip
    number, token = claim(state)
    lost.tell(tmp_path, token)
    assert state.get_task_by_token(token)
    after(seconds, monkeypatch)
    assert (state.get_task_by_token(token) is not None) == waited_for
    assert (state.claim_task(number) is None) == waited_for
