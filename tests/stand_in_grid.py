"""A Grid in this process: what a SuperLink and its nodes would do with messages, no more."""

from collections.abc import Callable, Iterable
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

# A node's side: what it replies to a message, or None for silence until the timeout.
Node = Callable[[Message], Message | None]


class StandInGrid(Grid):
    """Nodes by id; ``reverse`` hands the replies over in the opposite order."""

    def __init__(self, nodes: dict[int, Node], reverse: bool = False) -> None:
        self.nodes, self.reverse = nodes, reverse
        self.sent: list[Message] = []
        self.timeouts: list[float | None] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())  # as push_messages does
            self.sent.append(message)
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                replies.append(reply)
        self.timeouts.append(timeout)
        # Iterable once, as the protocol promises no more.
        return iter(replies[::-1] if self.reverse else replies)

    def set_run(self, run: Run) -> None:
        raise AssertionError("our code does not call this")

    @property
    def run(self) -> Run:
        raise AssertionError("our code does not call this")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        raise AssertionError("our code does not call this")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise AssertionError("our code does not call this")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise AssertionError("our code does not call this")
