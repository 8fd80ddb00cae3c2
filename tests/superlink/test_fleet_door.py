"""The door in front of Flower's own servicer and database: what passes, and what does not."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, PUBLIC_KEY_HEADER, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2_grpc
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager

from superlink import fleet_door
from superlink.certificates import new_key
from superlink.site_keys import fingerprint

ADAPTER = 3_000_000  # parameters: 12 MB in float32, three pieces
FORGED = "\n\x1b[31m[door] PushMessages of SHA256:somebody else refused".ljust(64, ".")
CHECKED_BY_FLOWER = {  # see the door's docstring
    "UnregisterNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages", "GetRun",
}  # fmt: skip


class AbortedError(Exception):
    """What a gRPC context raises."""


@dataclass
class Context:
    key: bytes

    def invocation_metadata(self) -> list[tuple[str, bytes]]:
        return [(PUBLIC_KEY_HEADER, self.key)]

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        assert code == grpc.StatusCode.FAILED_PRECONDITION  # a SuperNode goes on after it
        raise AbortedError(details)


@dataclass
class Link:
    """A SuperLink's servicer and database with two runs and two nodes online."""

    servicer: FleetServicer
    results: Path
    keys: dict[int, bytes] = field(default_factory=dict)
    runs: list[int] = field(default_factory=list)

    @property
    def state(self) -> SqlLinkState:
        state = self.servicer.state_factory.state()
        assert isinstance(state, SqlLinkState)
        return state

    def node(self) -> int:
        key = public_key_to_bytes(new_key().public_key())
        node_id = self.state.create_node(NOOP_FLWR_AID, "", key, 0)
        self.keys[node_id] = key
        self.state.activate_node(node_id, 30)
        return node_id

    def run(self) -> int:
        run_id = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        (task,) = [t for t in self.state.get_tasks() if t.run_id == run_id]
        self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        self.runs.append(run_id)
        return run_id

    def prepare(self, run_id: int) -> None:
        """What the ServerApp writes before it sends an adapter."""
        folder = self.results / str(run_id)
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"adapter_parameters": ADAPTER}))

    def order(
        self, node_id: int, run_id: int, content: RecordDict | None = None, ttl: float = 600
    ) -> Message:
        """As the ServerApp's push does it."""
        message = Message(
            content or RecordDict(), dst_node_id=node_id, message_type="train", ttl=ttl
        )
        message.metadata.__dict__["_run_id"] = run_id
        message.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(run_id)
        stored, missing = self.state.store_message_and_object_tree(
            remove_content_from_message(message), get_object_tree(message), session
        )
        assert stored
        for object_id, part in get_all_nested_objects(message).items():
            if object_id in missing:
                assert self.state.store_object(run_id, session, object_id, part.deflate())
        return message

    def push(self, node_id: int, *messages: Message, **changes: Any) -> Any:
        """As a SuperNode does it; ``changes`` to the request's fields or the metadata's."""
        request = PushMessagesRequest(
            node=Node(node_id=node_id),
            messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
            message_object_trees=[get_object_tree(m) for m in messages],
            clientapp_runtime_list=[1.0],
        )
        for name, value in changes.items():
            if name in ("message_object_trees", "clientapp_runtime_list"):
                field = getattr(request, name)
                del field[:]
                field.extend(value)
            else:
                setattr(request.messages_list[0].metadata, name, value)
        return self.servicer.PushMessages(request, Context(self.keys[node_id]))

    def push_objects(self, node_id: int, run_id: int, message: Message, pushed: Any) -> None:
        for object_id, part in get_all_nested_objects(message).items():
            if object_id in pushed.objects_to_push:
                assert self.push_object(
                    node_id, run_id, pushed.session_id, object_id, part.deflate()
                )

    def push_object(
        self, node_id: int, run_id: int, session_id: str, object_id: str, content: bytes
    ) -> bool:
        request = PushObjectRequest(
            node=Node(node_id=node_id),
            run_id=run_id,
            session_id=session_id,
            object_id=object_id,
            object_content=content,
        )
        answer = self.servicer.PushObject(request, Context(self.keys[node_id]))
        return bool(answer.stored)

    def pull(self, node_id: int, run_id: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=Node(node_id=node_id), run_id=run_id, object_id=object_id)
        answer = self.servicer.PullObject(request, Context(self.keys[node_id]))
        return bytes(answer.object_content)

    def confirm(self, node_id: int, run_id: int, message_id: str) -> None:
        request = ConfirmMessageReceivedRequest(
            node=Node(node_id=node_id), run_id=run_id, message_object_id=message_id
        )
        self.servicer.ConfirmMessageReceived(request, Context(self.keys[node_id]))

    def messages(self, kind: str, run_id: int) -> int:
        """How many orders ("ins") or replies ("res") of that run are in store."""
        sql = f"SELECT 1 FROM message_{kind} WHERE run_id = :run"  # noqa: S608
        return len(self.state.query(sql, {"run": uint64_to_int64(run_id)}))

    def collected(self, order: Message) -> list[Message]:
        """What the ServerApp gets as replies."""
        return self.state.get_message_res({order.metadata.message_id})


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    tmp_path = tmp_path_factory.mktemp("door")
    monkeypatch = pytest.MonkeyPatch()
    for name in fleet_door.CHECKS:  # put back what the door replaces
        monkeypatch.setattr(FleetServicer, name, getattr(FleetServicer, name))
    for name in (
        "store_message_and_object_tree", "delete_messages", "activate_node", "get_message_res",
    ):  # fmt: skip
        monkeypatch.setattr(SqlLinkState, name, getattr(SqlLinkState, name))
    for where, name in (fleet_door._LIMIT, fleet_door._CREATE):
        module = fleet_door.flower(where)
        monkeypatch.setattr(module, name, getattr(module, name))
    results = tmp_path / "results"
    results.mkdir()
    fleet_door.install(results)
    store = ObjectStoreFactory(str(tmp_path / "superlink.db"))
    states = LinkStateFactory(str(tmp_path / "superlink.db"), NoOpFederationManager(), store)
    yield Link(FleetServicer(states, store, True), results)
    monkeypatch.undo()


