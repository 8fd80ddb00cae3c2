"""Which uploads an adapter is made of, by name, also behind runs that went back."""

from typing import Any

from flwr.app import Message

from app.server.orders import taken_before
from app.wire.adapter import initial_adapter
from tests.app.server.stand_in_sites import ALL, failing, node, strategy
from tests.stand_in_grid import Node


def lines(*partitions: list[int], attempts: int = 1) -> list[dict[str, Any]]:
    return [
        {"round": n, "partitions": p, "attempts": attempts} for n, p in enumerate(partitions, 1)
    ]


def chain(*runs: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"run_id": run_id, "last_round": last} for run_id, last in runs]


def test_each_sites_last_one_counts_in_the_run_that_made_its_round() -> None:
    made = lines([0, 1], [1, 2], [2], [3])
    taken = taken_before(chain(("11", 2), ("12", 3), ("13", 4)), made)
    assert taken == {0: "11:1:0", 1: "11:2:0", 2: "12:3:0", 3: "13:4:0"}


def test_a_round_that_was_made_again_is_the_later_runs() -> None:
    """Run 12 took over rounds 1 to 5, and lost two; run 13 took over two, and made more."""
    made = lines([1], [2], [3], [4], [5], [6])
    taken = taken_before(chain(("11", 5), ("12", 3), ("13", 2), ("14", 6)), made)
    assert taken == {1: "11:1:0", 2: "11:2:0", **{n: f"14:{n}:0" for n in (3, 4, 5, 6)}}


def test_of_several_attempts_the_last_one_counts() -> None:
    assert taken_before(chain(("11", 1)), lines([0], attempts=3)) == {0: "11:1:2"}


def test_an_order_says_which_upload_was_taken_last() -> None:
    """Site 1 fails once, in round 2, which is repeated then; site 2 always."""
    orders: dict[int, list[tuple[Any, Any]]] = {0: [], 1: [], 2: []}

    def noted(partition_id: int) -> Node:
        def answer(message: Message) -> Message | Exception | None:
            job = message.content.config_records["job"]
            assert job.count_bytes()  # as the site's gate does; no empty text has any
            orders[partition_id].append((job["upload"], job.get("taken")))
            fails = partition_id == 2 or (partition_id == 1 and job["upload"] == "7:2:0")
            return (failing if fails else node(partition_id))(message)

        return answer

    s = strategy([0, 1, 2], {p: noted(p) for p in orders}, min_replies=2, **ALL)
    adapter = initial_adapter(s.layout, 1)
    for server_round in (1, 2, 3):
        adapter, _ = s.train_round(server_round, adapter)
    uploads = ["7:1:0", "7:2:0", "7:2:1", "7:3:0"]
    taken = [None, "7:1:0", "7:1:0", "7:2:1"]
    assert orders[0] == orders[1] == list(zip(uploads, taken, strict=True))
    assert orders[2] == [(upload, None) for upload in uploads]
