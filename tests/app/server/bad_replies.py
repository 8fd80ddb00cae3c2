"""Replies to an order to train that no site of ours would send, by what is wrong with them."""

import io
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from app.wire.adapter import Vector
from app.wire.codec import BLOCK, encode
from tests.app.server.stand_in_sites import (
    LAYOUT,
    Reply,
    changed,
    metrics_of,
    moved,
    times,
    trained,
    with_metric,
)


def without_metric(key: str) -> Reply:
    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        content = trained(partition_id, adapter)
        del content.metric_records["metrics"][key]
        return content

    return reply


def with_array(array: Callable[[bytes, Vector], Array], codec: str = "fp32") -> Reply:
    """``array``: from the payload of an honest reply and from the vector it stands for."""

    def reply(partition_id: int, adapter: Vector) -> RecordDict:
        vector = moved(partition_id, adapter)
        content = changed(moved, codec)(partition_id, adapter)
        sent = array(encode(codec, vector, adapter), vector)
        content.array_records["adapter"] = ArrayRecord({"payload": sent})
        return content

    return reply


def with_bytes(change: Callable[[bytes], bytes], codec: str = "fp32") -> Reply:
    return with_array(lambda b, _: Array(np.frombuffer(change(b), np.uint8)), codec)


def with_vector(change: Callable[[Vector], NDArray[Any]]) -> Reply:
    return with_array(lambda _, v: Array(np.frombuffer(change(v).tobytes(), np.uint8)))


def with_value(value: float) -> Reply:
    def change(vector: Vector) -> Vector:
        vector[5] = value
        return vector

    return with_vector(change)


