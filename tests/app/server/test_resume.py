"""A resumed run is the run that was interrupted: the same adapters, bit for bit."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from app import client_app
from app.config import CODECS, MIB, STRATEGIES, ConfigError, RunConfig
from app.server.checkpoint import RunFolder, rounds
from app.server.resume import bytes_before, find_earlier
from app.server_app import run
from app.wire.adapter import Layout, initial_adapter
from app.wire.codec import decode
from tests.killed import kills
from tests.samples import run_config, write_site_list
from tests.stand_in_grid import Node, StandInGrid

LINEAR = {"m.q_proj": [6, 10], "m.v_proj": [20, 10]}
SITES, ROUNDS = 4, 5
# What differs from one run to the next whatever it computes.
CLOCKS = ("seconds", "eval_seconds")
TRAFFIC = ("mb_sent", "mb_left")  # of a run that was cut off more than of one that was not


class Killed(BaseException):
    """The SuperLink dies: nothing of ours gets to run afterwards."""


def config(**changes: Any) -> RunConfig:
    base = {
        "num_server_rounds": ROUNDS, "lora_r": 2, "min_nodes": SITES, "min_train_nodes": 2,
        "fraction_evaluate": 1.0, "node_timeout_s": 1.0,
    }  # fmt: skip
    return run_config(**base | changes)


def site(number: int, folder: Path, config: RunConfig) -> Node:
    """A site whose training is a draw of noise; codecs and error feedback are the ClientApp's."""
    layout = Layout.of(LINEAR, config)

    def answer(message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == "query":
            facts: dict[str, Any] = {
                "partition-id": number, "num-partitions": SITES, "num-examples": 10 + number,
                "num-holdout": 2, "fingerprint": "aaaa", "device": "cpu", "versions": "{}",
                "linear-layers": json.dumps(LINEAR), "turn": str(number),
            }  # fmt: skip
            return Message(RecordDict({"preflight": ConfigRecord(facts)}), reply_to=message)
        sent = message.content.array_records["adapter"]["payload"].numpy().tobytes()
        received = decode(config.down, sent, initial_adapter(layout, config.seed))
        job = message.content.config_records["job"]
        if kind == "evaluate":
            loss: dict[str, Any] = {
                "num-tokens": 3,
                "num-correct": 1,
                "loss-sum": float(np.abs(received).sum()) % 1,  # any round may be the best
            }
            return Message(RecordDict({"metrics": MetricRecord(loss)}), reply_to=message)
        server_round = int(job["round"])  # type: ignore[arg-type]
        step = np.random.default_rng([number, server_round]).standard_normal(layout.size)
        step *= 2000 * config.learning_rate(server_round)  # as long as Adam's would be
        trained = received + step.astype(np.float32)
        os.environ["SITE_DIR"] = str(folder / f"site-{number}")
        payload = client_app._to_send(trained, received, layout, config, job)
        numbers = dict.fromkeys(("train-loss", "load-s", "train-s", "peak-memory-mb"), 1.0)
        counts = {"num-examples": 10 + number, "steps": 2, "num-tokens": 30}
        arrays = ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})
        content = RecordDict({"adapter": arrays, "metrics": MetricRecord({**numbers, **counts})})
        return Message(content, reply_to=message)

    return answer


def start(
    folder: Path, config: RunConfig, run_id: int, killed_after: int | None = None
) -> dict[str, Any]:
    """One run; ``killed_after`` this many messages, whatever they were."""
    sites = {100 + n: site(n, folder, config) for n in range(SITES)}
    answered = 0

    def counted(node: Node) -> Node:
        def answer(message: Message) -> Message | Exception | None:
            nonlocal answered
            answered += 1
            if killed_after is not None and answered > killed_after:
                raise Killed
            return node(message)

        return answer

    facts: dict[str, Any] = {"run_id": str(run_id)}
    grid = StandInGrid({k: counted(n) for k, n in sites.items()})
    listed = folder / "sites"
    if not listed.exists():
        write_site_list(listed, {100 + n: n for n in range(SITES)})
    os.environ["SITES_DIR"] = str(listed)
    run(grid, config, RunFolder(folder / "results", run_id), facts)
    return facts


