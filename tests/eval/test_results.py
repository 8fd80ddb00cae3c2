"""The results folder as the evaluation sees it: newest run, complete rounds, intact weights."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from app.server.checkpoint import RunFolder
from app.wire.adapter import Layout, initial_adapter
from eval import EvalError
from eval.results import adapters, choose_run, metrics, newest_run
from tests.samples import run_config

CONFIG = run_config(lora_r=4)
LAYOUT = Layout.of({"layers.0.q_proj": [40, 50], "layers.0.v_proj": [40, 50]}, CONFIG)


def save(results: Path, run: int, *numbers: int) -> Path:
    """The run's folder, with these rounds."""
    folder = RunFolder(results, run)
    for number in numbers:
        vector = initial_adapter(LAYOUT, seed=number)
        facts = {"base_model_fingerprint": f"print-{number}"}
        folder.save_round(number, LAYOUT, vector, CONFIG, facts)
    folder.write_run({"status": "running"})
    return folder.path


def made(run: Path, seconds_ago: float) -> None:
    """Let the run's last round look as if it were written then."""
    then = time.time() - seconds_ago
    for manifest in run.glob("peft_*/round.json"):
        os.utime(manifest, (then, then))


def test_latest_says_which_run_is_the_newest(tmp_path: Path) -> None:
    first, second = save(tmp_path, 7, 1), save(tmp_path, 12, 1)
    made(first, 10)
    made(second, 60)  # the link is right whatever the clock said
    assert newest_run(tmp_path) == second
    save(tmp_path, 7, 2)
    assert newest_run(tmp_path) == first
    assert choose_run(tmp_path, None, 0) == first


def test_latest_is_followed_to_the_runs_own_name(tmp_path: Path) -> None:
    save(tmp_path, 7, 1)
    assert newest_run(tmp_path).name == "7"
    assert choose_run(tmp_path, "latest", 0).name == "7"


@pytest.mark.parametrize("link", ["none", "to a deleted run", "to a run without a round"])
def test_without_the_link_time_says_which_is_the_newest(tmp_path: Path, link: str) -> None:
    runs = [save(tmp_path, number, 1, 2) for number in (30, 4, 9)]
    for run, seconds in zip(runs, (50, 10, 90), strict=True):
        made(run, seconds)
    (tmp_path / "latest").unlink()
    (tmp_path / "empty").mkdir()
    if link != "none":
        (tmp_path / "latest").symlink_to("gone" if "deleted" in link else "empty")
    assert newest_run(tmp_path) == choose_run(tmp_path, "latest", 0) == runs[1]


def test_the_newest_run_is_the_one_whose_last_round_is(tmp_path: Path) -> None:
    # A round written again is no newer run: the runs' last rounds are compared.
    old, new = save(tmp_path, 1, 1, 2), save(tmp_path, 2, 1)
    (tmp_path / "latest").unlink()
    made(old, 50)
    made(new, 20)
    os.utime(old / "peft_1" / "round.json")
    assert newest_run(tmp_path) == new


@pytest.mark.parametrize("there", ["nothing", "an empty run", "half a round"])
def test_without_a_complete_adapter_the_message_says_what_to_do(tmp_path: Path, there: str) -> None:
    results = tmp_path / "results"
    if there == "an empty run":
        RunFolder(results, 7)
    elif there == "half a round":
        run = save(results, 7, 1)
        (run / "peft_1").rename(run / ".peft_1.part")
    with pytest.raises(EvalError, match="--peft-path") as caught:
        newest_run(results)
    assert str(results) in str(caught.value)
    assert "--wait" in str(caught.value)


def test_half_written_rounds_are_invisible(tmp_path: Path) -> None:
    run = save(tmp_path, 7, 1, 2)
    for name in (".peft_3.part", "peft_3"):
        shutil.copytree(run / "peft_2", run / name)
    (run / "peft_3" / "round.json").unlink()
    assert [a.round for a in adapters(run, None, every=True)] == [1, 2]
    assert [a.round for a in adapters(run, None, every=False)] == [2]
    with pytest.raises(EvalError, match="--round 3"):
        adapters(run, 3, every=False)


