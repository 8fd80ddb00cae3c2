"""A site's side of a round, in this process: what it receives, trains and sends back."""

import fcntl
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from app import client_app
from app.config import CODECS, STRATEGIES, RunConfig
from app.server.answer import Answer
from app.server.preflight import Sites
from app.server.strategy import Strategy
from app.site import training, verified
from app.site.base_model import find
from app.site.device import Gpu
from app.site.partition import SiteError
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.codec import encode
from supernode.verify import verify
from tests.samples import ROWS, run_config, write_jsonl
from tests.stand_in_grid import Node, StandInGrid

PARTITION, NODE_ID = 0, 1000


def strategy(models_dir: Path, config: RunConfig) -> Strategy:
    """The server's side, whose only node is the site of this process."""
    linear = find(models_dir, config.model_name, config.quantization).linear_layers
    sites = Sites({PARTITION: NODE_ID}, {PARTITION: 8}, {PARTITION: 2}, "aaaa", linear, {}, {})
    layout = Layout.of(linear, config)
    return Strategy(StandInGrid({NODE_ID: node(config)}), config, sites, layout, "7")


def node(config: RunConfig) -> Node:
    run_config = cast(dict[str, Any], config.flat())
    context = Context(
        7, NODE_ID, {"partition-id": PARTITION, "num-partitions": 1}, RecordDict(), run_config
    )
    handlers = {"train": client_app.train, "evaluate": client_app.evaluate}
    return lambda m: handlers[m.metadata.message_type](m, context)


def moved(layout: Layout, config: RunConfig) -> Vector:
    noise = np.random.default_rng(1).standard_normal(layout.size).astype(np.float32)
    return initial_adapter(layout, config.seed) + np.float32(0.01) * noise


def message(payload: bytes, layout_hash: str) -> Message:
    content = RecordDict(
        {
            "adapter": ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))}),
            "job": ConfigRecord({"round": 1, "layout": layout_hash, "upload": "7:1:0"}),
        }
    )
    return Message(content, dst_node_id=NODE_ID, message_type="train")


@pytest.mark.parametrize("codec", CODECS)
def test_site_and_server_agree_on_a_whole_round_in_every_codec(
    site: Path, models_dir: Path, base: dict[str, Any], codec: str
) -> None:
    config = run_config(**base, codec=codec)
    s = strategy(models_dir, config)
    start = moved(s.layout, config)
    new, line = s.train_round(1, start)
    assert line["partitions"] == [PARTITION]
    assert line["rejected"] == {}
    assert line["num_examples"] == [8]
    assert line["update_norm"] > 0.01
    # What is sent coarsely is kept, and read again by the next round.
    rests = (site / "state").glob
    assert len(list(rests("feedback-*"))) == (codec != "fp32")
    s.train_round(2, new)
    assert len(list(rests("feedback-*"))) == (codec != "fp32")
    scored = s.evaluate(2, new)
    assert scored["eval_partitions"] == [PARTITION]
    assert 0 < scored["eval_loss"] < 20