@pytest.fixture
def scene(link: Link) -> tuple[Link, int, int, int]:
    """The link, a run past its preflight, an honest node and one that lies."""
    run_id = link.run()
    link.prepare(run_id)
    return link, run_id, link.node(), link.node()


Scene = tuple[Link, int, int, int]


def content(parameters: int = 10, seed: int = 7) -> RecordDict:
    adapter = np.random.default_rng(seed).integers(0, 255, 4 * parameters, np.uint8)
    return RecordDict({
        "adapter": ArrayRecord({"payload": Array(adapter)}),
        "metrics": MetricRecord({"train-loss": 1.0}),
    })  # fmt: skip


def reply(order: Message, what: RecordDict | Error | None = None) -> Message:
    answer = Message(content() if what is None else what, reply_to=order)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    return answer


def test_an_honest_exchange_passes_whole_and_again_where_the_network_lost_the_answer(
    scene: Scene,
) -> None:
    link, run_id, node, _ = scene
    order = link.order(node, run_id, content(20))
    for object_id, part in get_all_nested_objects(order).items():
        assert link.pull(node, run_id, object_id) == part.deflate()
    for _again in range(2):
        link.confirm(node, run_id, order.metadata.message_id)
    answer = reply(order, content(ADAPTER))
    link.push(node, answer)
    link.push_objects(node, run_id, answer, link.push(node, answer))
    (back,) = link.collected(order)
    assert back.metadata.message_id == answer.metadata.message_id
    store = link.state.object_store
    assert all(store.get(i) for i in get_all_nested_objects(answer))


