"""A reply is handed to the ServerApp when all of it is there.

Flower 1.36 hands it out as soon as it is announced, and lets the ServerApp wait for its objects: up
to three minutes after the last piece that came. A site whose upload breaks off, or that sends one
piece every three minutes, would keep the ServerApp from all other sites' replies meanwhile, so that
those come too late.
"""

from collections.abc import Callable
from typing import Any


def when_whole(get_message_res: Callable[..., Any]) -> Callable[..., Any]:
    """For SqlLinkState.get_message_res: nothing yet for an order whose reply is on its way."""
    from flwr.supercore.date import now
    from flwr.supercore.state.schema.corestate_models import ObjectPushSession as Session
    from flwr.supercore.state.schema.corestate_models import ObjectPushSessionRoot as Root
    from flwr.supercore.state.schema.linkstate_models import MessageIns as Order
    from flwr.supercore.state.schema.linkstate_models import MessageRes as Reply
    from flwr.supercore.state.schema.objectstore_models import StoredObject
    from sqlalchemy import select, text

    def get_when_whole(state: Any, message_ids: set[str]) -> Any:
        # Of one that is given up, its session over or its objects gone, the ServerApp is told.
        on_its_way = (
            select(Reply.reply_to_message_id)
            .join(Order, Order.message_id == Reply.reply_to_message_id)
            .join(StoredObject, StoredObject.object_id == Reply.message_id)
            .join(Root, Root.root_object_id == Reply.message_id)
            .join(Session, Session.session_id == Root.session_id)
            .where(Order.message_id.in_(message_ids), Reply.delivered_at == "")
            .where(Order.created_at + Order.ttl > now().timestamp())
            .where(Session.pending_count > 0, Session.expires_at > now())
        )
        with state.session() as session:
            # Or one could be announced between the two, which SQLite reads without a transaction.
            session.execute(text("BEGIN IMMEDIATE"))
            return get_message_res(state, message_ids - set(session.scalars(on_its_way)))

    return get_when_whole
