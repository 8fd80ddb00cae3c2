"""A Grid in this process: what a SuperLink and its nodes would do with messages, no more."""

from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Message

from superlink.onehost.grid import InProcessGrid

# A node's side: what it replies to a message, None for silence, or what Flower raises on reading
# its reply.
Node = Callable[[Message], Message | Exception | None]


class StandInGrid(InProcessGrid):
    """Nodes by id; ``reverse`` hands the replies over in the opposite order.

    ``revoked`` nodes get no message: the SuperLink stores none for them.
    """

    def __init__(
        self, nodes: dict[int, Node], reverse: bool = False, revoked: Iterable[int] = ()
    ) -> None:
        self.nodes, self.reverse, self.revoked = nodes, reverse, set(revoked)
        self.sent: list[Message] = []
        self._replies: dict[str, Message | Exception] = {}
        self._due: dict[str, tuple[float, Clock]] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(m) for m in messages]

    def _push(self, message: Message) -> str:
        if message.metadata.dst_node_id in self.revoked:
            return ""
        message_id = message.metadata.__dict__["_message_id"] = str(uuid4())
        self.sent.append(message)
        reply = self.nodes[message.metadata.dst_node_id](message)
        if reply is not None:
            self._replies[message_id] = reply
        return message_id

    def later(self, message: Message, node: Node, clock: "Clock", delay_s: float) -> Any:
        """The node's reply, which cannot be pulled for ``delay_s``."""
        self._due[message.metadata.message_id] = clock.now + delay_s, clock
        return node(message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if message_id not in self._replies:
                continue
            due, clock = self._due.get(message_id, (0.0, None))
            if clock and clock.now < due:
                continue
            if self.reverse and message_id != list(self._replies)[-1]:
                continue  # later
            reply = self._replies.pop(message_id)
            if isinstance(reply, Exception):
                raise reply
            yield reply


class Clock:
    """In the place of ``time``: nobody waits, and time goes by all the same."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