def test_adapters_are_asked_for_by_number_or_all_or_the_last(tmp_path: Path) -> None:
    run = save(tmp_path, 7, 2, 10, 1)
    (last,) = adapters(run, None, every=False)
    assert (last.round, last.name, last.folder) == (10, "peft_10", run / "peft_10")
    assert last.fingerprint == "print-10"
    (second,) = adapters(run, 2, every=False)
    assert (second.round, second.name, second.fingerprint) == (2, "peft_2", "print-2")
    assert [a.round for a in adapters(run, None, every=True)] == [1, 2, 10]


def test_round_zero_is_a_round(tmp_path: Path) -> None:
    run = save(tmp_path, 7, 0, 1)
    assert [a.round for a in adapters(run, 0, every=False)] == [0]


def test_a_missing_round_is_named_with_those_there(tmp_path: Path) -> None:
    run = save(tmp_path, 7, 2, 10, 1)
    with pytest.raises(EvalError) as caught:
        adapters(run, 3, every=False)
    assert str(caught.value) == "--round 3: run 7 has complete rounds 1, 2, 10"


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone"])
def test_weights_that_are_not_the_runs_are_refused(tmp_path: Path, damage: str) -> None:
    run = save(tmp_path, 7, 1, 2)
    weights = run / "peft_1" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content if damage == "a flipped bit" else content[:-4])
    for number, every in ((1, False), (None, True)):
        with pytest.raises(EvalError, match="sha256") as caught:
            adapters(run, number, every)
        assert str(weights) in str(caught.value)
    assert [a.round for a in adapters(run, None, every=False)] == [2]


def test_a_run_is_chosen_by_its_name(tmp_path: Path) -> None:
    first = save(tmp_path, 7, 1)
    save(tmp_path, 12, 1)
    assert choose_run(tmp_path, "7", 0) == first


def test_an_unknown_run_is_named_with_those_there(tmp_path: Path) -> None:
    for number in (7, 12):
        save(tmp_path, number, 1)
    with pytest.raises(EvalError) as caught:
        choose_run(tmp_path, "8", 0)
    message = str(caught.value)
    assert message.startswith("--run 8: ")
    assert "7" in message.split("runs: ")[1]
    assert "12" in message.split("runs: ")[1]


@pytest.mark.parametrize("name", [None, "7"])
def test_waiting_ends_when_an_adapter_appears(tmp_path: Path, name: str | None) -> None:
    results = tmp_path / "results"
    writer = threading.Timer(0.3, save, (results, 7, 1))
    writer.start()
    started = time.monotonic()
    try:
        assert choose_run(results, name, 3) == results / "7"
    finally:
        writer.join()
    assert 0.3 <= time.monotonic() - started < 60


@pytest.mark.parametrize("name", [None, "7"])
def test_waiting_ends_with_the_error_after_its_time(tmp_path: Path, name: str | None) -> None:
    started = time.monotonic()
    with pytest.raises(EvalError, match="no complete adapter"):
        choose_run(tmp_path, name, 0.3)
    assert 0.3 <= time.monotonic() - started < 60


def test_what_is_there_is_not_waited_for(tmp_path: Path) -> None:
    run = save(tmp_path, 7, 1)
    started = time.monotonic()
    assert choose_run(tmp_path, None, 600) == choose_run(tmp_path, "7", 600) == run
    assert time.monotonic() - started < 60


def test_metrics_are_a_line_a_round(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    assert metrics(folder.path) == []
    lines: list[dict[str, object]] = [{"round": n, "loss": 1 / n} for n in (1, 2, 3)]
    for line in lines:
        folder.add_metrics(line)
    assert metrics(folder.path) == lines


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 7)
    for number in (1, 2):
        folder.add_metrics({"round": number, "bytes": {"up": [1, 2]}})
    path = folder.path / "metrics.jsonl"
    whole = path.read_text()
    line = json.dumps({"round": 3, "bytes": {"up": [3]}})
    for end in range(len(line)):
        path.write_text(whole + line[:end])
        assert [m["round"] for m in metrics(folder.path)] == [1, 2]
    path.write_text(whole + line)
    assert [m["round"] for m in metrics(folder.path)] == [1, 2, 3]
