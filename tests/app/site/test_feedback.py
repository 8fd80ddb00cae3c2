"""Error feedback: what a coarse upload leaves out reaches the server with a later one."""

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from app import client_app
from app.config import RunConfig
from app.site.feedback import RUNS_KEPT, Feedback
from app.wire.adapter import Layout, Vector
from app.wire.codec import decode, encode
from tests.killed import kills
from tests.samples import run_config

COARSE = ("bf16", "int8", "int4")
LAYOUT = Layout.of({"m.q_proj": [6, 10], "m.v_proj": [20, 10]}, run_config(lora_r=2))
OTHER = Layout.of({"m.q_proj": [10, 6], "m.v_proj": [20, 10]}, run_config(lora_r=2))
N = LAYOUT.size
KEY = f"{LAYOUT.hash}.0"
RUN = 7
ROUNDS = itertools.count(1)  # each later than all before


def rest_of(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(N).astype(np.float32)


def feedback(folder: Path, run_id: int | str = RUN, layout: Layout = LAYOUT) -> Feedback:
    return Feedback(folder, str(run_id), layout)


def file(folder: Path, run_id: int = RUN) -> Path:
    return folder / f"feedback-{run_id}.safetensors"


# --- the file -------------------------------------------------------------------------------------


def test_what_is_written_is_read_by_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    assert OTHER.size == N  # so that only the hash tells the two apart
    for seed in (1, 2):
        feedback(folder).write(next(ROUNDS), rest_of(seed))
        assert feedback(folder).read(next(ROUNDS)).tobytes() == rest_of(seed).tobytes()
    assert [p.name for p in folder.iterdir()] == [file(folder).name]


def nothing(folder: Path) -> None:
    pass


def other_run(folder: Path) -> None:
    feedback(folder, RUN + 1).write(next(ROUNDS), rest_of(1))


def other_layout(folder: Path) -> None:
    feedback(folder, layout=OTHER).write(next(ROUNDS), rest_of(1))


def stored(arrays: dict[str, NDArray[Any]]) -> Any:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        file(folder).write_bytes(save(arrays))

    return write


def with_value(value: float) -> Any:
    rest = rest_of(1)
    rest[3] = value
    return stored({KEY: rest})


def a_folder_instead(folder: Path) -> None:
    file(folder).mkdir(parents=True)


def empty(folder: Path) -> None:
    folder.mkdir()
    file(folder).touch()


UNUSABLE = {
    "nothing": nothing,
    "another run's": other_run,
    "another layout's": other_layout,
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
    rest = feedback(folder).read(next(ROUNDS))
    assert rest.dtype == np.float32
    assert rest.shape == (N,)
    assert not rest.any()


def test_a_file_cut_anywhere_holds_no_rest(tmp_path: Path) -> None:
    feedback(tmp_path).write(next(ROUNDS), rest_of(1))
    whole = file(tmp_path).read_bytes()
    for end in range(len(whole)):
        file(tmp_path).write_bytes(whole[:end])
        assert not feedback(tmp_path).read(next(ROUNDS)).any(), end


def test_a_file_with_any_bit_flipped_gives_a_finite_rest(tmp_path: Path) -> None:
    feedback(tmp_path).write(next(ROUNDS), rest_of(1))
    whole = file(tmp_path).read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file(tmp_path).write_bytes(damaged)
            rest = feedback(tmp_path).read(next(ROUNDS))
            assert rest.shape == (N,)
            assert rest.dtype == np.float32
            assert np.isfinite(rest).all()


@settings(max_examples=100)
@given(content=st.binary(max_size=300))
def test_a_file_of_anything_gives_a_finite_rest(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("state")
    file(folder).write_bytes(content)
    assert np.isfinite(feedback(folder).read(next(ROUNDS))).all()


def test_runs_side_by_side_and_an_old_one_that_is_resumed_keep_their_rests(tmp_path: Path) -> None:
    for server_round in range(1, 5):
        for run_id in range(1, RUNS_KEPT + 1):
            feedback(tmp_path, run_id).write(server_round, rest_of(10 * run_id + server_round))
    for run_id in range(1, RUNS_KEPT + 1):
        kept = feedback(tmp_path, run_id).read(5)
        assert kept.tobytes() == rest_of(10 * run_id + 4).tobytes()


def test_the_runs_that_wrote_last_are_kept_and_nothing_torn(tmp_path: Path) -> None:
    for run_id in range(1, RUNS_KEPT + 1):
        feedback(tmp_path, run_id).write(1, rest_of(run_id))
    feedback(tmp_path, 1).write(2, rest_of(5))  # resumed: no longer the oldest
    largest = 0
    for run_id in (8, 9):
        file(tmp_path, run_id + 100).with_suffix(".part").write_bytes(b"torn")
        (tmp_path / "keys.json").write_text("{}")
        feedback(tmp_path, run_id).write(1, rest_of(run_id))
        for server_round in range(2, 20):
            feedback(tmp_path, run_id).write(server_round, rest_of(server_round))
        largest = max(largest, sum(p.stat().st_size for p in tmp_path.iterdir()))
    names = {file(tmp_path, n).name for n in (1, RUNS_KEPT, 8, 9)}
    assert {p.name for p in tmp_path.iterdir()} == names | {"keys.json"}
    assert largest < RUNS_KEPT * (2 * 4 * N + 500)
    assert not feedback(tmp_path, 2).read(5).any()  # the oldest
    assert feedback(tmp_path, 1).read(3).tobytes() == rest_of(5).tobytes()


def test_killed_anywhere_a_write_leaves_the_old_rest_or_the_new_one(tmp_path: Path) -> None:
    start = tmp_path / "start"
    for run_id in (*range(20, 20 + RUNS_KEPT), RUN):
        feedback(start, run_id).write(1, rest_of(1))
    file(start, 9).write_bytes(b"one more, to be forgotten")
    os.utime(file(start, 9), (0, 0))
    copies = (Path(shutil.copytree(start, tmp_path / str(n))) for n in itertools.count())
    seen = set()
    for folder in kills(lambda folder: feedback(folder).write(2, rest_of(2)), copies):
        rest = feedback(folder).read(3)
        assert rest.tobytes() in (rest_of(1).tobytes(), rest_of(2).tobytes())
        seen.add(rest.tobytes())
        feedback(folder).write(2, rest_of(2))
        assert feedback(folder).read(3).tobytes() == rest_of(2).tobytes()
        assert not list(folder.glob("*.part"))
        assert len(list(folder.iterdir())) == RUNS_KEPT
    assert len(seen) == 2


def test_a_round_that_is_repeated_starts_from_the_rest_it_started_from(tmp_path: Path) -> None:
    for server_round in (2, 5, 9):
        feedback(tmp_path).write(server_round, rest_of(server_round))
    assert feedback(tmp_path).read(10).tobytes() == rest_of(9).tobytes()
    for _ in range(2):  # the SuperLink died in round 9; the run is resumed, twice
        assert feedback(tmp_path).read(9).tobytes() == rest_of(5).tobytes()
        feedback(tmp_path).write(9, rest_of(1))
    assert feedback(tmp_path).read(10).tobytes() == rest_of(1).tobytes()


def test_branches_of_one_run_start_from_its_rest_and_keep_their_own(tmp_path: Path) -> None:
    for server_round in (2, 3, 4):
        feedback(tmp_path, 1).write(server_round, rest_of(server_round))
    left, right, again = "1:3 2", "1:3 3", "1:3 2:5 4"  # round 4 of run 1 was cut off
    for branch in (left, right):
        assert feedback(tmp_path, branch).read(4).tobytes() == rest_of(3).tobytes()
        assert feedback(tmp_path, branch).read(9).tobytes() == rest_of(3).tobytes()
    for server_round, (run, seed) in itertools.product((4, 5, 6), ((left, 20), (right, 30))):
        feedback(tmp_path, run).write(server_round, rest_of(seed + server_round))
    assert feedback(tmp_path, left).read(7).tobytes() == rest_of(26).tobytes()
    assert feedback(tmp_path, right).read(7).tobytes() == rest_of(36).tobytes()
    assert feedback(tmp_path, again).read(6).tobytes() == rest_of(25).tobytes()
    assert feedback(tmp_path, 1).read(5).tobytes() == rest_of(4).tobytes()


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_rest_of_a_resumed_run_that_is_damaged_is_taken_from_the_run_before(
    tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "state"
    UNUSABLE[kind](folder)
    feedback(folder, 1).write(1, rest_of(1))
    assert feedback(folder, f"1:1 {RUN}").read(next(ROUNDS)).tobytes() == rest_of(1).tobytes()


@pytest.mark.parametrize("name", ["../../other", "", "7/8", "latest", "7:1", "../7:1 8", "7:x 8"])
def test_a_run_is_a_number_not_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no run id"):
        Feedback(tmp_path, name, LAYOUT)


def test_a_write_that_fails_is_an_oserror_and_leaves_the_old_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feedback(tmp_path).write(next(ROUNDS), rest_of(1))
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space"):
        feedback(tmp_path).write(next(ROUNDS), rest_of(2))
    assert feedback(tmp_path).read(next(ROUNDS)).tobytes() == rest_of(1).tobytes()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(path: Path, content: bytes) -> int:
        with path.open("wb") as out:
            out.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)


# --- uploads --------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SITE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def site_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The app's log, which doesn't reach the root logger."""
    logging.getLogger("app").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("app").removeHandler(caplog.handler)


def job(run_id: int = RUN) -> ConfigRecord:
    return ConfigRecord({"round": next(ROUNDS), "run": str(run_id)})


def config(codec: str, with_feedback: bool = True) -> RunConfig:
    return run_config(codec_up=codec, error_feedback=with_feedback)


def upload(change: Vector, received: Vector, config: RunConfig, run_id: int = RUN) -> Vector:
    """The change that the server sees of a site that made this one."""
    payload = client_app._to_send(received + change, received, LAYOUT, config, job(run_id))
    return decode(config.up, payload, received) - received


def small_beside_a_large_one() -> Vector:
    """0.05 everywhere and 1 in each block: less than half of int4's steps of 1 / 7."""
    change = np.full(N, 0.05, np.float32)
    change[::64] = 1
    return change


def test_with_feedback_a_small_constant_change_arrives_without_it_never(site: Path) -> None:
    received, change = np.zeros(N, np.float32), small_beside_a_large_one()
    small = change < 1
    without = sum(upload(change, received, config("int4", False)) for _ in range(40))
    assert not np.asarray(without)[small].any()
    assert not (site / "state").exists()
    fed = sum(upload(change, received, config("int4")) for _ in range(40))
    np.testing.assert_allclose(fed, 40 * change, rtol=0, atol=0.51 / 7 * 1.1)


@pytest.mark.parametrize("codec", COARSE)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), uploads=st.integers(1, 25))
def test_the_uploads_add_up_to_the_changes_but_for_the_last_rest(
    tmp_path_factory: pytest.TempPathFactory, codec: str, seed: int, uploads: int
) -> None:
    rng = np.random.default_rng(seed)
    wanted, seen = np.zeros(N), np.zeros(N)
    largest = 0.0
    # What half a step is of the largest value: its rest, once added to the next, adds a little.
    share = {"bf16": 2.0**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}[codec]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITE_DIR", str(tmp_path_factory.mktemp("site")))
        for _ in range(uploads):
            received = rng.standard_normal(N).astype(np.float32)  # another one each round
            change = (0.01 * rng.standard_normal(N)).astype(np.float32)
            largest = max(largest, float(np.abs(change).max()))
            wanted += change
            seen += upload(change, received, config(codec))
            bound = share / (1 - share) * largest + uploads * 2.0**-20
            assert np.abs(seen - wanted).max() <= bound


@pytest.mark.parametrize("codec", COARSE)
def test_the_rest_kept_is_what_the_server_does_not_see(site: Path, codec: str) -> None:
    received, change = rest_of(1), 0.01 * rest_of(2)
    seen = upload(change, received, config(codec))
    rest = feedback(site / "state").read(next(ROUNDS))
    np.testing.assert_allclose(rest, change - seen, rtol=0, atol=2**-21)
    assert rest.any()
    # The first upload has nothing to add, and is as without feedback.
    assert client_app._to_send(
        received + change, received, LAYOUT, config(codec, False), job()
    ) == encode(codec, received + change, received)
    # The second has.
    again = upload(change, received, config(codec))
    np.testing.assert_allclose(
        again + feedback(site / "state").read(next(ROUNDS)), change + rest, rtol=0, atol=2**-20
    )


@pytest.mark.parametrize(("codec", "with_feedback"), [("fp32", True), ("int4", False)])
def test_where_nothing_is_to_be_kept_nothing_is_read_or_written(
    site: Path, codec: str, with_feedback: bool
) -> None:
    feedback(site / "state").write(next(ROUNDS), rest_of(9))
    before = file(site / "state").read_bytes()
    received = rest_of(1)
    payload = client_app._to_send(rest_of(2), received, LAYOUT, config(codec, with_feedback), job())
    assert payload == encode(codec, rest_of(2), received)
    assert file(site / "state").read_bytes() == before


def test_another_run_starts_without_the_rest_of_the_last(site: Path) -> None:
    received, change = rest_of(1), small_beside_a_large_one()
    first = upload(change, received, config("int4"), run_id=1)
    assert upload(change, received, config("int4"), run_id=2).tobytes() == first.tobytes()
    assert upload(change, received, config("int4"), run_id=2).tobytes() != first.tobytes()


def test_the_codec_of_the_upload_counts_not_that_of_the_download(site: Path) -> None:
    both = replace(config("codec"), codec="int8", codec_down="fp32")
    received = rest_of(1)
    payload = client_app._to_send(rest_of(2), received, LAYOUT, both, job())
    assert payload == encode("int8", rest_of(2), received)
    assert feedback(site / "state").read(next(ROUNDS)).any()


def test_a_folder_that_cannot_be_written_costs_the_feedback_not_the_upload(
    site: Path, site_log: pytest.LogCaptureFixture
) -> None:
    (site / "state").write_text("a file in its place")  # also root cannot write here
    received = rest_of(1)
    for _ in range(2):
        payload = client_app._to_send(rest_of(2), received, LAYOUT, config("int4"), job())
        assert payload == encode("int4", rest_of(2), received)
    assert [r.levelname for r in site_log.records] == ["WARNING"] * 2
    assert "state/" in site_log.text
    assert "feedback" in site_log.text


def test_a_rest_that_cannot_be_replaced_is_not_added_a_second_time(
    site: Path, monkeypatch: pytest.MonkeyPatch, site_log: pytest.LogCaptureFixture
) -> None:
    received, change = np.zeros(N, np.float32), small_beside_a_large_one()
    rest = np.zeros(N, np.float32)
    rest[1] = 0.5
    feedback(site / "state").write(next(ROUNDS), rest)
    full_disk(monkeypatch)
    seen = sum(upload(change, received, config("int4")) for _ in range(10))
    assert site_log.records
    # 10 changes, of which each may lose half a step, and the old rest once: not ten times.
    assert np.asarray(seen)[1] <= 10 * 0.05 + 0.5 + 0.08
