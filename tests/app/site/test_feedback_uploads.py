"""What a site sends with error feedback: a coarse upload leaves out what a later one brings."""

import itertools
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from app import client_app
from app.config import RunConfig
from app.wire.adapter import Vector
from app.wire.codec import decode, encode
from tests.app.site.test_feedback import (
    LAYOUT,
    RUN,
    N,
    file,
    full_disk,
    name,
    read,
    rest_of,
    write,
)
from tests.samples import run_config

COARSE = ("bf16", "int8", "int4")
ROUNDS = itertools.count(1)


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


class Run:
    """What a server asks of the site that takes all that it gets."""

    def __init__(self, run_id: int = RUN) -> None:
        self.run_id, self.taken = run_id, ""  # nothing yet

    def job(self) -> ConfigRecord:
        number = next(ROUNDS)
        upload = name(number, self.run_id)
        taken = {"taken": self.taken} if self.taken else {}
        job = ConfigRecord({"round": number, "upload": upload, **taken})
        self.taken = upload
        return job


def config(codec: str, with_feedback: bool = True) -> RunConfig:
    return run_config(codec_up=codec, error_feedback=with_feedback)


def upload(change: Vector, received: Vector, config: RunConfig, run: Run) -> Vector:
    """The change that the server sees of a site that made this one."""
    payload = client_app._to_send(received + change, received, LAYOUT, config, run.job())
    return decode(config.up, payload, received) - received


def small_beside_a_large_one() -> Vector:
    """0.05 everywhere and 1 in each block: less than half of int4's steps of 1 / 7."""
    change = np.full(N, 0.05, np.float32)
    change[::64] = 1
    return change


def test_with_feedback_a_small_constant_change_arrives_without_it_never(site: Path) -> None:
    received, change = np.zeros(N, np.float32), small_beside_a_large_one()
    small = change < 1
    without = sum(upload(change, received, config("int4", False), Run()) for _ in range(40))
    assert not np.asarray(without)[small].any()
    assert not (site / "state").exists()
    run = Run()
    fed = sum(upload(change, received, config("int4"), run) for _ in range(40))
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
    run = Run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITE_DIR", str(tmp_path_factory.mktemp("site")))
        for _ in range(uploads):
            received = rng.standard_normal(N).astype(np.float32)  # another one each round
            change = (0.01 * rng.standard_normal(N)).astype(np.float32)
            largest = max(largest, float(np.abs(change).max()))
            wanted += change
            seen += upload(change, received, config(codec), run)
            bound = share / (1 - share) * largest + uploads * 2.0**-20
            assert np.abs(seen - wanted).max() <= bound


@pytest.mark.parametrize("codec", COARSE)
def test_the_rest_kept_is_what_the_server_does_not_see(site: Path, codec: str) -> None:
    received, change, run = rest_of(1), 0.01 * rest_of(2), Run()
    seen = upload(change, received, config(codec), run)
    rest = read(site / "state", run.taken)
    assert rest is not None
    np.testing.assert_allclose(rest, change - seen, rtol=0, atol=2**-21)
    assert rest.any()
    # The first upload has nothing to add, and is as without feedback.
    assert client_app._to_send(
        received + change, received, LAYOUT, config(codec, False), Run().job()
    ) == encode(codec, received + change, received)
    # The second has.
    again = upload(change, received, config(codec), run)
    left = read(site / "state", run.taken)
    assert left is not None
    np.testing.assert_allclose(again + left, change + rest, rtol=0, atol=2**-20)


@pytest.mark.parametrize(("codec", "with_feedback"), [("fp32", True), ("int4", False)])
def test_where_nothing_is_to_be_kept_nothing_is_read_or_written(
    site: Path, codec: str, with_feedback: bool
) -> None:
    run = Run()
    write(site / "state", str(run.job()["upload"]), rest_of(9))
    before = file(site / "state").read_bytes()
    received = rest_of(1)
    wanted = config(codec, with_feedback)
    payload = client_app._to_send(rest_of(2), received, LAYOUT, wanted, run.job())
    assert payload == encode(codec, rest_of(2), received)
    assert file(site / "state").read_bytes() == before


def test_another_run_starts_without_the_rest_of_the_last(site: Path) -> None:
    received, change, second = rest_of(1), small_beside_a_large_one(), Run(2)
    first = upload(change, received, config("int4"), Run(1))
    assert upload(change, received, config("int4"), second).tobytes() == first.tobytes()
    assert upload(change, received, config("int4"), second).tobytes() != first.tobytes()


@pytest.mark.parametrize("lost", ["the folder", "feedback for one upload", "privacy"])
def test_a_rest_that_is_not_there_is_said(
    site: Path, site_log: pytest.LogCaptureFixture, lost: str
) -> None:
    received, change, run = rest_of(1), small_beside_a_large_one(), Run()
    first = upload(change, received, config("int4"), run)
    assert not site_log.records
    wanted = config("int4")
    if lost == "the folder":
        shutil.rmtree(site / "state")
    elif lost == "privacy":  # clipped to more than the change is long
        wanted = replace(wanted, clip_norm=100.0)
    else:
        upload(change, received, config("int4", False), run)
    taken = run.taken
    assert upload(change, received, wanted, run).tobytes() == first.tobytes()
    said = f"error feedback starts anew: state/ does not have what upload {taken} left out"
    assert [r.getMessage() for r in site_log.records] == [said]
    assert upload(change, received, wanted, run).tobytes() != first.tobytes()
    assert len(site_log.records) == 1


def test_the_codec_of_the_upload_counts_not_that_of_the_download(site: Path) -> None:
    both = replace(config("codec"), codec="int8", codec_down="fp32")
    received = rest_of(1)
    run = Run()
    payload = client_app._to_send(rest_of(2), received, LAYOUT, both, run.job())
    assert payload == encode("int8", rest_of(2), received)
    rest = read(site / "state", run.taken)
    assert rest is not None
    assert rest.any()


def test_a_folder_that_cannot_be_written_costs_the_feedback_not_the_upload(
    site: Path, site_log: pytest.LogCaptureFixture
) -> None:
    (site / "state").write_text("a file in its place")  # also root cannot write here
    received = rest_of(1)
    for _ in range(2):
        payload = client_app._to_send(rest_of(2), received, LAYOUT, config("int4"), Run().job())
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
    run = Run()
    write(site / "state", str(run.job()["upload"]), rest)
    full_disk(monkeypatch)
    seen = sum(upload(change, received, config("int4"), run) for _ in range(10))
    assert site_log.records
    # 10 changes, of which each may lose half a step, and the old rest once: not ten times.
    assert np.asarray(seen)[1] <= 10 * 0.05 + 0.5 + 0.08
