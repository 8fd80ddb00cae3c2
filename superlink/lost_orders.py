"""A SuperNode that starts anew has lost the order that it worked on.

Flower 1.36 keeps that order as delivered, and gives the ServerApp an error for it only where the
node is offline when it looks: one that ended and came back between two looks would be waited for
until the round's timeout. A SuperNode activates itself once, when it starts.
"""

from collections.abc import Callable
from typing import Any


def without_lost_orders(activate: Callable[..., bool]) -> Callable[..., bool]:
    """For SqlLinkState.activate_node: the order is deleted, which the ServerApp is told."""

    def activate_node(state: Any, node_id: int, heartbeat_interval: float) -> bool:
        from flwr.supercore.utils import uint64_to_int64

        activated = activate(state, node_id, heartbeat_interval)
        if activated:
            lost = state.query(
                "SELECT message_id FROM message_ins WHERE dst_node_id = :node "
                "AND delivered_at <> '' "
                "AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)",
                {"node": uint64_to_int64(node_id)},
            )
            state.delete_messages({row["message_id"] for row in lost})
        return activated

    return activate_node
