"""A round on the server: what goes out, what comes out, and what its line says."""

import numpy as np
import pytest
from flwr.app import RecordDict

from app.config import STRATEGIES
from app.wire.adapter import Vector, initial_adapter
from tests.app.server.stand_in_sites import (
    ALL,
    LINEAR,
    SITES,
    aggregate_of,
    changed,
    moved,
    node,
    plus,
    received,
    replace_nodes,
    strategy,
    trained,
    with_metric,
)
from tests.samples import run_config
from tests.stand_in_grid import Clock, Node, StandInGrid


@pytest.mark.parametrize("shared", [True, False])
def test_a_site_that_waits_for_its_turn_on_a_shared_device_is_not_late(
    clock: Clock, shared: bool
) -> None:
    s = strategy([0, 1], round_timeout_s=30.0, max_retries=0)
    if shared:
        s.sites.turns.update({0: "one GPU", 1: "one GPU"})
    assert isinstance(s.grid, StandInGrid)
    grid = s.grid

    def after(partition_id: int) -> Node:
        work, done_s = node(partition_id), 20.0 * (partition_id + 1)
        return lambda m: grid.later(m, work, clock, done_s)

    grid.nodes |= {s.sites.node_of[p]: after(p) for p in (0, 1)}
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["partitions"] == ([0, 1] if shared else [0])
    late = {} if shared else {"site-01": "no reply within strategy.round-timeout-s = 30"}
    assert line["rejected"] == late


@pytest.mark.parametrize("reverse", [False, True])
def test_a_round_aggregates_the_replies_whatever_their_order(reverse: bool) -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, reverse=reverse, **ALL)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)

    expected, alphas = aggregate_of({p: moved(p, start) for p in range(3)})
    assert new.dtype == np.float32
    np.testing.assert_array_equal(new, expected)
    assert line["partitions"] == [0, 1, 2]
    assert line["alphas"] == alphas.tolist()
    assert line["num_examples"] == [10, 20, 30]
    assert line["train_site_losses"] == [1, 2, 3]
    assert line["num_tokens"] == [4000, 4001, 4002]
    assert line["train_loss"] == pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60)
    assert line["bytes_down"] == line["bytes_up"] == 3 * 4 * s.layout.size
    assert line["adapter_norm"] == pytest.approx(float(np.linalg.norm(new)))
    assert line["update_norm"] == pytest.approx(float(np.linalg.norm(new - start)))
    assert line["rejected"] == {}
    assert line["round"] == 1


def test_every_sampled_site_gets_the_adapter_with_the_round_and_the_layout() -> None:
    s = strategy([0, 1, 2, 3], {p: node(p) for p in range(4)}, round_timeout_s=33.0)
    start = initial_adapter(s.layout, 1)
    s.train_round(7, start)
    grid = s.grid
    assert isinstance(grid, StandInGrid)
    chosen = s.sample(7)
    assert len(chosen) == 2
    assert [m.metadata.dst_node_id for m in grid.sent] == [s.sites.node_of[p] for p in chosen]
    for message in grid.sent:
        assert received(message).tobytes() == start.tobytes()
        job = message.content.config_records["job"]
        assert job["round"] == 7
        assert job["layout"] == s.layout.hash
        assert job["upload"] == "7:7:0"