@pytest.mark.parametrize("codec", CODECS)
def test_a_site_trains_what_the_server_believes_it_does(
    site: Path, models_dir: Path, base: dict[str, Any], codec: str
) -> None:
    config = run_config(**base, codec_down=codec)
    s = strategy(models_dir, config)
    start = moved(s.layout, config)
    gathered = s._ask("train", [PARTITION], 1, start)
    assert isinstance(s.grid, StandInGrid)
    _, layout, vector, job = client_app._received(s.grid.sent[0], config)
    assert layout == s.layout
    assert job["round"] == 1
    assert vector.tobytes() == gathered.sent.tobytes()
    assert (vector.tobytes() == start.tobytes()) == (codec == "fp32")
    assert np.abs(vector - start).max() < 0.01


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_site_keeps_its_turn_when_its_work_is_done(
    site: Path, models_dir: Path, base: dict[str, Any], kind: str
) -> None:
    """The model is still in memory then, and the upload still to come: its process goes on."""
    config = run_config(**base)
    s = strategy(models_dir, config)
    start = initial_adapter(s.layout, config.seed)
    assert s._ask(kind, [PARTITION], 1, start).failed == {}
    path = Path(os.environ["LOCK_DIR"]) / "device-cpu.lock"
    with path.open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_site_waits_for_its_turn_as_long_as_its_order_lives(
    site: Path, models_dir: Path, base: dict[str, Any], site_log: pytest.LogCaptureFixture
) -> None:
    config = run_config(**base)
    s = strategy(models_dir, config)
    start = initial_adapter(s.layout, config.seed)
    order = message(encode("fp32", start, start), s.layout.hash)
    order.metadata.ttl = 1.0
    with (Path(os.environ["LOCK_DIR"]) / "device-cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SiteError, match="no turn within 1 s on the CPU"):
            node(config)(order)
    assert "site-00 waits for its turn on the CPU" in site_log.text


def asked(config: RunConfig) -> ConfigRecord:
    context = Context(
        7, NODE_ID, {"partition-id": PARTITION, "num-partitions": 1}, RecordDict(),
        cast(dict[str, Any], config.flat()),
    )  # fmt: skip
    question = Message(RecordDict(), dst_node_id=NODE_ID, message_type="query")
    return client_app.preflight(question, context).content.config_records["preflight"]


def test_the_preflight_names_the_device_and_whom_the_site_shares_it_with(
    site: Path, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = asked(run_config(**base)), asked(run_config(**base))
    assert first["device"] == "cpu"
    assert first["turn"] == again["turn"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("LOCK_DIR", str(tmp_path / "elsewhere"))
    assert asked(run_config(**base))["turn"] != first["turn"]


def test_the_preflight_says_what_becomes_of_each_row_and_training_uses_as_many(
    site: Path, models_dir: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(question: str, answer: Any) -> dict[str, Any]:
        return {"frage": question, "antwort": answer}

    short = [row(f"What is {n}?", "A") for n in range(5)]
    cut = [row(f"And {n}?", "A word and another. " * 40) for n in range(3)]
    too_long = [row(f"{n} " + "and what of this? " * 40, "A") for n in range(2)]
    lost = [row("Why?", None), row("N/A", "So."), short[0], short[0], short[1]]
    write_jsonl(site / "data" / "train.jsonl", short + cut + too_long + lost)
    write_jsonl(
        site / "data" / "holdout.jsonl", [short[3], row("Or " * 300, "A"), row("Where?", "Here.")]
    )
    monkeypatch.setenv("DATA_COLUMNS", "Frage,Antwort")
    config = run_config(**base, seq_length=300)
    facts = dict(asked(config))
    answer = Answer.of(facts)
    assert answer.rows == {
        "train": {
            "read": 15, "empty": 2, "repeated": 3, "known": 0, "too_long": 2, "cut": 3, "used": 8,
        },
        "holdout": {
            "read": 3, "empty": 0, "repeated": 0, "known": 1, "too_long": 1, "cut": 0, "used": 1,
        },
    }  # fmt: skip
    assert (answer.num_examples, answer.num_holdout) == (8, 1)
    s = strategy(models_dir, config)
    new, line = s.train_round(1, initial_adapter(s.layout, config.seed))
    assert (line["num_examples"], line["rejected"]) == ([8], {})
    assert s.evaluate(1, new)["eval_partitions"] == [PARTITION]
    assert Answer.of(asked(run_config(**base, seq_length=16))).error == (
        "data/train.jsonl: no row keeps an answer within train.seq-length = 16 tokens"
    )


def test_a_base_model_without_a_readable_tokenizer_is_named_in_the_preflight(
    site: Path, models_dir: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenizers.Tokenizer.token_to_id", lambda *_: None)
    said = str(asked(run_config(**base))["error"])
    assert said.startswith(f"base model {base['model_name']}: no tokenizer.json with an EOS")


@pytest.mark.parametrize("part", ["train", "holdout"])
def test_rows_that_are_longer_than_the_model_takes_are_found_before_training(
    site: Path, models_dir: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """GPT-2 has a place for so many tokens: of one more it says IndexError, at each site."""
    made = find(models_dir, base["model_name"], 0)
    monkeypatch.setattr(client_app, "_base_model", lambda _: replace(made, positions=300))
    assert "error" not in asked(run_config(**base, seq_length=512))
    path = next((site / "data").glob(f"{part}.*"), site / "data" / f"{part}.jsonl")
    row = {"instruction": "", "input": "Long?", "output": "long " * 100}
    path.write_text((path.read_text() if path.exists() else "") + json.dumps(row) + "\n")
    assert Answer.of(asked(run_config(**base, seq_length=512))).error == (
        f"data/{path.name}: 1 rows are longer than the 300 tokens that {made.name} takes; "
        "lower train.seq-length = 512 to that"
    )
    assert "error" not in asked(run_config(**base, seq_length=300))


def test_too_little_memory_is_an_error_of_the_site_that_says_what_to_lower(
    site: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    def seen(free_gb: float) -> ConfigRecord:
        gpu = Gpu("NVIDIA Stand-in", True, 24_000_000_000, round(free_gb * 1e9))
        monkeypatch.setattr(client_app, "look", lambda state: gpu)
        return asked(run_config(**base | {"batch_size": 1024, "max_tokens_per_pass": 2**15}))

    wrong = run_config(**base | {"target_modules": "x_proj"})
    assert seen(23.5)["device"] == "NVIDIA Stand-in, 23.5 GB free of 24.0"
    refused = Answer.of(seen(6.25)).error
    assert re.fullmatch(
        r"GPU 1 \(NVIDIA Stand-in\) has 6\.2 GB free of 24\.0, this run needs about \d+\.\d GB; "
        r"train\.max-tokens-per-pass = \d+ needs \d\.\d GB and trains the same",
        refused,
    ), refused
    assert "'x_proj' is no linear layer" in str(asked(wrong)["error"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_only_fedprox_holds_the_site_to_what_it_received(
    site: Path,
    models_dir: Path,
    base: dict[str, Any],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    real = training.train

    def watched(model: Any, examples: Any, config: Any, lr: Any, seed: Any, mu: float = 0.0) -> Any:
        seen.append(mu)
        return real(model, examples, config, lr, seed, mu)

    monkeypatch.setattr(training, "train", watched)
    config = run_config(**base, strategy_name=name, proximal_mu=0.7)
    s = strategy(models_dir, config)
    _, line = s.train_round(1, initial_adapter(s.layout, config.seed))
    assert line["rejected"] == {}
    assert seen == [0.7 if name == "fedprox" else 0.0]


def test_an_adapter_of_another_layout_is_refused_by_the_site(
    site: Path, models_dir: Path, base: dict[str, Any]
) -> None:
    config = run_config(**base)
    s = strategy(models_dir, config)
    other = Layout.of(s.sites.linear_layers, run_config(**base | {"lora_r": 8}))
    payload = encode("fp32", moved(other, config), moved(other, config))
    with pytest.raises(SiteError, match=other.hash) as caught:
        node(config)(message(payload, other.hash))
    assert s.layout.hash in str(caught.value)


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_download_is_an_error_without_a_word_of_the_data(
    site: Path, models_dir: Path, base: dict[str, Any], codec: str,
    site_log: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = run_config(**base, codec=codec)
    s = strategy(models_dir, config)
    payload = encode(codec, moved(s.layout, config), initial_adapter(s.layout, config.seed))
    with pytest.raises(SiteError, match="PayloadError"):
        node(config)(message(payload[:-1], s.layout.hash))
    assert "_received" in site_log.text


def test_the_preflight_says_which_file_of_the_base_model_is_another(
    site: Path, models_dir: Path, base: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    models = Path(shutil.copytree(models_dir, tmp_path / "models"))
    config = run_config(**base)
    folder = find(models, config.model_name, 0).folder
    content = bytearray((folder / "generation_config.json").read_bytes())
    content[-5] ^= 1
    (folder / "generation_config.json").write_bytes(content)
    monkeypatch.setenv("MODELS_DIR", str(models))
    verify(models, tmp_path / "verified.json", {})
    said = str(asked(config)["error"])
    assert f"base model {config.model_name}: generation_config.json is not what" in said
    monkeypatch.setenv("MODELS_DIR", str(models_dir))
    verify(models_dir, tmp_path / "verified.json", {})
    assert asked(config)["num-holdout"] == 2
    s = strategy(models_dir, config)
    (tmp_path / "verified.json").unlink()  # the SuperNode has not come to it
    monkeypatch.setattr(verified, "WAIT_S", 0.0)
    payload = encode("fp32", moved(s.layout, config), moved(s.layout, config))
    with pytest.raises(SiteError, match="its files are still being read"):
        node(config)(message(payload, s.layout.hash))


MARKER = "patient Wilhelmina Zwetschge of ward 13"


def dumped(message: Message) -> bytes:
    """Everything of a message that leaves the site, as Flower puts it on the wire."""
    objects = get_all_nested_objects(message)
    error = message.error.reason or "" if message.has_error() else ""
    return b"".join(o.deflate() for o in objects.values()) + error.encode()


@pytest.mark.parametrize("codec", CODECS)
def test_no_message_of_a_site_holds_a_word_of_its_data(
    site: Path, models_dir: Path, base: dict[str, Any], codec: str
) -> None:
    for part, rows in (("train", ROWS[:8]), ("holdout", ROWS[8:16])):
        told = [r | {k: f"{MARKER} {r[k]} {MARKER}" for k in ("input", "output")} for r in rows]
        write_jsonl(site / "data" / f"{part}.jsonl", told)
    config = run_config(**base, codec=codec)
    s = strategy(models_dir, config)
    replies: list[Message] = []
    assert isinstance(s.grid, StandInGrid)
    honest = s.grid.nodes[NODE_ID]

    def overheard(asked: Message) -> Message | Exception | None:
        reply = honest(asked)
        assert isinstance(reply, Message)
        replies.append(reply)
        return reply

    s.grid.nodes[NODE_ID] = overheard
    new, line = s.train_round(1, initial_adapter(s.layout, config.seed))
    assert line["rejected"] == {}
    assert s.evaluate(1, new)["eval_tokens"] > 0
    context = Context(
        7, NODE_ID, {"partition-id": PARTITION, "num-partitions": 1}, RecordDict(),
        cast(dict[str, Any], config.flat()),
    )  # fmt: skip
    question = Message(RecordDict(), dst_node_id=NODE_ID, message_type="query")
    replies.append(client_app.preflight(question, context))
    assert len(replies) == 3
    for reply in replies:
        dump = dumped(reply)
        assert b"num-examples" in dump  # or it was not the message
        assert not [word for word in MARKER.split() if len(word) > 4 and word.encode() in dump]
    assert not [p for p in (site / "state").glob("*") if MARKER.encode() in p.read_bytes()]


def test_no_part_of_a_preflights_answer_can_be_foreseen(
    site: Path, base: dict[str, Any], models_dir: Path
) -> None:
    context = Context(
        7, NODE_ID, {"partition-id": PARTITION, "num-partitions": 1}, RecordDict(),
        cast(dict[str, Any], run_config(**base).flat()),
    )  # fmt: skip
    question = Message(RecordDict(), dst_node_id=NODE_ID, message_type="query")
    first, second = (get_all_nested_objects(client_app.preflight(question, context)) for _ in "12")
    assert not first.keys() & second.keys()