def test_a_reply_is_handed_out_when_all_of_it_is_there(scene: Scene) -> None:
    link, run_id, node, other = scene
    order, others = link.order(node, run_id), link.order(other, run_id)
    answer = reply(order, content(ADAPTER))
    pushed = link.push(node, answer)
    parts = get_all_nested_objects(answer)
    for object_id in pushed.objects_to_push:
        assert link.collected(order) == []
        link.push_object(node, run_id, pushed.session_id, object_id, parts[object_id].deflate())
    assert link.collected(others) == []
    (back,) = link.collected(order)
    assert back.metadata.message_id == answer.metadata.message_id
    assert not back.has_error()


def test_of_a_reply_that_never_becomes_whole_the_serverapp_is_told(scene: Scene) -> None:
    link, run_id, node, _ = scene
    order = link.order(node, run_id)
    answer = reply(order, content(ADAPTER))
    pushed = link.push(node, answer)
    assert link.collected(order) == []
    link.state.query(
        "UPDATE object_push_sessions SET expires_at = :then WHERE session_id = :id",
        {"id": pushed.session_id, "then": "2026-01-01 00:00:00.000000"},
    )
    assert len(link.collected(order)) == 1  # its objects are asked for in vain


def test_an_error_and_an_answer_before_the_adapter_is_known_pass(link: Link) -> None:
    run_id, node = link.run(), link.node()
    for what in (Error(3, "out of memory"), RecordDict({"preflight": ConfigRecord({"a": 1})})):
        order = link.order(node, run_id)
        answer = reply(order, what)
        link.push_objects(node, run_id, answer, link.push(node, answer))
        assert len(link.collected(order)) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"created_at": float("nan")}, "times"),
        ({"created_at": float("inf")}, "times"),
        ({"ttl": float("nan")}, "times"),
        ({"ttl": 1e300}, "times"),
        ({"clientapp_runtime_list": [float("nan")]}, "times"),
        ({"clientapp_runtime_list": [1.0] * 999}, "times"),
        ({"reply_to_message_id": ""}, "which only the ServerApp gives"),
        ({"reply_to_message_id": "0" * 64}, "no order of this run to the caller"),
        ({"message_type": "evaluate"}, "no order of this run to the caller"),
        ({"group_id": "x" * 9}, "no order of this run to the caller"),
        ({"group_id": "x" * 5 * 2**20}, "bytes beside its objects"),
        ({"message_id": "0" * 64}, "its objects are not its own"),
        ({"message_object_trees": []}, "1 messages with 0 object trees"),
        ({"message_object_trees": [ObjectTree(object_id="a" * 64)]}, "are not its own"),
        (
            {"message_id": FORGED, "message_object_trees": [ObjectTree(object_id=FORGED)]},
            "SHA-256 is none",
        ),
    ],
)
def test_a_reply_that_says_what_it_may_not_is_refused(
    scene: Scene, changes: dict[str, Any], why: str
) -> None:
    link, run_id, _, liar = scene
    order = link.order(liar, run_id)
    with pytest.raises(AbortedError, match=why):
        link.push(liar, reply(order), **changes)
    assert link.messages("res", run_id) == 0


def test_nobody_sends_or_answers_in_anothers_name(scene: Scene) -> None:
    link, run_id, node, liar = scene
    order, own = link.order(node, run_id), link.order(liar, run_id)
    with pytest.raises(AbortedError, match="another node than the caller"):
        link.push(liar, reply(order))
    with pytest.raises(AbortedError, match="no order of this run to the caller"):
        link.push(liar, reply(own), reply_to_message_id=order.metadata.message_id)
    with pytest.raises(AbortedError, match="which only the ServerApp gives"):
        link.push(
            liar, reply(own), reply_to_message_id="", src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=node,
        )  # fmt: skip
    with pytest.raises(AbortedError, match="2 messages with 2 object trees"):
        link.push(liar, reply(own), reply(order))
    assert (link.messages("ins", run_id), link.messages("res", run_id)) == (2, 0)


def test_a_reply_belongs_to_the_run_of_its_order(scene: Scene) -> None:
    link, run_id, _, liar = scene
    order, other = link.order(liar, run_id), link.run()
    with pytest.raises(AbortedError, match="no order of this run to the caller"):
        link.push(liar, reply(order), run_id=other)


