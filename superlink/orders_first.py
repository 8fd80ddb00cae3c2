"""An order's objects are what the ServerApp says, whatever a site has said of them before.

Flower stores an object under the hash of its content, and believes who names it first which parts
it has. The hash of the first adapter can be foreseen: a site that names it in a reply to the
preflight, with parts that it has not, would make the order fail and the run end.
"""

from collections.abc import Callable
from typing import Any


def orders_first(store: Callable[..., Any]) -> Callable[..., Any]:
    """For SqlLinkState.store_message_and_object_tree; orders are the ServerApp's (fleet_door)."""
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    def store_orders_first(state: Any, message: Any, tree: Any, session_id: str) -> Any:
        with state.session():  # the same transaction
            if not message.metadata.reply_to_message_id:
                for part in iterate_object_tree(tree):
                    _drop_if_false(state, part)
            return store(state, message, tree, session_id)

    return store_orders_first


def _drop_if_false(state: Any, part: Any) -> None:
    named = {"id": part.object_id}
    children = "SELECT child_id FROM object_children WHERE parent_id = :id"
    known = {row["child_id"] for row in state.query(children, named)}
    if known != {child.object_id for child in part.children}:
        # Or what it named as its parts would count as in use for ever.
        state.query(
            "UPDATE objects SET ref_count = ref_count - 1 WHERE object_id IN "
            "(SELECT child_id FROM object_children WHERE parent_id = :id)",
            named,
        )
        state.query("DELETE FROM objects WHERE object_id = :id", named)
