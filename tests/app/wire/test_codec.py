"""How adapters travel: what each codec loses, what it weighs, and what damage does to it."""

import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.config import CODECS
from app.wire.adapter import Vector
from app.wire.codec import BLOCK, PayloadError, decode, encode, unpacked_bytes

COARSE = ("bf16", "int8", "int4")
LEVELS = {"int8": 127, "int4": 7}
SIZES = st.one_of(
    st.integers(1, 5 * BLOCK),
    st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK]),
)
every_codec = pytest.mark.parametrize("codec", CODECS)
every_coarse_codec = pytest.mark.parametrize("codec", COARSE)


@st.composite
def pairs(
    draw: st.DrawFn, units: tuple[float, ...] = (1e-38, 1e-30, 1e-6, 1.0, 1e6, 1e30)
) -> tuple[Vector, Vector]:
    """A vector and its reference: from near to far, blocks of unlike size, some values alike."""
    n = draw(SIZES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    reference = rng.standard_normal(n) * draw(st.sampled_from([0.0, *units]))
    units_of_blocks = rng.choice(units, -(-n // BLOCK)) if draw(st.booleans()) else [1e-3]
    change = rng.standard_normal(n) * np.resize(np.repeat(units_of_blocks, BLOCK), n)
    change[rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    if draw(st.booleans()):  # one value rules its block
        change[rng.integers(n)] *= 1e4
    return (reference + change).astype(np.float32), reference.astype(np.float32)


def a_pair(n: int = 130) -> tuple[Vector, Vector]:
    rng = np.random.default_rng(n)
    reference = rng.standard_normal(n).astype(np.float32)
    return reference + 0.01 * rng.standard_normal(n).astype(np.float32), reference


def lost_at_most(codec: str, vector: Vector, reference: Vector) -> NDArray[np.float64]:
    """The bound [n] on what a round trip may change each value by, in exact arithmetic.

    Beside the codec's own rounding there are two of float32: of the difference and of the sum.
    """
    if codec == "fp32":
        return np.zeros(vector.size)
    difference = np.abs(vector - reference).astype(float)
    if codec == "bf16":  # 8 bits of significand; 2^-134 is half its smallest number
        own = difference * 2.0**-8 + 2.0**-134
    else:
        # Half a step. The step is the block's largest value divided by the levels, in bfloat16,
        # which may lift it by 2^-8. Where it lowers it, the largest value itself is cut off: of
        # int8 by 127 / 256 of a step, which is less than half of one.
        levels = LEVELS[codec]
        padded = np.zeros(-(-vector.size // BLOCK) * BLOCK)
        padded[: vector.size] = difference
        largest = padded.reshape(-1, BLOCK).max(axis=1)
        steps = largest / levels * (1 + 2.0**-8)
        own = np.repeat(steps / 2 * (1 + 2.0**-15) + levels * 2.0**-134, BLOCK)[: vector.size]
    magnitudes = np.abs(vector).astype(float) + np.abs(reference) + own
    return np.asarray(own + magnitudes * 2.0**-23, np.float64)


@every_codec
@settings(max_examples=200)
@given(pair=pairs())
def test_a_round_trip_loses_no_more_than_half_a_step(
    codec: str, pair: tuple[Vector, Vector]
) -> None:
    vector, reference = pair
    back = decode(codec, encode(codec, vector, reference), reference)
    assert back.dtype == np.float32
    assert back.shape == vector.shape
    error = np.abs(back.astype(float) - vector)
    assert (error <= lost_at_most(codec, vector, reference)).all()
    if codec == "fp32":
        assert back.tobytes() == vector.tobytes()


@every_coarse_codec
def test_the_bound_is_no_looser_than_it_must_be(codec: str) -> None:
    # Uniform changes come near to half a step somewhere: a finer codec would fail here.
    rng = np.random.default_rng(3)
    reference = np.zeros(4096, np.float32)
    vector = rng.uniform(-1, 1, 4096).astype(np.float32)
    error = np.abs(decode(codec, encode(codec, vector, reference), reference) - vector)
    assert (error / lost_at_most(codec, vector, reference)).max() > 0.9


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_large_value_coarsens_its_own_block_only(codec: str) -> None:
    vector, reference = a_pair(4 * BLOCK)
    larger = vector.copy()
    larger[BLOCK + 5] += 1000
    both = [decode(codec, encode(codec, v, reference), reference) for v in (vector, larger)]
    other = np.arange(4 * BLOCK) // BLOCK != 1
    np.testing.assert_array_equal(both[0][other], both[1][other])
    assert not np.array_equal(both[0][~other], both[1][~other])


@every_codec
@settings(max_examples=60)
@given(pair=pairs())
def test_the_unpacked_size_is_what_is_packed(codec: str, pair: tuple[Vector, Vector]) -> None:
    vector, reference = pair
    payload = encode(codec, vector, reference)
    size, n = unpacked_bytes(codec, vector.size), vector.size
    blocks = (n + BLOCK - 1) // BLOCK
    assert (
        size
        == {
            "fp32": 4 * n,
            "bf16": 2 * n,
            "int8": 2 * blocks + n,
            "int4": 2 * blocks + (n + 1) // 2,
        }[codec]
    )
    if codec == "fp32":
        assert len(payload) == size
    else:
        assert len(zlib.decompress(payload)) == size
        assert len(payload) <= size + (size >> 12) + 13  # as zlib's compressBound


@every_coarse_codec
def test_random_differences_too_are_no_larger_packed_than_unpacked(codec: str) -> None:
    rng = np.random.default_rng(1)
    vector = rng.standard_normal(200_000).astype(np.float32)
    size = unpacked_bytes(codec, vector.size)
    assert len(encode(codec, vector, np.zeros_like(vector))) <= size * (1 + 2**-12) + 13


@every_coarse_codec
def test_no_difference_is_next_to_nothing(codec: str) -> None:
    vector, _ = a_pair(100_001)
    payload = encode(codec, vector, vector)
    assert len(payload) < unpacked_bytes(codec, vector.size) / 100
    assert decode(codec, payload, vector).tobytes() == vector.tobytes()


@every_codec
@pytest.mark.parametrize("n", [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_every_value_has_its_place_whatever_the_size(codec: str, n: int) -> None:
    reference = np.arange(n, dtype=np.float32)
    for at in {0, n // 2, n - 1}:
        vector = reference.copy()
        vector[at] -= 64
        back = decode(codec, encode(codec, vector, reference), reference)
        # All but one are exact; the one is the largest of its block.
        np.testing.assert_allclose(back, vector, rtol=0, atol=64 * 2**-8)
        assert (back == reference).sum() == n - 1


@every_codec
@pytest.mark.parametrize("unit", [1e-44, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_differences_of_any_magnitude_keep_it(codec: str, unit: float) -> None:
    rng = np.random.default_rng(4)
    reference = np.zeros(200, np.float32)
    vector = (rng.uniform(0.5, 1, 200) * unit).astype(np.float32)
    back = decode(codec, encode(codec, vector, reference), reference)
    assert np.isfinite(back).all()
    assert (np.abs(back - vector.astype(float)) <= lost_at_most(codec, vector, reference)).all()
    if unit >= 1e-38:  # below, bfloat16 ends
        assert back.max() == pytest.approx(unit, rel=0.05)
        assert back.min() >= 0.4 * unit


@every_codec
@settings(max_examples=40)
@given(pair=pairs())
def test_the_same_vectors_give_the_same_bytes_and_stay_as_they_are(
    codec: str, pair: tuple[Vector, Vector]
) -> None:
    vector, reference = pair
    before = vector.tobytes(), reference.tobytes()
    for array in pair:
        array.flags.writeable = False
    payload = encode(codec, vector, reference)
    assert encode(codec, vector.copy(), reference.copy()) == payload
    back = decode(codec, payload, reference)
    assert decode(codec, bytes(payload), reference.copy()).tobytes() == back.tobytes()
    assert (vector.tobytes(), reference.tobytes()) == before
    assert back.flags.writeable  # the strategy adds to it in place
    assert not np.shares_memory(back, reference)


# --- the bytes themselves, the same on every machine ----------------------------------------------


def test_fp32_is_the_vector_itself_little_endian_whatever_the_reference() -> None:
    vector = np.array([1, -2, 0.5], np.float32)
    for reference in (np.zeros(3, np.float32), vector):
        assert encode("fp32", vector, reference).hex() == "0000803f000000c00000003f"


@pytest.mark.parametrize(
    ("codec", "difference", "plain"),
    [
        # 3f80, c000, 3f00: the high bytes, then the low ones.
        ("bf16", [1, -2, 0.5], "3fc03f 800000"),
        # 1 + 2^-8 lies half way to the next of bfloat16, as does 1 + 3 * 2^-8: ties to even.
        ("bf16", [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)], "3f3fbf 808280"),
        # The scale 1.0 = 3f80, then the steps.
        ("int8", [127, -64, 1, 0], "3f80 7fc00100"),
        ("int8", [0, 0], "0000 0000"),
        # Half-bytes from 1 (-7) to f (7), the first one high; 8, zero, fills up.
        ("int4", [7, -7, 1], "3f80 f198"),
        # 3 / 7 rounded to bfloat16: the largest value of a block takes all levels.
        ("int4", [-3, 0], "3edb 18"),
    ],
)
def test_the_coarse_codecs_bytes_before_zlib(
    codec: str, difference: list[float], plain: str
) -> None:
    reference = np.zeros(len(difference), np.float32)
    payload = encode(codec, np.array(difference, np.float32), reference)
    assert zlib.decompress(payload) == bytes.fromhex(plain)


@pytest.mark.parametrize(("codec", "largest", "codes"), [("int8", 127, BLOCK + 1), ("int4", 7, 33)])
def test_the_scales_of_all_blocks_stand_first_in_planes(
    codec: str, largest: int, codes: int
) -> None:
    vector = np.zeros(BLOCK + 1, np.float32)
    vector[0], vector[BLOCK] = largest, -2 * largest
    plain = zlib.decompress(encode(codec, vector, np.zeros_like(vector)))
    assert plain[:4].hex() == "3f408000"  # 3f80 and 4000
    assert len(plain) == 4 + codes
    assert plain[-1:].hex() == {"int8": "81", "int4": "18"}[codec]


# --- damage ---------------------------------------------------------------------------------------


def decodes_or_is_refused(codec: str, payload: bytes, reference: Vector) -> bool:
    """False if refused as such; whatever else it is must be a usable vector."""
    try:
        back = decode(codec, payload, reference)
    except PayloadError:
        return False
    assert back.dtype == np.float32
    assert back.shape == reference.shape
    assert np.isfinite(back).all()
    return True


@every_codec
@pytest.mark.parametrize("n", [1, 131])
def test_a_payload_cut_anywhere_is_refused(codec: str, n: int) -> None:
    vector, reference = a_pair(n)
    payload = encode(codec, vector, reference)
    assert decodes_or_is_refused(codec, payload, reference)
    for end in range(len(payload)):
        assert not decodes_or_is_refused(codec, payload[:end], reference), end


@every_codec
def test_a_payload_with_any_byte_flipped_is_refused_or_finite(codec: str) -> None:
    vector, reference = a_pair(131)
    payload = encode(codec, vector, reference)
    sound = decode(codec, payload, reference)
    for at in range(len(payload)):
        for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            damaged = bytearray(payload)
            damaged[at] ^= mask
            used = decodes_or_is_refused(codec, bytes(damaged), reference)
            if used and codec != "fp32":  # the others have zlib's checksum; it spares filling bits
                assert decode(codec, bytes(damaged), reference).tobytes() == sound.tobytes()


@every_codec
@settings(max_examples=60)
@given(pair=pairs(), tail=st.binary(min_size=1, max_size=40))
def test_appended_bytes_are_refused(codec: str, pair: tuple[Vector, Vector], tail: bytes) -> None:
    vector, reference = pair
    payload = encode(codec, vector, reference)
    assert not decodes_or_is_refused(codec, payload + tail, reference)
    assert not decodes_or_is_refused(codec, payload + payload, reference)


@every_codec
@settings(max_examples=150)
@given(payload=st.binary(max_size=400), n=st.integers(1, 100))
def test_any_bytes_are_refused_or_finite(codec: str, payload: bytes, n: int) -> None:
    decodes_or_is_refused(codec, payload, np.ones(n, np.float32))


@every_coarse_codec
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=150)
@given(data=st.data(), n=st.integers(1, 200))
def test_anything_packed_is_refused_or_finite(codec: str, data: Any, n: int) -> None:
    size = unpacked_bytes(codec, n)
    plain = data.draw(st.binary(min_size=size, max_size=size))
    decodes_or_is_refused(codec, zlib.compress(plain), np.ones(n, np.float32))
    for other in (plain + b"\0", plain[:-1], b""):
        assert not decodes_or_is_refused(codec, zlib.compress(other), np.ones(n, np.float32))


# Codes of zero and of the most steps, for the 64 values of a block.
CODES = {"int8": (b"\0" * 64, b"\x7f" * 64), "int4": (b"\x88" * 32, b"\xff" * 32)}


@pytest.mark.parametrize("most", [False, True], ids=["times zero", "times the most steps"])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("scale", ["7fc0", "ffff", "7f80", "ff80"])
def test_a_scale_that_is_not_finite_is_refused(codec: str, scale: str, most: bool) -> None:
    payload = zlib.compress(bytes.fromhex(scale) + CODES[codec][most])
    with pytest.raises(PayloadError, match="finite"):
        decode(codec, payload, np.zeros(BLOCK, np.float32))


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_scale_that_takes_values_beyond_float32_is_refused(codec: str) -> None:
    nothing, most = (zlib.compress(b"\x7f\x7f" + codes) for codes in CODES[codec])
    reference = np.zeros(BLOCK, np.float32)
    assert not decode(codec, nothing, reference).any()
    with pytest.raises(PayloadError, match="finite"):
        decode(codec, most, reference)


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize("value", ["7fc0", "7f80", "ff80"], ids=["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_refused(codec: str, value: str) -> None:
    high, low = bytes.fromhex(value)
    payload = {
        "fp32": bytes([0, 0, low, high, 0, 0, 0, 0]),
        "bf16": zlib.compress(bytes([high, 0, low, 0])),
    }[codec]
    with pytest.raises(PayloadError, match="finite"):
        decode(codec, payload, np.zeros(2, np.float32))


@every_codec
@pytest.mark.parametrize("other", CODECS)
def test_a_payload_of_another_codec_is_refused(codec: str, other: str) -> None:
    vector, reference = a_pair(500)
    payload = encode(other, vector, reference)
    assert decodes_or_is_refused(codec, payload, reference) == (codec == other)


@every_coarse_codec
def test_a_payload_that_unfolds_to_more_is_refused_without_unfolding_it(codec: str) -> None:
    bomb = zlib.compress(bytes(1 << 28), 9)
    assert len(bomb) < 1 << 19
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            decode(codec, bomb, np.zeros(1000, np.float32))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 22


# --- what cannot be sent --------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@settings(max_examples=15)
@given(pair=pairs(units=(1.0,)), at=st.integers(0, 10_000))
def test_a_vector_that_is_not_finite_is_no_payload(
    codec: str, value: float, pair: tuple[Vector, Vector], at: int
) -> None:
    vector, reference = pair
    vector[at % vector.size] = value
    with pytest.raises(ValueError, match="finite"):
        encode(codec, vector, reference)


@every_coarse_codec
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_difference_beyond_float32_is_no_payload(codec: str) -> None:
    vector = np.full(3, 3e38, np.float32)
    with pytest.raises(ValueError, match="too large"):
        encode(codec, vector, -vector)


@every_coarse_codec
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=100)
@given(
    value=st.floats(2.0**125, float(np.finfo(np.float32).max), width=32),
    sign=st.sampled_from([-1, 1]),
)
def test_near_the_end_of_float32_what_can_be_sent_can_be_read(
    codec: str, value: float, sign: int
) -> None:
    vector, reference = np.array([sign * value, 1], np.float32), np.zeros(2, np.float32)
    try:
        payload = encode(codec, vector, reference)
    except ValueError:
        return
    assert decodes_or_is_refused(codec, payload, reference)