def test_a_key_activates_itself_only(link: Link) -> None:
    site, stranger = link.node(), public_key_to_bytes(new_key().public_key())
    link.state.deactivate_node(site)
    request = ActivateNodeRequest(public_key=link.keys[site], heartbeat_interval=30)
    with pytest.raises(AbortedError, match="another than the caller's"):
        link.servicer.ActivateNode(request, Context(stranger))
    assert link.servicer.ActivateNode(request, Context(link.keys[site])).node_id == site


def test_a_reply_is_no_larger_than_the_runs_adapter(scene: Scene) -> None:
    link, run_id, _, liar = scene
    order = link.order(liar, run_id)
    with pytest.raises(AbortedError, match=rf"objects, where a reply of run {run_id} has 11"):
        link.push(liar, reply(order, content(4 * ADAPTER)))
    before = link.run()
    early = link.order(liar, before)
    with pytest.raises(AbortedError, match=r"15 objects, where .* has 8"):
        link.push(liar, reply(early, content(4 * ADAPTER)))


def test_an_object_is_no_larger_than_its_kind(scene: Scene) -> None:
    link, run_id, _, liar = scene
    order = link.order(liar, run_id)
    large = RecordDict({"preflight": ConfigRecord({"versions": "x" * 5 * 2**20})})
    answer = reply(order, large)
    with pytest.raises(AbortedError, match="that is no piece of an array"):
        link.push_objects(liar, run_id, answer, link.push(liar, answer))
    with pytest.raises(AbortedError, match="without the session"):
        link.push_object(liar, run_id, "", "a" * 64, b"x")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (json.dumps({"arraychunk_ids": [0] * 4}), "an array of 4 pieces, .*adapter has 3"),
        ("[" * 99_999, "cannot be read"),
        ("{}", "cannot be read"),
        ('{"arraychunk_ids": 3}', "cannot be read"),
    ],
)
def test_an_array_does_not_unfold_into_more_than_the_adapter(
    scene: Scene, body: str, why: str
) -> None:
    link, run_id, _, liar = scene
    with pytest.raises(AbortedError, match=why):
        link.push_object(liar, run_id, "any", "a" * 64, f"Array {'b' * 64} 9\0{body}".encode())


def test_a_reply_has_one_array(scene: Scene) -> None:
    link, run_id, _, liar = scene
    order = link.order(liar, run_id)
    two = content()
    two["more"] = content(20)["adapter"]
    answer = reply(order, two)
    with pytest.raises(AbortedError, match="a second array in one reply"):
        link.push_objects(liar, run_id, answer, link.push(liar, answer))
    # Nor does the ServerApp wait for the rest of it.
    assert answer.metadata.message_id not in link.state.object_store


def test_a_node_pulls_and_confirms_its_own_orders_only(scene: Scene) -> None:
    link, run_id, node, liar = scene
    order, own = link.order(node, run_id, content()), link.order(liar, run_id)
    answer = reply(order)
    link.push_objects(node, run_id, answer, link.push(node, answer))
    for message in (order, answer):
        for object_id in get_all_nested_objects(message):
            with pytest.raises(AbortedError, match="no order of this run to the caller"):
                link.pull(liar, run_id, object_id)
            with pytest.raises(AbortedError, match="no order of this run to the caller"):
                link.confirm(liar, run_id, object_id)
    with pytest.raises(AbortedError):
        link.pull(liar, link.run(), own.metadata.message_id)
    for object_id, part in get_all_nested_objects(order).items():
        assert link.pull(node, run_id, object_id) == part.deflate()


def test_what_two_orders_share_each_of_their_sites_may_pull(scene: Scene) -> None:
    link, run_id, node, other = scene
    shared = content()
    orders = {n: link.order(n, run_id, shared) for n in (node, other)}
    link.confirm(node, run_id, orders[node].metadata.message_id)
    for object_id, part in get_all_nested_objects(orders[other]).items():
        assert link.pull(other, run_id, object_id) == part.deflate()


