"""The rests that a site keeps of its coarse uploads: which of them fits, and damaged files."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from app.site.feedback import RUNS_KEPT, Feedback
from app.wire.adapter import Layout, Vector
from tests.killed import kills
from tests.samples import run_config

LAYOUT = Layout.of({"m.q_proj": [6, 10], "m.v_proj": [20, 10]}, run_config(lora_r=2))
OTHER = Layout.of({"m.q_proj": [10, 6], "m.v_proj": [20, 10]}, run_config(lora_r=2))
N = LAYOUT.size
RUN = 7
ROUNDS = itertools.count(1)  # each later than all before


def rest_of(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(N).astype(np.float32)


def name(number: int, run_id: int = RUN) -> str:
    """Of the upload in this round."""
    return f"{run_id}:{number}:0"


KEY = f"{LAYOUT.hash}.{name(0)}"


def write(
    folder: Path, upload: str, rest: Vector, taken: str | None = None, layout: Layout = LAYOUT
) -> None:
    """As a site does that has sent this upload, behind one that was taken."""
    Feedback(folder, upload, taken, layout).write(rest)


def read(
    folder: Path, taken: str | None, run_id: int = RUN, layout: Layout = LAYOUT
) -> Vector | None:
    """What the next upload of the run starts from."""
    return Feedback(folder, name(next(ROUNDS), run_id), taken, layout).before


def is_rest(found: Vector | None, seed: int) -> bool:
    return found is not None and found.tobytes() == rest_of(seed).tobytes()


def file(folder: Path, run_id: int = RUN) -> Path:
    return folder / f"feedback-{run_id}.safetensors"


def test_what_is_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    assert OTHER.size == N  # so that only the hash tells the two apart
    for number in (1, 2):
        write(folder, name(number), rest_of(number), name(number - 1) if number > 1 else None)
        assert is_rest(read(folder, name(number)), number)
    assert [p.name for p in folder.iterdir()] == [file(folder).name]


def test_where_nothing_was_taken_yet_there_is_nothing_to_add(tmp_path: Path) -> None:
    write(tmp_path, name(1), rest_of(1))  # it was lost
    found = read(tmp_path, None)
    assert found is not None
    assert found.tobytes() == bytes(4 * N)


def test_one_that_was_not_taken_leaves_the_rest_before_it(tmp_path: Path) -> None:
    write(tmp_path, name(1), rest_of(1))
    for number in (2, 3, 4):  # each lost, late or refused
        write(tmp_path, name(number), rest_of(number), name(1))
        assert is_rest(read(tmp_path, name(1)), 1)
    write(tmp_path, name(5), rest_of(5), name(1))
    assert is_rest(read(tmp_path, name(5)), 5)
    assert read(tmp_path, name(4)) is None


def test_attempts_of_one_round_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path, name(1), rest_of(1))
    for attempt in (0, 1):
        write(tmp_path, f"{RUN}:2:{attempt}", rest_of(20 + attempt), name(1))
    assert is_rest(read(tmp_path, f"{RUN}:2:1"), 21)
    assert is_rest(read(tmp_path, name(1)), 1)
    assert read(tmp_path, f"{RUN}:2:0") is None


def nothing(folder: Path) -> None:
    pass


def stored(arrays: dict[str, NDArray[Any]]) -> Any:
    def put(folder: Path) -> None:
        folder.mkdir(parents=True)
        file(folder).write_bytes(save(arrays))

    return put


def with_value(value: float) -> Any:
    rest = rest_of(1)
    rest[3] = value
    return stored({KEY: rest})


def a_folder_instead(folder: Path) -> None:
    file(folder).mkdir(parents=True)


def empty(folder: Path) -> None:
    folder.mkdir()
    file(folder).touch()


UNUSABLE: dict[str, Callable[[Path], None]] = {
    "nothing": nothing,
    "another upload's": lambda folder: write(folder, name(1), rest_of(1)),
    "another run's": lambda folder: write(folder, name(0, RUN + 1), rest_of(1)),
    "another layout's": lambda folder: write(folder, name(0), rest_of(1), layout=OTHER),
    "empty": empty,
    "a folder": a_folder_instead,
    "nan": with_value(np.nan),
    "inf": with_value(np.inf),
    "float64": stored({KEY: rest_of(1).astype(np.float64)}),
    "int32 of the same size": stored({KEY: rest_of(1).view(np.int32)}),
    "too short": stored({KEY: rest_of(1)[:-1]}),
    "a matrix": stored({KEY: rest_of(1).reshape(2, -1)}),
    "no arrays": stored({}),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_without_a_usable_rest_there_is_none(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "state"
    UNUSABLE[kind](folder)
    assert read(folder, name(0)) is None


def test_a_file_cut_anywhere_holds_no_rest(tmp_path: Path) -> None:
    write(tmp_path, name(1), rest_of(1))
    whole = file(tmp_path).read_bytes()
    for end in range(len(whole)):
        file(tmp_path).write_bytes(whole[:end])
        assert read(tmp_path, name(1)) is None, end


def finite_or_none(rest: Vector | None) -> bool:
    return rest is None or (
        rest.shape == (N,) and rest.dtype == np.float32 and bool(np.isfinite(rest).all())
    )


def test_a_file_with_any_bit_flipped_gives_a_finite_rest_or_none(tmp_path: Path) -> None:
    write(tmp_path, name(1), rest_of(1))
    whole = file(tmp_path).read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file(tmp_path).write_bytes(damaged)
            assert finite_or_none(read(tmp_path, name(1)))


@settings(max_examples=100)
@given(content=st.binary(max_size=300))
def test_a_file_of_anything_gives_a_finite_rest_or_none(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("state")
    file(folder).write_bytes(content)
    assert finite_or_none(read(folder, name(1)))


def test_runs_side_by_side_and_an_old_one_that_is_resumed_keep_their_rests(tmp_path: Path) -> None:
    for number in range(1, 5):
        for run_id in range(1, RUNS_KEPT + 1):
            taken = name(number - 1, run_id) if number > 1 else None
            write(tmp_path, name(number, run_id), rest_of(10 * run_id + number), taken)
    for run_id in range(1, RUNS_KEPT + 1):
        assert is_rest(read(tmp_path, name(4, run_id), run_id), 10 * run_id + 4)


def test_the_runs_that_wrote_last_are_kept_and_nothing_torn(tmp_path: Path) -> None:
    for run_id in range(1, RUNS_KEPT + 1):
        write(tmp_path, name(1, run_id), rest_of(run_id))
    write(tmp_path, name(2, 1), rest_of(5), name(1, 1))  # resumed: no longer the oldest
    largest = 0
    for run_id in (8, 9):
        file(tmp_path, run_id + 100).with_suffix(".part").write_bytes(b"torn")
        (tmp_path / "keys.json").write_text("{}")
        write(tmp_path, name(1, run_id), rest_of(run_id))
        for number in range(2, 20):
            write(tmp_path, name(number, run_id), rest_of(number), name(number - 1, run_id))
        largest = max(largest, sum(p.stat().st_size for p in tmp_path.iterdir()))
    names = {file(tmp_path, n).name for n in (1, RUNS_KEPT, 8, 9)}
    assert {p.name for p in tmp_path.iterdir()} == names | {"keys.json"}
    assert largest < RUNS_KEPT * (2 * 4 * N + 500)
    assert read(tmp_path, name(1, 2), 2) is None  # the oldest
    assert is_rest(read(tmp_path, name(2, 1), 1), 5)


def test_killed_anywhere_a_write_leaves_the_rests_that_may_be_asked_for(tmp_path: Path) -> None:
    for run_id in (*range(20, 20 + RUNS_KEPT), RUN):
        write(tmp_path, name(1, run_id), rest_of(1))
    file(tmp_path, 9).write_bytes(b"one more, to be forgotten")
    os.utime(file(tmp_path, 9), (0, 0))
    seen = set()
    for folder in kills(lambda folder: write(folder, name(2), rest_of(2), name(1)), tmp_path):
        assert is_rest(read(folder, name(1)), 1)  # it cannot have been sent
        seen.add(read(folder, name(2)) is None)
        write(folder, name(3), rest_of(3), name(1))
        assert is_rest(read(folder, name(3)), 3)
        assert not list(folder.glob("*.part"))
        assert len(list(folder.iterdir())) == RUNS_KEPT
    assert seen == {True, False}


def test_branches_of_one_run_start_from_its_rest_and_keep_their_own(tmp_path: Path) -> None:
    for number in (2, 3, 4):  # of the last one nobody knows whether it was taken
        write(
            tmp_path, name(number, 1), rest_of(number), name(number - 1, 1) if number > 2 else None
        )
    for run_id in (2, 3):
        assert is_rest(read(tmp_path, name(3, 1), run_id), 3)
    for number, run_id in itertools.product((4, 5, 6), (2, 3)):
        taken = name(number - 1, run_id if number > 4 else 1)
        write(tmp_path, name(number, run_id), rest_of(10 * run_id + number), taken)
    assert is_rest(read(tmp_path, name(6, 2), 2), 26)
    assert is_rest(read(tmp_path, name(6, 3), 3), 36)
    assert is_rest(read(tmp_path, name(5, 2), 4), 25)  # a run that goes on from there
    assert is_rest(read(tmp_path, name(4, 1), 1), 4)


def test_a_run_that_has_begun_does_without_the_file_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, name(1, 1), rest_of(1))
    write(tmp_path, name(2), rest_of(2), name(1, 1))  # and it was lost
    for number in (2, 3):  # the other one goes on all the same
        write(tmp_path, name(number, 1), rest_of(number), name(number - 1, 1))
    assert is_rest(read(tmp_path, name(1, 1)), 1)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_rest_of_a_resumed_run_that_is_damaged_is_taken_from_the_run_before(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "state"
    UNUSABLE[kind](folder)
    write(folder, name(1, 1), rest_of(1))
    assert is_rest(read(folder, name(1, 1)), 1)


BAD_NAMES = [
    "../../7:1:0", "", "7", "7:1", "7:1:0:0", "7:1:x", "7:1:0 ", "7/8:1:0", "\u0667:1:0",
    "7:1:" + "0" * 99,
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_an_upload_is_named_by_numbers_not_by_a_path(tmp_path: Path, bad: str) -> None:
    for upload, taken in ((bad, None), (name(1), bad)):
        with pytest.raises(ValueError, match="no name of an upload"):
            Feedback(tmp_path, upload, taken, LAYOUT)


def test_a_write_that_fails_is_an_oserror_and_leaves_the_old_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, name(1), rest_of(1))
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, name(2), rest_of(2), name(1))
    assert is_rest(read(tmp_path, name(1)), 1)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, content: bytes) -> int:
        with path.open("wb") as out:
            out.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
