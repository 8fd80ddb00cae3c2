"""``model.prompt = "chat"`` at a site: from the prepared model to what it trains and scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors import safe_open
from transformers import AutoTokenizer

from app import client_app
from app.config import RunConfig
from app.server.preflight import Sites
from app.server.strategy import Strategy
from app.site import check, training
from app.site.base_model import BaseModel, find
from app.site.chat import chosen
from app.site.examples import Example, encode_all
from app.site.rows import Row
from app.wire.adapter import Layout, initial_adapter, save_peft
from supernode.quantise import prepare_model
from supernode.source import fingerprints
from supernode.verify import verify
from tests.samples import ROWS, run_config
from tests.stand_in_grid import Node, StandInGrid
from tests.tiny_model import build_tiny_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NODE_ID = 1000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "talks"
    build_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def talks(source: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    models = tmp_path_factory.mktemp("talking")
    prepare_model(models, models / "unused-cache", str(source), "none", None)
    return find(models, str(source), 0)


@pytest.fixture
def config(
    talks: BaseModel, site: Path, base: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], RunConfig]:  # fmt: skip
    """Of a run of the model that has a template, which is this site's."""
    models = talks.folder.parent
    monkeypatch.setenv("MODELS_DIR", str(models))
    verify(models, tmp_path / "verified.json", {})
    return lambda prompt: run_config(**base | {"model_name": talks.name, "prompt": prompt})


def context(config: RunConfig) -> Context:
    flat = cast(dict[str, Any], config.flat())
    return Context(7, NODE_ID, {"partition-id": 0, "num-partitions": 1}, RecordDict(), flat)


def node(config: RunConfig) -> Node:
    handlers = {"train": client_app.train, "evaluate": client_app.evaluate}
    return lambda m: handlers[m.metadata.message_type](m, context(config))


def asked(config: RunConfig) -> ConfigRecord:
    question = Message(RecordDict(), dst_node_id=NODE_ID, message_type="query")
    return client_app.preflight(question, context(config)).content.config_records["preflight"]


def test_a_prepared_model_keeps_its_template_and_is_another_with_another(
    source: Path, talks: BaseModel
) -> None:
    assert (talks.folder / "chat_template.jinja").read_text() == TEMPLATE
    assert "chat_template.jinja" in talks.files.keys() & talks.sha256.keys()
    before = fingerprints(source)["none"]
    assert talks.fingerprint == before
    (source / "chat_template.jinja").write_text(TEMPLATE + " ")
    try:
        assert fingerprints(source)["none"] != before
    finally:
        (source / "chat_template.jinja").write_text(TEMPLATE)


def test_a_site_trains_and_scores_in_the_words_of_the_run(
    config: Callable[[str], RunConfig], talks: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Example]] = {}
    train, evaluate = training.train, training.evaluate

    def trained(model: Any, examples: Any, *rest: Any) -> Any:
        seen["train"] = examples
        return train(model, examples, *rest)

    def evaluated(model: Any, examples: Any, config: Any) -> Any:
        seen["holdout"] = examples
        return evaluate(model, examples, config)

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setattr(training, "evaluate", evaluated)
    tokenizer = AutoTokenizer.from_pretrained(talks.folder)
    rows = [Row(row["input"], row["output"]) for row in ROWS]
    found = {}
    for prompt in ("alpaca", "chat"):
        run = config(prompt)
        assert asked(run)["num-examples"] == 8
        sites = Sites({0: NODE_ID}, {0: 8}, {0: 2}, "aaaa", talks.linear_layers, {}, {})
        layout = Layout.of(talks.linear_layers, run)
        strategy = Strategy(StandInGrid({NODE_ID: node(run)}), run, sites, layout, "7")
        start = initial_adapter(layout, run.seed)
        new, line = strategy.train_round(1, start)
        assert line["rejected"] == {}
        loss = strategy.evaluate(1, new)["eval_loss"]
        chat = chosen(prompt, talks.folder, talks.name)
        assert seen["train"] == encode_all(rows[:8], tokenizer, run.seq_length, chat)
        assert seen["holdout"] == encode_all(rows[8:10], tokenizer, run.seq_length, chat)
        found[prompt] = new, loss, seen["train"][0].input_ids
    assert found["alpaca"][1] != found["chat"][1]
    assert not np.array_equal(found["alpaca"][0], found["chat"][0])
    words = tokenizer.decode(found["chat"][2])
    assert words == f"<s>[user]{rows[0].question}</s>[assistant]{rows[0].answer}</s>"


def test_the_preflight_and_the_check_count_the_tokens_of_the_run_s_words(
    config: Callable[[str], RunConfig], talks: BaseModel, site: Path
) -> None:
    def told(prompt: str) -> str:
        asks = check.Site(site, talks.folder.parent, config(prompt))
        return {row["row"]: row for row in check.asked(asks)}["rows"]["what"]

    assert told("chat") != told("alpaca")


def test_a_base_model_without_a_template_is_refused_before_any_training(
    site: Path, models_dir: Path, base: dict[str, Any]
) -> None:
    run = run_config(**base, prompt="chat")
    wanted = (
        f"run config: model.prompt = 'chat': the chat template of base model {run.model_name} "
        "cannot be used: it has none (chat_template.jinja in its prepared folder); set it to "
        "'alpaca', or take another model"
    )
    assert str(asked(run)["error"]).splitlines()[0] == wanted
    rows = {row["row"]: row for row in check.asked(check.Site(site, models_dir, run))}
    for name in ("rows", "held-out rows"):
        assert (rows[name]["status"], rows[name]["what"]) == ("error", wanted)
    assert "error" not in asked(run_config(**base))


@pytest.mark.parametrize("prompt", ["alpaca", "chat"])
def test_the_weights_carry_a_prompt_that_is_not_flowertunes(tmp_path: Path, prompt: str) -> None:
    run = run_config(prompt=prompt, lora_r=4)
    layout = Layout.of({"m.q_proj": [4, 4], "m.v_proj": [4, 4]}, run)
    save_peft(tmp_path, layout, initial_adapter(layout, 0), run)
    with safe_open(tmp_path / "adapter_model.safetensors", "np") as file:
        about = file.metadata()
    assert about == {"format": "pt"} | ({"model.prompt": "chat"} if prompt == "chat" else {})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not [key for key in settings if "prompt" in key]  # PEFT's keys, and no other