def test_no_other_message_goes_down_with_a_reply(scene: Scene) -> None:
    link, run_id, node, liar = scene
    order, own = link.order(node, run_id), link.order(liar, run_id)
    answer = reply(own)
    tree = get_object_tree(answer)
    tree.children.append(get_object_tree(order))
    with pytest.raises(AbortedError, match="another message is among its objects"):
        link.push(liar, answer, message_object_trees=[tree])


def test_a_node_has_one_reply_in_store(scene: Scene) -> None:
    link, run_id, node, other = scene
    waiting = link.order(other, run_id)
    short = reply(waiting)
    link.push_objects(other, run_id, short, link.push(other, short))
    orders = [link.order(node, run_id) for _ in range(3)]
    for order in orders:
        answer = reply(order, content(ADAPTER))
        link.push_objects(node, run_id, answer, link.push(node, answer))
    assert link.messages("res", run_id) == 2
    assert len(link.collected(orders[2])) == len(link.collected(waiting)) == 1


def objects(link: Link) -> int:
    return len(link.state.object_store)


def expire(link: Link, order: Message) -> None:
    """Its time goes by, and the ServerApp looks once more."""
    link.state.query(
        "UPDATE message_ins SET ttl = 0 WHERE message_id = :id", {"id": order.metadata.message_id}
    )
    (gone,) = link.collected(order)
    assert gone.has_error()


def test_nothing_of_an_order_stays_that_nobody_fetches(scene: Scene) -> None:
    link, run_id, node, other = scene
    before = objects(link)
    for seed in range(3):  # rounds
        shared = content(ADAPTER, seed)
        late, fetched = link.order(node, run_id, shared), link.order(other, run_id, shared)
        link.confirm(other, run_id, fetched.metadata.message_id)
        assert all(part in link.state.object_store for part in get_all_nested_objects(late))
        expire(link, late)
    assert objects(link) == before


def test_nothing_of_an_order_stays_that_is_answered_unread(scene: Scene) -> None:
    """As by a site that does not run this app: it answers before it has fetched anything."""
    link, run_id, node, _ = scene
    before = objects(link)
    order = link.order(node, run_id, content(ADAPTER))
    answer = reply(order, Error(1, "another app"))
    link.push_objects(node, run_id, answer, link.push(node, answer))
    (arrived,) = link.collected(order)
    link.state.delete_messages({order.metadata.message_id})
    assert arrived.metadata.message_id in link.state.object_store  # still to be fetched
    link.state.object_store.delete(arrived.metadata.message_id)
    assert objects(link) == before


def test_nothing_of_a_reply_stays_that_comes_after_the_last_look(scene: Scene) -> None:
    link, run_id, node, _ = scene
    before = objects(link)
    order = link.order(node, run_id)
    link.confirm(node, run_id, order.metadata.message_id)
    answer = reply(order, content(ADAPTER))
    link.push_objects(node, run_id, answer, link.push(node, answer))
    assert objects(link) > before
    expire(link, order)
    assert (objects(link), link.messages("res", run_id)) == (before, 0)


def test_what_comes_after_a_reply_is_given_up_is_not_taken(scene: Scene) -> None:
    link, run_id, node, _ = scene
    before = objects(link)
    order = link.order(node, run_id)
    answer = reply(order, content(ADAPTER))
    pushed = link.push(node, answer)
    expire(link, order)
    with pytest.raises(AbortedError, match="comes too late"):
        link.push_objects(node, run_id, answer, pushed)
    with pytest.raises(AbortedError, match="comes too late"):
        link.push(node, answer)
    assert objects(link) == before


