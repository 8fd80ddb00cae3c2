"""Who calls the Fleet API with a right key and says what is not so, while a run goes on.

One federation for all of it: two honest sites at work, a third whose key an attacker uses in place
of its SuperNode, a fourth that a stranger wants to pass for. The attacks go over TLS to the real
SuperLink; the attacker reads the ids that it would have to guess from the SuperLink's database.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.grpc import create_channel
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.utils import int64_to_uint64, uint64_to_int64

from superlink.certificates import Key, load_key, new_key
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.provision import provision
from superlink.site_keys import fingerprint, fingerprint_of_pem
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.federation.drill import until
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES, HONEST, LIAR, WANTED, ROUNDS = 4, 2, 2, 3, 2
LARGE_BYTES = 150 * 10**6
NAN, ORDER = float("nan"), "0" * 64
FORGED = "x\n\x1b[31m[door] PushMessages of SHA256:somebody else refused: "
Answer = tuple[grpc.StatusCode, str]


class Caller:
    """Somebody with a key pair and the CA's certificate, at the Fleet API."""

    def __init__(self, federation: LocalFederation, key: Key) -> None:
        self.public_key = public_key_to_bytes(key.public_key())
        self._channel = create_channel(
            server_address=f"localhost:{federation.fleet_port}",
            insecure=False,
            root_certificates=(federation.public / "ca.crt").read_bytes(),
            interceptors=[
                RuntimeVersionClientInterceptor(component_name="SuperNode"),
                NodeAuthClientInterceptor(key, key.public_key()),
            ],
        )
        self.stub = FleetStub(self._channel)

    def says(self, call: str, request: Any) -> Answer:
        """What the SuperLink answers."""
        try:
            getattr(self.stub, call)(request, timeout=60)
        except grpc.RpcError as err:
            return err.code(), err.details() or ""
        return grpc.StatusCode.OK, ""


