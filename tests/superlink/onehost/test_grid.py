"""A Grid in one process does what Flower asks of any."""

from flwr.app import Message, RecordDict

from superlink.onehost.grid import InProcessGrid


def test_each_message_is_answered_by_its_node_and_its_answer_given_once() -> None:
    asked: list[int] = []

    def answer(message: Message) -> Message:
        asked.append(message.metadata.dst_node_id)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid([1, 2], answer)
    orders = [grid.create_message(RecordDict(), "train", n, "1") for n in grid.get_node_ids()]
    replies = list(grid.send_and_receive(orders))
    assert asked == [1, 2]
    assert [r.metadata.src_node_id for r in replies] == [1, 2]
    ids = [order.metadata.message_id for order in orders]
    assert [r.metadata.reply_to_message_id for r in replies] == ids
    assert not list(grid.pull_messages(ids))