def adapters(folder: Path, run_id: int) -> dict[int, bytes]:
    found = rounds(folder / "results" / str(run_id))
    return {n: (p / "adapter_model.safetensors").read_bytes() for n, p in found.items()}


def lines(folder: Path, run_id: int) -> list[dict[str, Any]]:
    text = (folder / "results" / str(run_id) / "metrics.jsonl").read_text()
    return [
        {k: v for k, v in json.loads(line).items() if k not in CLOCKS + TRAFFIC}
        for line in text.splitlines()
    ]


def best(folder: Path, run_id: int) -> tuple[dict[str, Any], str]:
    """What run.json and the link say."""
    run = folder / "results" / str(run_id)
    facts = json.loads((run / "run.json").read_text())
    return facts["best"], str((run / "best").readlink())


@settings(max_examples=25)
@given(
    codec=st.sampled_from(CODECS),
    name=st.sampled_from(STRATEGIES),
    # 4 answers to the preflight, 4 evaluations, then 2 trainings and 4 evaluations a round.
    ends=st.lists(st.integers(0, 8 + 6 * ROUNDS - 1), min_size=1, max_size=3),
)
def test_a_run_killed_anywhere_and_resumed_is_the_uninterrupted_run(
    tmp_path_factory: pytest.TempPathFactory, codec: str, name: str, ends: list[int]
) -> None:
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    wanted = config(codec=codec, strategy_name=name)
    start(whole, wanted, 1)
    resume = "0"
    for run_id, end in enumerate(ends, 1):
        try:
            start(broken, replace(wanted, resume=resume), run_id, end)
        except Killed:
            resume = f"{run_id},{resume}"
        else:
            break  # it had less to do than that
    else:
        run_id += 1
        start(broken, replace(wanted, resume=resume), run_id)
    assert adapters(broken, run_id) == adapters(whole, 1)
    assert lines(broken, run_id) == lines(whole, 1)
    assert best(broken, run_id) == best(whole, 1)


