"""A Grid within one process: a message is answered when it is pushed."""

from collections.abc import Callable, Iterable
from uuid import uuid4

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class InProcessGrid(Grid):
    """These nodes, and what one of them replies to a message."""

    def __init__(self, node_ids: Iterable[int], answer: Callable[[Message], Message]) -> None:
        self._node_ids, self._answer = list(node_ids), answer
        self._answers: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return self._node_ids

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        message_id = message.metadata.__dict__["_message_id"] = str(uuid4())
        self._answers[message_id] = self._answer(message)
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(i) for i in message_ids if i in self._answers]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