def test_a_site_cannot_spoil_an_order_that_is_still_to_come(scene: Scene) -> None:
    link, run_id, node, liar = scene
    adapter = content(ADAPTER, seed=8)  # as the first adapter, anybody can compute it
    own = link.order(liar, run_id)
    answer = reply(own, RecordDict())
    tree = get_object_tree(answer)
    lie = ObjectTree(object_id="f" * 64)
    for foreseen in list(get_all_nested_objects(adapter["adapter"]))[-4:]:
        tree.children.append(ObjectTree(object_id=foreseen, children=[lie]))
    link.push(liar, answer, message_object_trees=[tree])
    order = link.order(node, run_id, adapter)
    for object_id, part in get_all_nested_objects(order).items():
        assert link.pull(node, run_id, object_id) == part.deflate()
    # Nor does what it named stay for ever.
    link.state.cleanup_run(run_id)
    assert lie.object_id not in link.state.object_store


def test_a_refusal_is_one_line_with_the_keys_fingerprint(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(fleet_door, "_log", lines.append)
    link, run_id, _, liar = scene
    key = load_pem_public_key(link.keys[liar])
    order = link.order(liar, run_id)
    with pytest.raises(AbortedError):
        link.push(liar, reply(order), group_id="\n\x1b[31m")
    line_of = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "site.pub").write_bytes(line_of)
    (line,) = lines
    assert line.startswith(f"PushMessages of {fingerprint(tmp_path / 'site.pub')} refused: ")
    assert line.isprintable()


def test_nothing_that_flower_would_log_as_it_came_gets_past(scene: Scene) -> None:
    link, run_id, _, liar = scene
    context = Context(link.keys[liar])
    fab = GetFabRequest(node=Node(node_id=liar), hash_str=FORGED, run_id=run_id)
    with pytest.raises(AbortedError, match="SHA-256 is none"):
        link.servicer.GetFab(fab, context)
    with pytest.raises(AbortedError, match="SHA-256 is none"):
        link.push_object(liar, run_id, "any", FORGED, b"x")
    with pytest.raises(AbortedError, match=r"superlink\.register"):
        link.servicer.RegisterNode(RegisterNodeFleetRequest(public_key=b"x" * 10**6), context)


def test_a_refused_key_that_ssh_has_no_name_for_is_named_all_the_same(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(fleet_door, "_log", lines.append)
    odd = public_key_to_bytes(ec.generate_private_key(ec.SECP256K1()).public_key())
    with pytest.raises(AbortedError, match="another than the caller's"):
        link.servicer.ActivateNode(ActivateNodeRequest(public_key=b""), Context(odd))
    assert [line.split(" refused: ")[0] for line in lines] == ["ActivateNode of no site's key"]


def test_an_expired_order_takes_no_reply(scene: Scene) -> None:
    link, run_id, node, _ = scene
    order = link.order(node, run_id, ttl=1)
    time.sleep(1.1)
    link.push(node, reply(order, Error(3, "late")), created_at=time.time(), ttl=1000)
    assert (link.messages("res", run_id), link.collected(order)[0].has_content()) == (0, False)


def test_every_call_of_the_fleet_api_is_thought_of() -> None:
    calls = {name for name in vars(fleet_pb2_grpc.FleetServicer) if name[0].isupper()}
    assert calls == set(fleet_door.CHECKS) | CHECKED_BY_FLOWER


def test_an_order_that_a_supernode_lost_when_it_started_anew_is_not_waited_for(
    scene: Scene,
) -> None:
    link, run_id, node, other = scene
    state = link.state
    answered, lost = link.order(node, run_id), link.order(node, run_id)
    of_another = link.order(other, run_id)
    for receiver in (node, other):
        while state.get_message_ins(receiver, 1):
            pass
    answer = reply(answered)
    link.push_objects(node, run_id, answer, link.push(node, answer))
    waits = link.order(node, run_id)  # not delivered yet
    # Within seconds: the ServerApp has not looked meanwhile.
    assert state.deactivate_node(node)
    assert state.activate_node(node, 30)
    (error,) = link.collected(lost)
    assert error.has_error()
    assert str(error.error.reason).startswith("Error: Message Unavailable")
    assert [m.has_error() for m in link.collected(answered)] == [False]
    assert link.collected(of_another) == link.collected(waits) == []
    assert [m.metadata.message_id for m in state.get_message_ins(node, 9)] == [
        waits.metadata.message_id
    ]
