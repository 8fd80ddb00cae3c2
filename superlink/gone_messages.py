"""A message that is deleted takes its objects along.

Flower 1.36 deletes an order that has expired or was answered, and the reply to it that nobody
fetched, but not what they carried: where a site fetches an order late or never, or answers in its
last seconds, an adapter would stay in the database until the run ends, in each round.
"""

import json
from collections.abc import Callable
from typing import Any


def with_objects(delete: Callable[..., None]) -> Callable[..., None]:
    """For SqlLinkState.delete_messages."""

    def delete_messages(state: Any, message_ins_ids: set[str]) -> None:
        if not message_ins_ids:  # as at nearly every look
            return
        with state.session():  # the same transaction
            gone = state.query(
                "WITH ordered AS (SELECT value FROM json_each(:ids)) "
                "SELECT message_id FROM message_ins WHERE message_id IN ordered "
                # One that is being fetched is deleted when the ServerApp has got all of it.
                "UNION ALL SELECT message_id FROM message_res "
                "WHERE reply_to_message_id IN ordered AND delivered_at = ''",
                {"ids": json.dumps(list(message_ins_ids))},
            )
            delete(state, message_ins_ids)
            for row in gone:
                state.object_store.delete(row["message_id"])

    return delete_messages
