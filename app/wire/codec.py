"""How an adapter travels: as it is, or as a coarse difference to a vector both sides hold.

    fp32   the float32 vector itself
    bf16   the difference in bfloat16                        half the bytes
    int8   8-bit steps, a bfloat16 scale for 64 values       a quarter, and a bit
    int4   4-bit steps, likewise                             an eighth, and a bit

Differences are small where the reference is near, so their rounding is small as well. All but
fp32 are packed by zlib, which a difference of zero (the first round's download) nearly vanishes
in. numpy only: both the server and the sites use it.
"""

import zlib

import numpy as np
from numpy.typing import NDArray

from app.wire.adapter import Vector

BLOCK = 64  # values with one scale; two rows of a LoRA B of rank 32, a 64th of a row of an 8B's A
_LEVELS = {"int8": 127, "int4": 7}


class PayloadError(ValueError):
    """Bytes that are no payload of this codec and size."""


def encode(codec: str, vector: Vector, reference: Vector) -> bytes:
    """``vector`` [n] as bytes; ``decode`` with the same reference gives it back, coarsely.

    Raises:
        ValueError: a value is not finite, or too large for the codec.
    """
    if not np.isfinite(vector).all():
        raise ValueError("the adapter holds values that are not finite")
    if codec == "fp32":
        return vector.astype("<f4").tobytes()
    difference = vector - reference
    if codec == "bf16":
        plain = _planes(_to_bf16(difference))
    else:
        scales, codes = _quantise(difference, _LEVELS[codec])
        plain = _planes(scales) + (codes if codec == "int8" else _nibbles(codes)).tobytes()
    # Level 1: higher ones take ten times as long for one or two percent.
    return zlib.compress(plain, 1)


def decode(codec: str, payload: bytes, reference: Vector) -> Vector:
    """The vector [n] that ``payload`` stands for, float32.

    Raises:
        PayloadError: the payload is cut short, damaged, of another size, or not finite.
    """
    n = reference.size
    blocks, size = -(-n // BLOCK), unpacked_bytes(codec, n)
    plain = payload if codec == "fp32" else _unpacked(payload, size)
    if len(plain) != size:
        raise PayloadError(f"{len(plain)} bytes of {codec}, {size} expected")
    if codec == "fp32":
        vector: Vector = np.frombuffer(plain, "<f4").astype(np.float32)
    elif codec == "bf16":
        with np.errstate(invalid="ignore"):  # a damaged value; seen below
            vector = reference + _from_bf16(_unplanes(plain))
    else:
        scales = _from_bf16(_unplanes(plain[: 2 * blocks]))
        codes = np.frombuffer(plain, np.uint8, offset=2 * blocks)
        steps = codes.view(np.int8) if codec == "int8" else _unnibbles(codes, n)
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale; seen below
            vector = reference + steps * np.repeat(scales, BLOCK)[:n]
    if not np.isfinite(vector).all():
        raise PayloadError("values that are not finite")
    return vector


def unpacked_bytes(codec: str, n: int) -> int:
    """Bytes of an adapter of ``n`` values before zlib, which makes them fewer."""
    scales = 2 * -(-n // BLOCK)
    return {"fp32": 4 * n, "bf16": 2 * n, "int8": scales + n, "int4": scales + -(-n // 2)}[codec]


def _unpacked(payload: bytes, size: int) -> bytes:
    """At most ``size`` + 1 bytes: a small payload cannot unfold into gigabytes."""
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(payload, size + 1)
    except zlib.error as err:
        raise PayloadError(f"damaged: {err}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise PayloadError("cut short, or longer than it says")
    return plain


def _to_bf16(values: Vector) -> NDArray[np.uint16]:
    """Upper halves of the float32 bits, rounded to nearest, ties to even."""
    bits = values.astype("<f4").view("<u4")
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    out: NDArray[np.uint16] = (rounded >> 16).astype("<u2")
    if not np.isfinite(_from_bf16(out)).all():
        raise ValueError("a difference is too large for bfloat16")
    return out


def _from_bf16(halves: NDArray[np.uint16]) -> Vector:
    return (halves.astype("<u4") << 16).view("<f4").astype(np.float32)


def _planes(halves: NDArray[np.uint16]) -> bytes:
    """All high bytes, then all low bytes: exponents are alike and pack well side by side."""
    return halves.view(np.uint8).reshape(-1, 2)[:, ::-1].T.tobytes()


def _unplanes(plain: bytes) -> NDArray[np.uint16]:
    pairs = np.frombuffer(plain, np.uint8).reshape(2, -1)[::-1].T
    return np.ascontiguousarray(pairs).view("<u2").ravel()


def _quantise(difference: Vector, levels: int) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """Scale per block (bfloat16 bits) and steps -levels..levels per value."""
    padded = np.zeros(-(-difference.size // BLOCK) * BLOCK, np.float32)
    padded[: difference.size] = difference
    blocks = padded.reshape(-1, BLOCK)
    scales = _to_bf16(np.abs(blocks).max(axis=1) / np.float32(levels))
    step = _from_bf16(scales)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(step > 0, blocks / step, 0)
    codes = np.clip(np.rint(ratio), -levels, levels).astype(np.int8)
    return scales, codes.ravel()[: difference.size]


def _nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    even = np.append(codes, np.zeros(codes.size % 2, np.int8)) + np.int8(8)
    pairs = even.astype(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] << np.uint8(4)) | pairs[:, 1]


def _unnibbles(packed: NDArray[np.uint8], n: int) -> NDArray[np.int8]:
    pairs = np.stack([packed >> 4, packed & 15], axis=1).ravel()[:n]
    return pairs.astype(np.int8) - np.int8(8)