def test_runs_that_go_on_from_the_same_one_each_end_as_if_they_were_alone(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    wanted = config(codec="int4", min_train_nodes=SITES)
    start(whole, wanted, 1)
    with pytest.raises(Killed):
        start(broken, wanted, 11, 8 + 2 * 2 * SITES + 1)  # in round 3
    for run_id in (12, 13):
        start(broken, replace(wanted, resume="11"), run_id)
        assert adapters(broken, run_id) == adapters(whole, 1)


def test_the_chain_of_runs_is_recorded_and_no_round_is_lost_but_the_one_in_work(
    tmp_path: Path,
) -> None:
    with pytest.raises(Killed):
        start(tmp_path, config(), 11, 8 + 2 * 6 + 1)  # in round 3
    assert list(adapters(tmp_path, 11)) == [1, 2]
    with pytest.raises(Killed):
        start(tmp_path, config(resume="latest"), 12, 4 + 6 + 1)  # in round 4
    facts = start(tmp_path, config(resume="latest"), 13)
    assert facts["resumed_from"] == [
        {"run_id": "11", "last_round": 2},
        {"run_id": "12", "last_round": 3},
    ]
    assert list(adapters(tmp_path, 13)) == [1, 2, 3, 4, 5]
    assert (tmp_path / "results" / "latest").readlink() == Path("13")


def test_killed_at_any_step_on_the_disk_a_resumed_run_loses_no_round(tmp_path: Path) -> None:
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    small = config(num_server_rounds=2)
    start(whole, small, 1)
    with pytest.raises(Killed):
        start(begun, small, 11, 8 + 6 + 1)  # in round 2
    for folder in kills(lambda f: start(f, replace(small, resume="latest"), 12), begun):
        done = max(1, whole_lines(folder / "results" / "12"))
        for resume in ("latest", "12,11,0"):  # a person's way, and superlink.submit's
            earlier = find_earlier(folder / "results", replace(small, resume=resume))
            assert earlier
            assert earlier.server_round == done
        with suppress(Killed):  # the next run takes them over
            start(folder, replace(small, resume="latest"), 13, killed_after=0)
        assert adapters(folder, 13) == {n: adapters(whole, 1)[n] for n in range(1, done + 1)}
        assert lines(folder, 13) == lines(whole, 1)[:done]
        lowest = min(lines(whole, 1)[:done], key=lambda line: line["eval_loss_median"])["round"]
        assert best(folder, 13)[0]["round"] == lowest
        assert best(folder, 13)[1] == f"peft_{lowest}"
        assert (folder / "results" / "latest").readlink() == Path("13")


def whole_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def adapters_sent(folder: Path, run_id: int) -> float:
    """In the last line, and in run.json, as so many adapters in float32."""
    run = folder / "results" / str(run_id)
    each = 4 * Layout.of(LINEAR, config()).size
    sent = json.loads((run / "run.json").read_text())["bytes_sent"] / each
    if (run / "metrics.jsonl").exists():
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["mb_sent"] * MIB / each <= sent
    return float(sent)


def test_the_bytes_of_rounds_that_were_cut_off_are_counted(tmp_path: Path) -> None:
    """4 adapters for an evaluation, 2 down and 2 up for a training, an order before it is sent."""
    with pytest.raises(Killed):
        start(tmp_path, config(), 11, 8 + 2 * 6 + 1)  # round 3 has been ordered
    assert adapters_sent(tmp_path, 11) == 4 + 2 * 8 + 2
    with pytest.raises(Killed):
        start(tmp_path, config(resume="11,0"), 12, 1)  # in the preflight
    assert adapters_sent(tmp_path, 12) == 4 + 2 * 8 + 2
    with pytest.raises(Killed):
        start(tmp_path, config(resume="12,11,0"), 13, 4 + 6 + 2)  # round 4 is being evaluated
    assert adapters_sent(tmp_path, 13) == 4 + 2 * 8 + 2 + 8 + 8
    start(tmp_path, config(resume="13,12,11,0"), 14)
    assert adapters_sent(tmp_path, 14) == 4 + 2 * 8 + 2 + 8 + 8 + 2 * 8
    last = json.loads((tmp_path / "results/14/metrics.jsonl").read_text().splitlines()[-1])
    each = 4 * Layout.of(LINEAR, config()).size
    assert last["mb_sent"] * MIB == pytest.approx(adapters_sent(tmp_path, 14) * each)


def test_the_bytes_of_a_run_that_ended_before_its_first_checkpoint_are_counted(
    tmp_path: Path,
) -> None:
    with pytest.raises(Killed):
        start(tmp_path, config(), 11, 8 + 1)
    start(tmp_path, config(resume="11,0", num_server_rounds=1), 12)
    assert adapters_sent(tmp_path, 12) == 4 + 2 + 4 + 8


@pytest.mark.parametrize("left", [None, "", "[]", '{"bytes_sent": "x"}'])
def test_without_a_count_the_last_line_says_what_was_sent(tmp_path: Path, left: str | None) -> None:
    start(tmp_path, config(num_server_rounds=1), 1)
    sent = adapters_sent(tmp_path, 1)
    earlier = find_earlier(tmp_path / "results", config(resume="1"))
    path = tmp_path / "results" / "1" / "run.json"
    path.unlink() if left is None else path.write_text(left)
    each = 4 * Layout.of(LINEAR, config()).size
    assert bytes_before(tmp_path / "results", config(resume="1"), earlier) == sent * each
    assert bytes_before(tmp_path / "results", config(), None) == 0


def test_where_the_disk_knows_no_links_the_rounds_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, config(num_server_rounds=1), 1)

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    start(tmp_path, config(num_server_rounds=2, resume="1"), 2)
    shutil.rmtree(tmp_path / "results" / "1")
    assert list(adapters(tmp_path, 2)) == [1, 2]


