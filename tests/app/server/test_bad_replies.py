"""A bad reply alone is left out of a round, whatever is wrong with it."""

import math
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import CODECS, MIB
from app.server.exchange import REFUSED
from app.server.strategy import RoundError
from app.wire.adapter import Vector, initial_adapter
from app.wire.codec import encode
from tests.app.server.bad_replies import BAD, BAD_INT8, Pickled, with_bytes, zip_bomb
from tests.app.server.stand_in_sites import (
    ALL,
    Reply,
    changed,
    failing,
    moved,
    node,
    silent,
    strategy,
    trained,
)
from tests.stand_in_grid import Node, StandInGrid


def failing_without_a_reason(message: Message) -> Message:
    return Message(Error(code=1), reply_to=message)


def is_left_out_alone(reply: Reply, codec: str, **changes: Any) -> str:
    """Of three sites the second sends ``reply``. The reason recorded."""
    good = changed(moved, codec)
    nodes = {0: node(0, good), 1: node(1, reply), 2: node(2, good)}
    s = strategy([0, 1, 2], nodes, codec_up=codec, **ALL | changes)
    start = initial_adapter(s.layout, 1)
    new, line = s.train_round(1, start)
    assert line["partitions"] == [0, 2]
    assert set(line["rejected"]) == {"site-01"}
    assert line["rejected"]["site-01"]
    assert line["attempts"] == 1
    assert math.isfinite(line["train_loss"])
    others = strategy([0, 2], {0: node(0, good), 2: node(2, good)}, codec_up=codec, **ALL)
    alone, line_alone = others.train_round(1, start)
    assert new.tobytes() == alone.tobytes()
    for key in ("client_update_norms", "client_cosine", "weight_sum", "num_examples"):
        assert line[key] == line_alone[key], key
    return str(line["rejected"]["site-01"])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_alone_is_left_out_and_recorded_by_its_site(kind: str) -> None:
    is_left_out_alone(BAD[kind], "fp32")
    assert not Pickled.opened


@pytest.mark.parametrize("kind", BAD_INT8)
def test_a_bad_coarse_reply_alone_is_left_out_and_recorded_by_its_site(kind: str) -> None:
    assert is_left_out_alone(BAD_INT8[kind], "int8")


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_a_small_payload_that_unfolds_to_gigabytes_is_not_unfolded(codec: str) -> None:
    bomb = zip_bomb(4)
    assert len(bomb) < 5 * MIB
    tracemalloc.start()
    try:
        why = is_left_out_alone(with_bytes(lambda b: bomb, codec), codec)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "adapter" in why
    assert peak < 48 * MIB  # copies of the bomb as it is


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=60)
@given(data=st.binary(max_size=3000))
def test_whatever_bytes_a_site_sends_it_is_used_or_left_out_never_a_crash(
    codec: str, data: bytes
) -> None:
    good = changed(moved, codec)
    nodes = {0: node(0, good), 1: node(1, with_bytes(lambda b: data))}
    s = strategy([0, 1], nodes, codec_up=codec, **ALL)
    new, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert 0 in line["partitions"]
    assert ("site-01" in line["rejected"]) == (1 not in line["partitions"])
    assert np.isfinite(new).all()


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@settings(max_examples=60)
@given(data=st.binary(max_size=3000))
def test_whatever_a_site_packs_it_is_used_or_left_out_never_a_crash(
    codec: str, data: bytes
) -> None:
    size = len(zlib.decompress(encode(codec, np.ones(480, np.float32), np.zeros(480, np.float32))))
    plain = (data * (size // max(len(data), 1) + 1))[:size] or bytes(size)
    nodes = {
        0: node(0, changed(moved, codec)),
        1: node(1, with_bytes(lambda b: zlib.compress(plain))),
    }
    s = strategy([0, 1], nodes, codec_up=codec, **ALL)
    assert s.layout.size == 480
    new, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["partitions"]
    assert np.isfinite(new).all()


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (failing, "FloatingPointError"),
        (failing_without_a_reason, ""),
        (silent, "round-timeout-s"),
    ],
)
def test_a_site_that_fails_or_is_late_is_left_out_with_its_reason(bad: Node, why: str) -> None:
    s = strategy([0, 1, 2], {0: node(0), 1: bad, 2: node(2)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["partitions"] == [0, 2]
    assert why in line["rejected"]["site-01"]
    assert line["bytes_down"] == 3 * 4 * s.layout.size
    assert line["bytes_up"] == 2 * 4 * s.layout.size


def test_what_a_site_sends_once_is_counted_once_whatever_it_calls_it() -> None:
    def often(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        record = content.array_records["adapter"]
        for n in range(1000):
            record[f"payload {n}"] = record["payload"]
        return content

    s = strategy([0, 1], {0: node(0), 1: node(1, often)}, **ALL)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["bytes_up"] == 2 * 4 * s.layout.size


def test_a_site_whose_key_is_rotated_in_the_middle_of_a_run_keeps_its_name() -> None:
    s = strategy([0, 1, 2], {p: node(p) for p in range(3)}, **ALL)
    adapter, _ = s.train_round(1, initial_adapter(s.layout, 1))
    assert isinstance(s.grid, StandInGrid)
    s.grid.revoked = {s.sites.node_of[1]}
    _, line = s.train_round(2, adapter)
    assert line["partitions"] == [0, 2]
    assert line["rejected"] == {"site-01": REFUSED}


def test_fewer_usable_replies_than_wanted_end_the_run_naming_everyone_who_failed() -> None:
    nodes = {0: node(0), 1: silent, 2: node(2, BAD["nan"])}
    s = strategy([0, 1, 2], nodes, min_replies=2, **ALL)
    with pytest.raises(RoundError) as caught:
        s.train_round(3, initial_adapter(s.layout, 1))
    message = str(caught.value)
    for part in ("round 3", "1 usable", "min-replies", "site-01", "site-02"):
        assert part in message
    assert "site-00" not in message
