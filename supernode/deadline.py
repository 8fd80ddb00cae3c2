"""Ends the work on an order that has expired: nobody waits for its reply any more.

Flower 1.36 waits for a ClientApp's reply for ever, so that one that hangs would stop its SuperNode,
which counts as online all the same. Each message says how long it lives; here the SuperNode's own
waiting ends then, and so does whatever works on it.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

GONE_AFTER_S = 10  # of a killed process that the kernel cannot end at once


class Expired(BaseException):
    """The order that is worked on has expired. Of an Exception Flower would make a log line."""


class _Until:
    """``wrapped``; but its method ``name`` raises Expired if it has nothing after the deadline."""

    def __init__(self, wrapped: Any, name: str, deadline: float) -> None:
        self._wrapped, self._name, self._deadline = wrapped, name, deadline

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return self._bounded(found) if name == self._name else found

    def _bounded(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(*args: Any, **given: Any) -> Any:
            answer = ask(*args, **given)
            if not answer and time.monotonic() >= self._deadline:
                raise Expired
            return answer

        return bounded


class Workers:
    """The processes that work on orders: those below this one that were not there before any.

    A SuperNode works on one order at a time, so they all work on that one.
    """

    def __init__(self) -> None:
        self._lasting: list[psutil.Process] | None = None

    def order_received(self) -> None:
        """To be called before anything works on it."""
        if self._lasting is None:
            self._lasting = _below()

    def end(self) -> None:
        """Kill them, and wait until they are gone: what they hold of a GPU is free then."""
        workers = [p for p in _below() if p not in (self._lasting or ())]
        for process in workers:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + GONE_AFTER_S
        while any(map(_runs, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)


def _below() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


def _runs(process: psutil.Process) -> bool:
    """Neither gone nor a zombie, which Flower leaves behind of each ClientApp until the next."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def seconds_left(created_at: float, ttl_s: float, now: float) -> float:
    """Of a message's life. ``created_at`` is from the SuperLink's clock, ``now`` from this one."""
    return max(0.0, min(ttl_s, created_at + ttl_s - now))


def install(site: str) -> None:
    """Let this process's SuperNode end the work on an order when the order expires."""
    from flwr.supernode import start_client_internal as flower

    receive, send = flower._pull_and_store_message, flower._push_messages
    workers = Workers()
    order: Any = None  # metadata of the message that is worked on
    deadline = 0.0

    def receive_noting(**given: Any) -> int | None:
        def note() -> Any:
            nonlocal order, deadline
            received = given["receive"]()
            if received is not None:
                workers.order_received()
                order = received[0].metadata
                left_s = seconds_left(order.created_at, order.ttl, time.time())
                deadline = time.monotonic() + left_s
            return received

        return receive(**given | {"receive": note})

    def send_in_time(**given: Any) -> None:
        state, store = given["state"], given["object_store"]
        # Flower asks these two again and again: for the reply, and for its parts.
        bounded = {
            "state": _Until(state, "get_messages", deadline),
            "object_store": _Until(store, "get", deadline),
        }
        try:
            send(**given | bounded)
        except Expired:
            print(
                f"supernode: ERROR: {site}'s ClientApp has not answered an order of run "
                f"{order.run_id} within the {order.ttl:.0f} s that its answer is waited for, and "
                "is ended",
                flush=True,
            )
            _give_up(state, store, order.message_id, workers)

    flower._pull_and_store_message = receive_noting  # type: ignore[assignment]
    flower._push_messages = send_in_time  # type: ignore[assignment]


def _give_up(state: Any, store: Any, message_id: str, workers: Workers) -> None:
    """Leave nothing of an order that the next could be taken for."""
    from flwr.common.constant import Status, SubStatus

    # First of all: Flower takes no reply of a task that has ended, and does not miss it later.
    for task in state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
        state.finish_task(task.task_id, SubStatus.FAILED, "its order had expired")
    workers.end()
    replies = [m.metadata.message_id for m in state.get_messages(is_reply=True)]
    state.delete_messages(message_ids=[message_id, *replies])
    for object_id in (message_id, *replies):
        store.delete(object_id)