def test_a_completed_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    start(tmp_path, config(), 1)
    start(tmp_path, config(resume="1"), 2, killed_after=SITES)  # the preflight alone
    assert adapters(tmp_path, 2) == adapters(tmp_path, 1)


def damage_the_last(run: Path) -> None:
    weights = run / "peft_5" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")


def cut_the_last_line(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])


def lose_the_manifest(run: Path) -> None:
    (run / "peft_5" / "round.json").unlink()


@pytest.mark.parametrize("harm", [damage_the_last, cut_the_last_line, lose_the_manifest])
def test_a_round_that_is_not_whole_is_made_again(tmp_path: Path, harm: Any) -> None:
    start(tmp_path, config(), 1)
    wanted = adapters(tmp_path, 1)
    harm(tmp_path / "results" / "1")
    start(tmp_path, config(resume="1"), 2)
    assert adapters(tmp_path, 2) == wanted


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("app").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("app").removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resume": "latest", "seed": 8}, "seed = 8, but run 1 has"),
        ({"resume": "1", "lora_alpha": 3}, "model.lora.peft-lora-alpha = 3, but run 1 has"),
        ({"resume": "1", "prompt": "chat"}, "model.prompt = 'chat', but run 1 has 'alpaca'"),
        ({"resume": "1", "num_server_rounds": 4}, "run 1 has 5 rounds, num-server-rounds = 4"),
        ({"resume": "2"}, "resume = '2': no complete round in .*; runs that have one: 1"),
        ({"resume": "2,77"}, "runs that have one: 1"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    start(tmp_path, config(), 1)
    with pytest.raises(ConfigError, match=said) as caught:
        find_earlier(tmp_path / "results", config(**changes))
    assert "\n" not in str(caught.value)


def test_a_run_from_before_there_was_a_choice_of_prompts_had_alpaca(tmp_path: Path) -> None:
    start(tmp_path, config(), 1)
    path = tmp_path / "results" / "1" / "run.json"
    facts = json.loads(path.read_text())
    del facts["config"]["model.prompt"]
    path.write_text(json.dumps(facts))
    assert find_earlier(tmp_path / "results", config(resume="1"))
    with pytest.raises(ConfigError, match=r"model\.prompt = 'chat', but run 1 has 'alpaca'"):
        find_earlier(tmp_path / "results", config(resume="1", prompt="chat"))


def test_another_base_model_at_the_sites_is_refused(tmp_path: Path) -> None:
    start(tmp_path, config(), 1)
    earlier = find_earlier(tmp_path / "results", config(resume="1"))
    assert earlier
    with pytest.raises(ConfigError, match="base_model_fingerprint aaaa, the sites now bbbb"):
        earlier.adapter(Layout.of(LINEAR, config()), "bbbb")
    with pytest.raises(ConfigError, match="has layout"):
        earlier.adapter(Layout.of(LINEAR, config(lora_r=3)), "aaaa")


def test_a_changed_setting_that_may_change_is_said(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    start(tmp_path, config(), 1)
    find_earlier(tmp_path / "results", config(resume="1", batch_size=2, server_lr=1.4))
    assert "per-device-train-batch-size = 2, in run 1 16" in log.text
    assert "strategy.server-lr = 1.4, in run 1 1.0" in log.text


@pytest.mark.parametrize("value", ["last", "../1", "1;2", "1,", " ", "-1"])
def test_resume_is_latest_or_run_ids(value: str) -> None:
    with pytest.raises(ConfigError, match=r"resume = .* must be empty, or"):
        config(resume=value)