def test_sites_that_agree_give_what_they_agree_on() -> None:
    def same(partition_id: int, adapter: Vector) -> RecordDict:
        reply = trained(0, adapter)
        reply.metric_records["metrics"]["num-examples"] = 10 * (partition_id + 1)
        return reply

    s = strategy([0, 1, 2], {p: node(p, same) for p in range(3)}, **ALL)
    start = initial_adapter(s.layout, 1)
    new, _ = s.train_round(1, start)
    np.testing.assert_allclose(new, moved(0, start), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_steps", [10, -1])
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_site_that_claims_a_billion_rows_counts_as_much_as_all_others_together_at_most(
    name: str, max_steps: int
) -> None:
    config = run_config(**SITES, max_steps=max_steps)

    def greedy(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        rows = 10**9 - 1 if partition_id == 2 else 10 * (partition_id + 1)
        content.metric_records["metrics"]["num-examples"] = rows
        content.metric_records["metrics"]["steps"] = config.steps(rows)
        return content

    nodes = {p: node(p, greedy) for p in range(3)}
    s = strategy([0, 1, 2], nodes, strategy_name=name, max_steps=max_steps, **ALL)
    s.sites.num_examples[2] = 10**9 - 1
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    assert line["num_examples"] == [10, 20, 10**9 - 1]  # as it said, for all to see
    assert line["shares"] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    vectors = np.stack([moved(p, start) for p in range(3)]).astype(float)
    np.testing.assert_allclose(new, np.array(line["shares"]) @ vectors, atol=1e-6)
    assert line["train_loss"] == pytest.approx(1 / 6 + 2 / 3 + 3 / 2)


def test_rows_that_a_round_did_not_use_weigh_nothing() -> None:
    """Ten steps of 16 rows: 160 of 10,000 count, and all of 100."""
    s = strategy([0, 1], {p: node(p) for p in range(2)}, max_share=1.0, **ALL)
    s.sites.num_examples.update({0: 10_000, 1: 100})
    rows = {0: 10_000, 1: 100}
    replace_nodes(s, lambda p: node(p, with_metric("num-examples", rows[p])))
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["shares"] == pytest.approx([160 / 260, 100 / 260])


UNIT = np.eye(480, dtype=np.float32)


@pytest.mark.parametrize(
    ("steps", "cosine"),
    [
        ([UNIT[3], UNIT[3]], 1.0),
        ([UNIT[3], 2 * UNIT[3], 5 * UNIT[3]], 1.0),
        ([UNIT[3], UNIT[7]], 0.0),
        ([UNIT[3], -UNIT[3]], -1.0),
        ([UNIT[3], UNIT[3] + UNIT[9]], 0.5**0.5),
        ([UNIT[3], UNIT[3], UNIT[7]], 1 / 3),
        ([UNIT[3], 0 * UNIT[3]], 0.0),
        ([UNIT[3]], None),
    ],
    ids=["identical", "parallel", "orthogonal", "opposite", "45 degrees", "three", "zero", "one"],
)
def test_the_cosine_between_the_sites_changes(steps: list[Vector], cosine: float | None) -> None:
    nodes = {p: node(p, changed(plus(s))) for p, s in enumerate(steps)}
    s = strategy(list(nodes), nodes, strategy_name="fedavg", **ALL)
    # Their adapters have nearly the same direction; it is their changes that count.
    _, line = s.train_round(1, np.full(480, 64, np.float32))
    if cosine is None:
        assert line["client_cosine"] is None
    else:
        assert line["client_cosine"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_what_the_sites_weights_add_up_to(name: str) -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, strategy_name=name, **ALL)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    shares = np.array(line["alphas"]) * [10, 20, 30] / 60
    assert line["weight_sum"] == pytest.approx(float(shares.sum()))
    vectors = np.stack([moved(p, start) for p in range(3)]).astype(float)
    if name in ("fedavg", "fedprox"):
        assert line["alphas"] == [1.0, 1.0, 1.0]
        assert line["weight_sum"] == pytest.approx(1)
    else:
        assert line["weight_sum"] > 1.01  # it undoes what averaging shortens
    if name != "rda":  # whose factors are those of each tensor
        origin = start.astype(float) if name == "fedavgopt-delta" else np.zeros(480)
        np.testing.assert_allclose(new, origin + shares @ (vectors - origin), atol=1e-5)


def test_the_servers_step_makes_a_rounds_change_longer_and_its_line_tells_its_length() -> None:
    rounds = []
    for server_lr in (1.0, 1.5):
        s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, server_lr=server_lr, **ALL)
        start = initial_adapter(s.layout, 1)
        rounds.append(s.train_round(1, start))
    (once, before), (further, line) = rounds
    np.testing.assert_allclose(further - start, 1.5 * (once - start), atol=1e-6)
    assert line["update_norm"] == pytest.approx(1.5 * before["update_norm"], rel=1e-5)
    # What the sites did is not the server's doing.
    for key in ("alphas", "weight_sum", "client_update_norms", "client_cosine"):
        assert line[key] == before[key]


def test_the_norm_of_the_weight_change_is_that_of_the_matrices_themselves() -> None:
    alpha = 7
    s = strategy([0, 1], {p: node(p) for p in range(2)}, lora_alpha=alpha, **ALL)
    start = initial_adapter(s.layout, 1)
    assert not any(a.any() for n, a in s.layout.split(start).items() if "lora_B" in n)
    new, line = s.train_round(1, start)
    arrays, squares = s.layout.split(new), 0.0
    for name in LINEAR:
        a, b = (arrays[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        change = alpha / 2 * b.astype(float) @ a.astype(float)
        assert change.shape == (6, 4)
        squares += float((change**2).sum())
    assert line["weight_change_norm"] == pytest.approx(squares**0.5, rel=1e-9)
    norms = [float(np.linalg.norm(moved(p, start) - start)) for p in (0, 1)]
    assert line["client_update_norms"] == pytest.approx(norms, rel=1e-5)
