"""How long a SuperNode waits before it asks again; with Flower's own loop around it."""

import inspect
import re

import pytest
from flwr.supernode import start_client_internal as flower

from supernode import polling


def test_only_the_wait_for_an_order_is_shorter_and_only_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pauses = polling.Pauses()
    assert pauses.of(3) == 3  # before the first order
    pauses.order_done()
    now += 29
    assert [pauses.of(s) for s in (3, 0.5)] == [1.0, 0.5]
    now += 2
    assert pauses.of(3) == 3


def test_flower_waits_as_it_did_when_this_was_written() -> None:
    source = inspect.getsource(flower.start_client_internal)
    assert f"time.sleep({polling.FLOWERS_S})" in source
    assert "_push_messages(" in source
    used = set(re.findall(r"\btime\.(\w+)\(", inspect.getsource(flower)))
    assert used == {"sleep"}
