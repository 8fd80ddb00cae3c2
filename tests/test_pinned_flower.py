"""The pinned Flower still has, and still uses, each of its internals that we replace.

Whoever moves to another Flower sees here what no longer takes effect: a name that nobody reads any
more can be replaced without an error and without an effect.
"""

import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from superlink import control_acts, fleet_door

# Where a name is replaced, by which of our files, and the function that must read it.
REPLACED = [
    (
        "superlink/entrypoint.py", "flwr.supercore.sql_mixin", "SQLITE_PRAGMAS",
        "_set_sqlite_pragmas",
    ),
    (
        "superlink/fleet_door.py", "flwr.superlink.cli.flower_superlink",
        "GRPC_MAX_MESSAGE_LENGTH", "_run_fleet_api_grpc_rere",
    ),
    (
        "superlink/fleet_door.py", "flwr.superlink.cli.flower_superlink",
        "generic_create_grpc_server", "_run_fleet_api_grpc_rere",
    ),
    (
        "supernode/pinned.py", "flwr.supernode.start_client_internal", "_pull_and_store_message",
        "start_client_internal",
    ),
    (
        "supernode/pinned.py", "flwr.supernode.start_client_internal", "_verify_fab",
        "_pull_and_store_message",
    ),
    (
        "supernode/pinned.py", "flwr.supernode.start_client_internal", "FAB_VERIFICATION_ERROR",
        "_pull_and_store_message",
    ),
    (
        "supernode/warm/superexec.py", "flwr.supercore.superexec.executor.subprocess_executor",
        "subprocess", "SubprocessExecutor.launch",
    ),
    (
        "supernode/warm/superexec.py", "flwr.supercore.exit.exit_handler",
        "registered_exit_handlers", "trigger_exit_handlers",
    ),
]  # fmt: skip
# What we wrap or pass on by name, and the parameters that it must have.
CALLED = [
    (
        "flwr.supernode.start_client_internal:_pull_and_store_message",
        ["state", "get_fab", "trusted_entities"],
    ),
    ("flwr.supernode.start_client_internal:_verify_fab", ["fab", "trusted_entities"]),
    (
        "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.store_message_and_object_tree",
        ["self", "message", "object_tree", "session_id"],
    ),
    (
        "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.delete_messages",
        ["self", "message_ins_ids"],
    ),
    (
        "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.get_task_events",
        ["self", "run_id", "task_ids", "after_task_event_id"],
    ),
    (
        "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState."
        "_cleanup_expired_task_tokens_locked",
        ["self"],
    ),
    (
        "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.claim_task",
        ["self", "task_id"],
    ),
    (
        "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.activate_node",
        ["self", "node_id", "heartbeat_interval"],
    ),
    (
        "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.get_message_res",
        ["self", "message_ids"],
    ),
    ("flwr.supercore.grpc:generic_create_grpc_server", ["interceptors"]),
    *(
        (
            "flwr.server.superlink.fleet.grpc_rere.fleet_servicer:FleetServicer." + name,
            ["self", "request", "context"],
        )
        for name in fleet_door.CHECKS
    ),
    *(
        (
            "flwr.superlink.servicer.control.control_servicer:ControlServicer." + name,
            ["self", "request", "context"],
        )
        for name in control_acts.ACTS
    ),
    (
        "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.get_node_info",
        ["self", "node_ids"],
    ),
]
# Whose words are checked at the door, column by column.
COLUMNS = {
    "message_ins": {
        "message_id", "run_id", "dst_node_id", "message_type", "group_id", "created_at", "ttl",
    },
    "message_res": {
        "message_id", "reply_to_message_id", "run_id", "src_node_id", "delivered_at",
    },
    "objects": {"object_id", "ref_count"},
    "object_children": {"parent_id", "child_id"},
    "object_push_sessions": {"session_id", "pending_count", "expires_at"},
    "object_push_session_roots": {"session_id", "root_object_id"},
}  # fmt: skip


def found(path: str) -> Any:
    module, _, names = path.partition(":")
    thing: Any = import_module(module)
    for name in names.split(".") if names else ():
        assert hasattr(thing, name), f"the pinned Flower has no {path}, which we wrap"
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize(("ours", "module", "name", "reader"), REPLACED)
def test_what_we_replace_is_there_and_is_read(
    ours: str, module: str, name: str, reader: str
) -> None:
    found(f"{module}:{name}")
    code = found(f"{module}:{reader}").__code__
    assert name in code.co_names, f"Flower's {module}.{reader} reads no {name}: see {ours}"


def test_a_supernode_starts_superexec_by_its_bare_name_and_tells_who_it_is() -> None:
    source = inspect.getsource(found("flwr.supernode.start_client_internal:start_client_internal"))
    assert 'command = ["flower-superexec"]' in source  # the first in the PATH: supernode/warm/bin
    assert 'command += ["--parent-pid", str(os.getpid())]' in source


def test_a_refused_supernode_ends_itself_by_a_signal() -> None:
    source = inspect.getsource(found("flwr.supercore.retry.grpc_retry"))
    assert "os.kill(os.getpid(), signal.SIGINT)" in source  # replaced by supernode/pinned.py
    assert source.count("os.kill(") == 1


@pytest.mark.parametrize(("path", "parameters"), CALLED)
def test_what_we_wrap_is_called_as_before(path: str, parameters: list[str]) -> None:
    now = list(inspect.signature(found(path)).parameters)
    assert [p for p in now if p in parameters] == parameters, f"{path} takes {now}"


def test_the_pragma_that_we_change_is_one_of_flowers() -> None:
    pragmas = dict(found("flwr.supercore.constant:SQLITE_PRAGMAS"))
    assert "busy_timeout" in pragmas
    assert pragmas["foreign_keys"] == "ON"  # or the door could not drop a false object


def test_the_database_has_the_columns_that_the_door_reads() -> None:
    from flwr.supercore.state.schema.corestate_tables import create_corestate_metadata
    from flwr.supercore.state.schema.linkstate_tables import create_linkstate_metadata
    from flwr.supercore.state.schema.objectstore_tables import create_objectstore_metadata

    def tables() -> Iterator[tuple[str, set[str]]]:
        for create in (
            create_linkstate_metadata, create_corestate_metadata, create_objectstore_metadata
        ):  # fmt: skip
            for name, table in create().tables.items():
                yield name, {column.name for column in table.columns}

    there = dict(tables())
    for name, columns in COLUMNS.items():
        assert columns <= there.get(name, set()), f"Flower's table {name} is another"


@pytest.mark.parametrize("gone", [*fleet_door.CHECKS, "FleetServicer"])
def test_a_superlink_without_its_door_does_not_start(
    gone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    module = import_module("flwr.server.superlink.fleet.grpc_rere.fleet_servicer")
    owner = module if gone == "FleetServicer" else module.FleetServicer
    monkeypatch.delattr(owner, gone)
    if owner is not module:  # nor in the class that Flower's is derived from
        monkeypatch.delattr(owner.__base__, gone)
    with pytest.raises(SystemExit) as caught:
        fleet_door.install(tmp_path)
    told = str(caught.value)
    assert told.startswith("superlink: flwr ")
    assert gone in told
    assert "superlink/fleet_door.py" in told
    assert "\n" not in told
