"""Orders that expire while they are worked on; in a federation: tests/federation/test_time.py."""

import inspect
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from flwr.supernode import start_client_internal as flower

from supernode.deadline import Expired, Workers, _Until, seconds_left

# Heeds no signal and has a child that does not either; says when both are there.
DEAF = (
    "import os, signal, time\n"
    "for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)\n"
    "child = os.fork()\n"
    "if child: print(child, flush=True)\n"
    "while True: time.sleep(9)"
)


@pytest.fixture
def lasting() -> Iterator[subprocess.Popen[str]]:
    """As Flower's superexec: there before any order."""
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    child = psutil.Process(int(process.stdout.readline()))
    yield process
    child.kill()
    process.kill()
    process.wait()


def test_all_that_was_started_for_an_order_ends_and_what_was_there_before_stays(
    lasting: subprocess.Popen[str],
) -> None:
    workers = Workers()
    workers.order_received()
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True) as deaf:
        assert deaf.stdout
        child = psutil.Process(int(deaf.stdout.readline()))
        workers.order_received()  # the next: what is left of the last one's is no lasting process
        workers.end()
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert deaf.wait(60) == -9
    assert lasting.poll() is None
    assert len(psutil.Process(lasting.pid).children()) == 1


class Store:
    def __init__(self, *answers: bytes) -> None:
        self.answers, self.deleted = list(answers), ""

    def get(self, _: str) -> bytes:
        return self.answers.pop(0)

    def delete(self, name: str) -> None:
        self.deleted = name


def test_an_answer_that_is_there_is_taken_also_after_the_deadline_and_none_is_waited_for() -> None:
    over, store = time.monotonic() - 1, Store(b"", b"late", b"")
    assert _Until(store, "get", time.monotonic() + 60).get("a") == b""
    late = _Until(store, "get", over)
    assert late.get("a") == b"late"
    with pytest.raises(Expired):
        late.get("a")
    late.delete("a")
    assert store.deleted == "a"


@pytest.mark.parametrize(
    ("now", "left_s"),
    [
        (1000.0, 60.0),
        (1045.0, 15.0),
        (1061.0, 0.0),
        (700.0, 60.0),  # a site whose clock is behind
    ],
)
def test_an_order_lives_no_longer_than_it_was_given_whatever_the_sites_clock_says(
    now: float, left_s: float
) -> None:
    assert seconds_left(1000.0, 60.0, now) == left_s


def test_flower_still_has_what_is_wrapped() -> None:
    """Of another version this may be otherwise, and a ClientApp that hangs would not be ended."""
    assert {"receive", "state", "object_store"} <= set(
        inspect.signature(flower._pull_and_store_message).parameters
    )
    push = inspect.getsource(flower._push_messages)
    assert {"state", "object_store"} <= set(inspect.signature(flower._push_messages).parameters)
    assert "state.get_messages(is_reply=True)" in push
    assert 'object_store.get(tree.object_id)) == b""' in push