@dataclass
class Scene:
    federation: LocalFederation
    control: Control
    answers: dict[str, tuple[str, Answer]] = field(default_factory=dict)  # name -> call, answer
    ended: list[int] = field(default_factory=list)

    @property
    def log(self) -> str:
        return (self.federation.work / "logs" / "superlink.log").read_text(errors="replace")

    @property
    def run(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(
            next(self.federation.results.glob("[0-9]*/run.json")).read_text()
        )
        return facts

    def key(self, number: int) -> Key:
        return load_key(self.federation.federation / f"site-{number:02d}" / "supernode.key")

    def fingerprint(self, number: int) -> str:
        return fingerprint(self.federation.public / f"site-{number:02d}.pub")

    def node(self, number: int) -> int:
        key = public_key_to_bytes(self.key(number).public_key())
        return next(int(n.node_id) for n in self.control.nodes() if n.public_key == key)

    def status(self, number: int) -> str:
        key = public_key_to_bytes(self.key(number).public_key())
        return self.control.node_status()[key]

    def sql(self, statement: str, *values: Any) -> list[Any]:
        path = self.federation.work / "superlink" / "superlink.db"
        with sqlite3.connect(path, timeout=60) as database:
            return database.execute(statement, values).fetchall()

    def order_to(self, number: int) -> tuple[str, int, str]:
        """Id, run and type of an order that this site has not answered yet."""
        node = uint64_to_int64(self.node(number))
        found: list[Any] = []

        def there() -> bool:
            found[:] = self.sql(
                "SELECT message_id, run_id, message_type FROM message_ins WHERE dst_node_id = ?",
                node,
            )
            return bool(found)

        until(there, 120, f"an order to site-{number:02d}")
        message_id, run_id, kind = found[-1]
        return message_id, int64_to_uint64(run_id), kind


@pytest.fixture(scope="module")
def scene(
    models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    work = tmp_path_factory.mktemp("door")
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds={ROUNDS} strategy.min-nodes={HONEST} strategy.fraction-train=1.0",
        "strategy.require-all-nodes=false strategy.fraction-evaluate=0.0",
        'train.training-arguments.max-steps=2 communication.down="int4" communication.up="fp32"',
    ]
    with LocalFederation(work, models_dir, work / "results", HONEST) as federation:
        provision(federation.federation, SITES, f"localhost:{federation.fleet_port}", [])
        prepare_data(federation.federation, Split(str(source), SITES))
        scene = Scene(federation, federation.start())
        until(lambda: all(scene.status(n) == "online" for n in range(HONEST)), 120, "two sites")
        liar = Caller(federation, scene.key(LIAR))
        own = ActivateNodeRequest(public_key=liar.public_key, heartbeat_interval=1800)
        assert liar.says("ActivateNode", own) == (grpc.StatusCode.OK, "")
        # What a NaN in a reply made of it, when Flower still took it: its reader fails for good.
        scene.sql(
            "CREATE TRIGGER spoilt AFTER INSERT ON message_res WHEN NEW.src_node_id = (SELECT "
            "node_id FROM node WHERE status = 'online' AND heartbeat_interval = 1800) BEGIN UPDATE "
            "message_res SET created_at = NULL WHERE message_id = NEW.message_id; END"
        )
        job = threading.Thread(
            target=lambda: scene.ended.append(
                submit(REPOSITORY, overrides, scene.control, federation.public)
            )
        )
        job.start()
        attack(scene, liar)
        answer_until_the_end(scene, liar, job)
        yield scene


def next_order(scene: Scene, liar: Caller) -> Message | None:
    node = Node(node_id=scene.node(LIAR))
    answer = liar.stub.PullMessages(PullMessagesRequest(node=node))
    return message_from_proto(answer.messages_list[0]) if answer.messages_list else None


def answer_until_the_end(scene: Scene, liar: Caller, job: threading.Thread) -> None:
    """As an honest site that cannot take part."""
    deadline = time.monotonic() + 240
    while job.is_alive():
        assert time.monotonic() < deadline, scene.log[-3000:]
        if order := next_order(scene, liar):
            assert answers(liar, scene.node(LIAR), order) == (grpc.StatusCode.OK, "")
        job.join(1)


def answers(liar: Caller, me: int, order: Message) -> Answer:
    """With an error, and all that belongs to it."""
    answer = reply(order, Error(3, "this site is down"))
    try:
        session = liar.stub.PushMessages(pushed(me, answer)).session_id
    except grpc.RpcError as err:
        return err.code(), err.details() or ""
    return liar.says(
        "PushObject",
        PushObjectRequest(
            node=Node(node_id=me), run_id=answer.metadata.run_id, session_id=session,
            object_id=answer.object_id, object_content=answer.deflate(),
        ),
    )  # fmt: skip


def reply(order: Message, what: RecordDict | Error | None = None) -> Message:
    answer = Message(RecordDict() if what is None else what, reply_to=order)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    return answer


def pushed(node: int, *messages: Message, **metadata: Any) -> PushMessagesRequest:
    request = PushMessagesRequest(
        node=Node(node_id=node),
        messages_list=[message_to_proto(remove_content_from_message(m)) for m in messages],
        message_object_trees=[get_object_tree(m) for m in messages],
        clientapp_runtime_list=[1.0],
    )
    for name, value in metadata.items():
        setattr(request.messages_list[0].metadata, name, value)
    return request


def attack(scene: Scene, liar: Caller) -> None:
    """Everything that a registered site could do to the others and to the SuperLink."""
    orders: list[Message] = []

    def asked() -> bool:
        orders.extend(filter(None, [next_order(scene, liar)]))
        return bool(orders)

    until(asked, 120, "an order to the liar")
    own, me, them = reply(orders[0]), scene.node(LIAR), scene.node(0)
    theirs, run, kind = scene.order_to(0)
    at: dict[str, Any] = {"node": Node(node_id=me), "run_id": run}
    crowd = ObjectTree(object_id=own.metadata.message_id)
    crowd.children.extend(ObjectTree(object_id=f"{n:064x}") for n in range(99))
    crowded = pushed(me, own)
    crowded.message_object_trees[0].CopyFrom(crowd)
    requests: dict[str, tuple[str, Any]] = {
        "an order": ("PushMessages", pushed(
            me, own, reply_to_message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=them)),
        "an order to itself": ("PushMessages", pushed(
            me, own, reply_to_message_id="", src_node_id=SUPERLINK_NODE_ID, dst_node_id=me)),
        "a reply in their name": ("PushMessages", pushed(
            me, own, src_node_id=them, reply_to_message_id=theirs, message_type=kind)),
        "a reply to their order": ("PushMessages", pushed(
            me, own, reply_to_message_id=theirs, message_type=kind)),
        "two messages": ("PushMessages", pushed(me, own, own)),
        "another run": ("PushMessages", pushed(me, own, run_id=run ^ 1)),
        "created at NaN": ("PushMessages", pushed(me, own, created_at=NAN)),
        "a ttl of NaN": ("PushMessages", pushed(me, own, ttl=NAN)),
        "a crowd of objects": ("PushMessages", crowded),
        "a long message": ("PushMessages", pushed(me, own, group_id="x" * 5 * 2**20)),
        "an object for no session": ("PushObject", PushObjectRequest(
            **at, object_id=ORDER, object_content=b"x")),
        "a forged log line": ("GetFab", GetFabRequest(**at, hash_str=FORGED)),
        "a large object": ("PushObject", PushObjectRequest(
            **at, session_id="any", object_id=ORDER, object_content=bytes(5 * 2**20))),
        "an array of many pieces": ("PushObject", PushObjectRequest(
            **at, session_id="any", object_id=ORDER, object_content=b"Array x 9\0"
            + json.dumps({"arraychunk_ids": [0] * 9999}).encode())),
        "their order's content": ("PullObject", PullObjectRequest(**at, object_id=theirs)),
        "their order's receipt": ("ConfirmMessageReceived", ConfirmMessageReceivedRequest(
            **at, message_object_id=theirs)),
    }  # fmt: skip
    for name, (call, request) in requests.items():
        scene.answers[name] = call, liar.says(call, request)
    # Its own order is all that it may pull; then it answers it, as any site may.
    mine = PullObjectRequest(**at, object_id=orders[0].metadata.message_id)
    scene.answers["its own order"] = "PullObject", liar.says("PullObject", mine)
    scene.answers["its own answer"] = "PushMessages", answers(liar, me, orders[0])


WHY = {
    "an order": "which only the ServerApp gives",
    "an order to itself": "which only the ServerApp gives",
    "a reply in their name": "another node than the caller",
    "a reply to their order": "answers no order of this run to the caller",
    "two messages": "2 messages with 2 object trees",
    "another run": "answers no order of this run to the caller",
    "created at NaN": "times [nan",
    "a ttl of NaN": ", nan",
    "a crowd of objects": "100 objects, where a reply of run",
    "a long message": "bytes beside its objects",
    "an object for no session": "without the session",
    "a forged log line": "should be a SHA-256 is none",
    "a large object": "no piece of an array",
    "an array of many pieces": "an array of 9999 pieces",
    "their order's content": "belongs to no order of this run to the caller",
    "their order's receipt": "no order of this run to the caller",
}


@pytest.mark.parametrize("name", WHY)
def test_a_site_that_lies_is_refused_and_named_by_its_key(scene: Scene, name: str) -> None:
    call, (code, details) = scene.answers[name]
    print(f"{name}: {code.name}: {details}")
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert WHY[name] in details
    line = f"[door] {call} of {scene.fingerprint(LIAR)} refused: {details}"
    assert line in scene.log


@pytest.mark.parametrize("name", ["its own order", "its own answer"])
def test_what_is_its_own_it_may_pull_and_answer(scene: Scene, name: str) -> None:
    assert scene.answers[name][1] == (grpc.StatusCode.OK, "")


def test_the_run_goes_on_without_the_site_whose_reply_cannot_be_read(scene: Scene) -> None:
    assert scene.ended == [0]
    assert scene.run["status"] == "completed"
    assert list(scene.run["sites"]) == ["site-00", "site-01"]
    (why,) = scene.run["left_out"].values()
    assert "the SuperLink cannot read its reply (HTTP 500)" in why
    metrics = scene.federation.results / "latest" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [m["partitions"] for m in lines] == [[0, 1]] * ROUNDS
    assert [m["rejected"] for m in lines] == [{}] * ROUNDS
    refused = [line for line in scene.log.splitlines() if "[door]" in line]
    assert not [line for line in refused if scene.fingerprint(LIAR) not in line], refused


def test_a_stranger_does_not_activate_the_site_whose_pub_file_it_has(scene: Scene) -> None:
    stranger = Caller(scene.federation, new_key())
    wanted = public_key_to_bytes(scene.key(WANTED).public_key())
    code, details = stranger.says(
        "ActivateNode", ActivateNodeRequest(public_key=wanted, heartbeat_interval=1800)
    )
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert str(scene.node(WANTED)) not in details
    assert scene.status(WANTED) == "registered"
    scene.federation.start_node(WANTED)
    until(lambda: scene.status(WANTED) == "online", 120, "the site itself online")


def test_a_stranger_writes_nothing_into_the_log_but_that_it_was_refused(scene: Scene) -> None:
    stranger, before = Caller(scene.federation, new_key()), len(scene.log)
    code, _ = stranger.says(
        "RegisterNode", RegisterNodeFleetRequest(public_key=b"written by a stranger " * 10_000)
    )
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    said = scene.log[before:]
    assert "[door] RegisterNode of SHA256:" in said
    assert "written by a stranger" not in said


@pytest.mark.parametrize("known", [False, True])
def test_large_calls_are_refused_before_they_are_kept(scene: Scene, known: bool) -> None:
    caller = Caller(scene.federation, scene.key(LIAR) if known else new_key())
    superlink = psutil.Process(scene.federation.processes["superlink"].pid)
    before = superlink.memory_info().rss
    request = PushObjectRequest(
        node=Node(node_id=scene.node(LIAR)), run_id=1, object_content=bytes(LARGE_BYTES)
    )
    codes = [caller.says("PushObject", request)[0] for _ in range(2)]
    assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
    assert superlink.memory_info().rss - before < LARGE_BYTES / 3
    told = (
        f" with {fingerprint_of_pem(caller.public_key)} (not checked) unread: refused as too large"
    )
    until(lambda: scene.log.count(told) == 2, 60, "two lines in the log")
