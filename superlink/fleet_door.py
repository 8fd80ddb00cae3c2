"""What a SuperNode may say at the Fleet API, beyond what Flower asks.

Flower 1.36 checks that a call is signed by a registered key and names that key's node, and then
believes the rest of it: whose message it is, which order it answers, which key is activated. So
does its store: whoever pushes a message says how many objects it has. Here each of these is
compared with what the SuperLink knows, before Flower works on the call. Of a call above
MAX_CALL_BYTES nothing is compared: gRPC refuses it unread, and one line says so. Of the other
calls, RegisterNode and UnregisterNode are off where SuperNodes authenticate; DeactivateNode,
SendNodeHeartbeat and PullMessages name nothing but the caller's own node; GetRun and GetFab give
what every site of a run is sent.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

from superlink.adapter_size import adapter_bytes
from superlink.gone_messages import with_objects
from superlink.lost_orders import without_lost_orders
from superlink.orders_first import orders_first
from superlink.refused import RefusedError, check_words
from superlink.site_keys import fingerprint_of_pem
from superlink.unread_calls import telling_unread_calls
from superlink.whole_replies import when_whole

# Flower cuts arrays into pieces of 5 MiB. Everything else of an honest reply is far smaller; the
# largest is the list of linear layers in the preflight, 1 MB for a model of 18,000.
PIECE_BYTES = 5 * 2**20
MAX_CALL_BYTES = 6 * 2**20
MAX_OTHER_BYTES = 4 * 2**20
# Message, RecordDict, ArrayRecord, Array and MetricRecord make five objects, beside the pieces.
MAX_OTHER_OBJECTS = 8
MAX_TIME_S = 1e10  # a date of the year 2286

MAX_REPLIES_KNOWN = 10_000
_array_of: dict[str, str] = {}  # reply -> its array, by their ids; the oldest first

_SERVICER = "flwr.server.superlink.fleet.grpc_rere.fleet_servicer", "FleetServicer"
_STATE = "flwr.server.superlink.linkstate.sql_linkstate", "SqlLinkState"
_LIMIT = "flwr.superlink.cli.flower_superlink", "GRPC_MAX_MESSAGE_LENGTH"
_CREATE = "flwr.superlink.cli.flower_superlink", "generic_create_grpc_server"


@dataclass(frozen=True)
class Call:
    """A call, and what is known for sure: the key that signed it and that key's node."""

    request: Any
    state: Any  # SqlLinkState
    key: bytes  # PEM
    results: Path

    @property
    def node_id(self) -> int:
        """Flower has compared it with the key's."""
        return int(self.request.node.node_id)

    def rows(self, sql: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of the SuperLink's database; ``:node`` is the caller's node."""
        signed = {k: _signed(v) if isinstance(v, int) else v for k, v in values.items()}
        rows: list[dict[str, Any]] = self.state.query(sql, signed | {"node": _signed(self.node_id)})
        return rows

    def most_pieces(self, run_id: int) -> int:
        """Pieces of the run's adapter; the answers of the preflight, before it, have none."""
        size = adapter_bytes(self.results, run_id)
        return ceil((size + 128) / PIECE_BYTES) if size else 0  # 128: numpy's own header


def install(results: Path) -> None:
    """Put the door in front of this process's Fleet API.

    Args:
        results: where the ServerApp writes run.json, by run id.

    Raises:
        SystemExit: this Flower has no such thing to put it in front of.
    """
    servicer, state = flower(*_SERVICER), flower(*_STATE)
    for name in CHECKS:
        flower(*_SERVICER, name)
    store = flower(*_STATE, "store_message_and_object_tree")
    delete = flower(*_STATE, "delete_messages")
    activate_node = flower(*_STATE, "activate_node")
    get_message_res = flower(*_STATE, "get_message_res")
    create = flower(*_CREATE)
    flower(*_LIMIT)
    for name, check in CHECKS.items():
        setattr(servicer, name, _guarded(name, getattr(servicer, name), check, results))
    state.store_message_and_object_tree = orders_first(store)
    state.delete_messages = with_objects(delete)
    state.activate_node = without_lost_orders(activate_node)
    state.get_message_res = when_whole(get_message_res)
    # Of the Fleet API alone: the module has names of its own for both.
    setattr(import_module(_LIMIT[0]), _LIMIT[1], MAX_CALL_BYTES)
    setattr(import_module(_CREATE[0]), _CREATE[1], telling_unread_calls(create, _log))


def flower(module: str, *names: str) -> Any:
    """What the pinned Flower has under this name.

    Raises:
        SystemExit: nothing; the message says who needs it.
    """
    try:
        found = import_module(module)
        for name in names:
            found = getattr(found, name)
    except (ImportError, AttributeError):
        raise SystemExit(
            f"superlink: flwr {version('flwr')} has no {'.'.join([module, *names])}, which "
            "superlink/fleet_door.py guards; install the flwr that pyproject.toml names"
        ) from None
    return found


def _guarded(
    name: str, method: Callable[..., Any], check: Callable[[Call], None], results: Path
) -> Callable[..., Any]:
    from flwr.common.constant import PUBLIC_KEY_HEADER
    from flwr.supercore.utils import get_metadata_bytes
    from grpc import StatusCode

    def guarded(servicer: Any, request: Any, context: Any) -> Any:
        key = get_metadata_bytes(context.invocation_metadata(), PUBLIC_KEY_HEADER) or b""
        call = Call(request, servicer.state_factory.state(), key, results)
        try:
            check_words(name, request)
            check(call)
        except RefusedError as err:
            _log(f"{name} of {fingerprint_of_pem(key)} refused: {err}")
            # No status that a SuperNode would end on, or try again for ever: it logs this line
            # and goes on with its next order.
            context.abort(StatusCode.FAILED_PRECONDITION, str(err))
        return method(servicer, request, context)

    return guarded


def _log(line: str) -> None:
    from logging import WARNING

    from flwr.supercore import log

    log(WARNING, "[door] %s", line)


def activate(call: Call) -> None:
    """A key activates itself."""
    if call.request.public_key != call.key:
        raise RefusedError("the key to be activated is another than the caller's")


def push_message(call: Call) -> None:
    """One message: this node's reply to an order of this run to this node."""
    request = call.request
    messages, trees = request.messages_list, request.message_object_trees
    if len(messages) != 1 or len(trees) != 1:
        raise RefusedError(f"{len(messages)} messages with {len(trees)} object trees in one call")
    if request.ByteSize() > MAX_OTHER_BYTES or messages[0].content.items:
        raise RefusedError(f"a message of {request.ByteSize()} bytes beside its objects")
    meta, tree = messages[0].metadata, trees[0]
    if not meta.reply_to_message_id:
        raise RefusedError("it is an order, which only the ServerApp gives")
    if meta.src_node_id != call.node_id:
        raise RefusedError("its sender is another node than the caller")
    times = [meta.created_at, meta.ttl, *request.clientapp_runtime_list]
    # Nor NaN, which SQLite keeps as NULL: Flower could not read the reply.
    if len(times) > 3 or not all(abs(t) < MAX_TIME_S for t in times):
        raise RefusedError(f"times {times[:3]}")
    orders = call.rows(
        "SELECT message_type, group_id FROM message_ins "
        "WHERE message_id = :order AND run_id = :run AND dst_node_id = :node",
        order=meta.reply_to_message_id,
        run=meta.run_id,
    )
    if orders != [{"message_type": meta.message_type, "group_id": meta.group_id}]:
        raise RefusedError("it answers no order of this run to the caller, or comes too late")
    _check_objects(call, meta, tree)
    _drop_earlier_replies(call, meta)


def _check_objects(call: Call, meta: Any, tree: Any) -> None:
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    if tree.object_id != meta.message_id:
        raise RefusedError("its objects are not its own")
    ids = [part.object_id for part in iterate_object_tree(tree)]
    most = MAX_OTHER_OBJECTS + call.most_pieces(meta.run_id)
    if len(ids) > most:
        raise RefusedError(f"{len(ids)} objects, where a reply of run {meta.run_id} has {most}")
    # Another message among its objects would be deleted with it.
    taken = call.rows(
        "SELECT message_id FROM message_ins WHERE message_id IN (SELECT value FROM json_each(:ids))"
        " UNION ALL SELECT message_id FROM message_res"
        " WHERE message_id IN (SELECT value FROM json_each(:ids))"
        " AND NOT (message_id = :own AND src_node_id = :node)",  # the same once more: a retry
        ids=json.dumps(ids),
        own=meta.message_id,
    )
    if taken:
        raise RefusedError("another message is among its objects")


def _drop_earlier_replies(call: Call, meta: Any) -> None:
    """A node has one reply in store for a run: who answers anew is not waited for any more."""
    for earlier in call.rows(
        "SELECT reply_to_message_id AS id FROM message_res WHERE src_node_id = :node "
        "AND run_id = :run AND delivered_at = '' AND message_id <> :own",
        run=meta.run_id,
        own=meta.message_id,
    ):
        call.state.delete_messages({earlier["id"]})


def push_object(call: Call) -> None:
    """A piece of an array, or something small, or the one array: the adapter."""
    replies = call.rows(
        "SELECT object_id AS id FROM objects JOIN object_push_session_roots "
        "ON object_id = root_object_id WHERE session_id = :session",
        session=call.request.session_id,
    )
    try:
        _check_object(call, replies[0]["id"] if replies else "")
        if not replies:
            raise RefusedError("it belongs to no reply that is waited for, or comes too late")
    except RefusedError:
        for reply in replies:  # or the ServerApp would wait for the rest of it
            call.state.object_store.delete(reply["id"])
        raise


def _check_object(call: Call, reply: str) -> None:
    content, run_id = call.request.object_content, call.request.run_id
    if not call.request.session_id:
        raise RefusedError("an object without the session of its message")
    head, _, body = content.partition(b"\0")
    kind = head.split(b" ", 1)[0]
    if kind != b"ArrayChunk" and len(content) > MAX_OTHER_BYTES:
        raise RefusedError(f"an object of {len(content)} bytes that is no piece of an array")
    if kind != b"Array":
        return
    try:
        pieces = len(json.loads(body)["arraychunk_ids"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RefusedError("an array that cannot be read") from None
    # An array may name the same piece again and again, and arrays may share their pieces: few
    # bytes would unfold into more than the ServerApp can hold.
    if pieces > (most := call.most_pieces(run_id)):
        raise RefusedError(f"an array of {pieces} pieces, where run {run_id}'s adapter has {most}")
    own = call.request.object_id
    if reply and _array_of.setdefault(reply, own) != own:
        raise RefusedError("a second array in one reply")
    if len(_array_of) > MAX_REPLIES_KNOWN:
        _array_of.pop(next(iter(_array_of)))


def pull_object(call: Call) -> None:
    """Objects of the caller's own orders only."""
    if not call.rows(
        "WITH RECURSIVE part(id) AS ("
        " SELECT message_id FROM message_ins WHERE dst_node_id = :node AND run_id = :run"
        " UNION SELECT child_id FROM object_children JOIN part ON parent_id = part.id"
        ") SELECT id FROM part WHERE id = :object",
        run=call.request.run_id,
        object=call.request.object_id,
    ):
        raise RefusedError("the object belongs to no order of this run to the caller")


def confirm(call: Call) -> None:
    """The receipt of the caller's own order: it deletes what it names."""
    if not call.rows(
        "SELECT 1 FROM message_ins "
        "WHERE message_id = :order AND run_id = :run AND dst_node_id = :node",
        order=call.request.message_object_id,
        run=call.request.run_id,
    ):
        raise RefusedError("the message is no order of this run to the caller, or is gone")


CHECKS: dict[str, Callable[[Call], None]] = {
    "RegisterNode": lambda _: None,  # but for check_words, as for all of them
    "GetFab": lambda _: None,
    "ActivateNode": activate,
    "PushMessages": push_message,
    "PushObject": push_object,
    "PullObject": pull_object,
    "ConfirmMessageReceived": confirm,
}


def _signed(value: int) -> int:
    """As Flower stores ids of 64 bits."""
    return value - 2**64 if value >= 2**63 else value