def _cut(partition_id: int, adapter: Vector) -> RecordDict:
    content = trained(partition_id, adapter)
    array = content.array_records["adapter"]["payload"]
    array.data = array.data[: len(array.data) // 2]
    return content


def _npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


class Pickled:
    opened = False

    def __init__(self) -> None:
        self.state = 1  # without one, __setstate__ would not be called

    def __setstate__(self, state: object) -> None:
        Pickled.opened = True


def _huge(payload: bytes, _: Vector) -> Array:
    """An array that says to hold a terabyte."""
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(file, header)
    return Array("uint8", (1 << 40,), "numpy.ndarray", file.getvalue() + payload)


def _pickle(_: bytes, vector: Vector) -> Array:
    objects = np.array([Pickled()] * vector.size, dtype=object)
    return Array("object", (vector.size,), "numpy.ndarray", _npy(objects))


def zip_bomb(gigabytes: int) -> bytes:
    """A valid zlib stream of zeros that is a thousandth of what it unfolds to."""
    packer = zlib.compressobj(9, wbits=-15)
    part = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    parts = gigabytes << 6
    check = ((parts << 24) % 65521) << 16 | 1
    return b"\x78\x01" + part * parts + b"\x03\x00" + check.to_bytes(4, "big")


def scales_of(value: float) -> Callable[[bytes], bytes]:
    """An int8 payload with the first block's bfloat16 scale replaced."""

    def change(payload: bytes) -> bytes:
        plain = bytearray(zlib.decompress(payload))
        blocks = -(-LAYOUT.size // BLOCK)
        plain[0], plain[blocks] = np.array([value], ">f4").tobytes()[:2]
        return zlib.compress(bytes(plain))

    return change


BAD: dict[str, Reply] = {
    "nothing": lambda p, a: RecordDict(),
    "no adapter": lambda p, a: RecordDict({"metrics": metrics_of(p)}),
    "no metrics": lambda p, a: RecordDict({"adapter": trained(p, a).array_records["adapter"]}),
    "another record": lambda p, a: RecordDict(
        {"adapter": ConfigRecord({"payload": 1}), "metrics": metrics_of(p)}
    ),
    "another array": lambda p, a: RecordDict(
        {"adapter": ArrayRecord({"flat": Array(moved(p, a))}), "metrics": metrics_of(p)}
    ),
    "no loss": without_metric("train-loss"),
    "no seconds": without_metric("train-s"),
    "loss is not a number": with_metric("train-loss", math.nan),
    "a loss that adds up to infinity": with_metric("train-loss", 1e308),
    "a loss below zero": with_metric("train-loss", -1.0),
    "a loss that no model has": with_metric("train-loss", 101.0),
    "tokens without end": with_metric("num-tokens", 1e308),
    "steps backwards": with_metric("steps", -3),
    "more steps than its rows make": with_metric("steps", 11),
    "no examples": with_metric("num-examples", 0),
    "fewer than no examples": with_metric("num-examples", -5),
    "examples not a number": with_metric("num-examples", math.nan),
    "examples without end": with_metric("num-examples", math.inf),
    "more examples than the site has": with_metric("num-examples", 10_000),
    "examples as a list": with_metric("num-examples", [10, 20]),
    "too short": with_vector(lambda v: v[:-1]),
    "too long": with_vector(lambda v: np.append(v, np.float32(0))),
    "a byte short": with_bytes(lambda b: b[:-1]),
    "a byte long": with_bytes(lambda b: b + b"\0"),
    "empty": with_bytes(lambda b: b""),
    "a matrix": with_array(lambda b, _: Array(np.frombuffer(b, np.uint8).reshape(2, -1))),
    "a single number": with_array(lambda b, _: Array(np.array(7, np.uint8))),
    "float32 instead of bytes": with_array(lambda _, v: Array(v)),
    "float64 instead of bytes": with_array(lambda _, v: Array(v.astype(np.float64))),
    "signed bytes": with_array(lambda b, _: Array(np.frombuffer(b, np.int8))),
    "float64": with_vector(lambda v: v.astype(np.float64)),
    "integers": with_array(lambda _, v: Array(v.astype(np.int32))),
    "half the precision": with_vector(lambda v: v.astype(np.float16)),
    "pickled": with_array(_pickle),
    "a terabyte, it says": with_array(_huge),
    "an array of another kind": with_array(
        lambda b, v: Array("uint8", (len(b),), "no.such.kind", b)
    ),
    "cut in transit": _cut,
    "nan": with_value(math.nan),
    "inf": with_value(math.inf),
    "minus inf": with_value(-math.inf),
    "1e6 times its size": changed(times(1e6)),
    "above max-update-norm": changed(times(60)),  # 100 and more, if not 10 times the others
    "too large to square in float32": changed(times(1e30)),
    "bf16 in a run of fp32": with_bytes(lambda b: b, "bf16"),
    "int8 in a run of fp32": with_bytes(lambda b: b, "int8"),
    "int4 in a run of fp32": with_bytes(lambda b: b, "int4"),
}


# In a run of int8.
BAD_INT8: dict[str, Reply] = {
    "fp32": changed(moved),
    "bf16": changed(moved, "bf16"),
    "int4": changed(moved, "int4"),
    "cut short": with_bytes(lambda b: b[:-1], "int8"),
    "cut in half": with_bytes(lambda b: b[: len(b) // 2], "int8"),
    "empty": with_bytes(lambda b: b"", "int8"),
    "appended to": with_bytes(lambda b: b + b"\0", "int8"),
    "twice": with_bytes(lambda b: b + b, "int8"),
    "a value too many": with_bytes(lambda b: zlib.compress(zlib.decompress(b) + b"\1"), "int8"),
    "a value too few": with_bytes(lambda b: zlib.compress(zlib.decompress(b)[:-1]), "int8"),
    "not packed": with_bytes(zlib.decompress, "int8"),
    "a scale is nan": with_bytes(scales_of(math.nan), "int8"),
    "a scale is inf": with_bytes(scales_of(math.inf), "int8"),
    "a scale of 1e38": with_bytes(scales_of(1e38), "int8"),
    "1e6 times its size": changed(times(1e6), "int8"),
    "a bomb": with_bytes(lambda b: zip_bomb(1), "int8"),
}
