"""python -m eval export: what goes home loads elsewhere with the same logits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from app.server.checkpoint import rounds
from eval.__main__ import main
from eval.benchmarks import wrap
from eval.model import Adapter, attached, load_base
from supernode.quantise import prepare_model
from tests.eval.taken_home import HUB_ID, Home, card_of, train
from tests.samples import ROWS
from tests.tiny_model import build_tiny_family

ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
FLAG = {"nf4": "nf4-bf16", "int8": "8", "none": "0"}
QUESTIONS = [wrap(row["input"]) for row in ROWS[:4]]

# All that somebody elsewhere has. It gets folders of models and of adapters on them.
ELSEWHERE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for name, model, adapter, tokenizer in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    with torch.inference_mode():
        prompts = [tokenizer(text, return_tensors="pt") for text in json.loads(sys.argv[2])]
        found[name] = [model.eval()(p.input_ids).logits[0, -1].tolist() for p in prompts]
assert not {"app", "eval", "supernode", "superlink"} & sys.modules.keys()
json.dump(found, open(sys.argv[3], "w"))
"""


def here(home: Home, kind: str, adapter: bool = True) -> torch.Tensor:
    """Logits of the run's second round on what it was trained on, as the evaluation has them."""
    base = load_base(HUB_ID, FLAG[kind], "cpu", home.models, home.models)
    second = Adapter(home.results[kind] / "7" / "peft_2", "peft_2")

    def logits(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            prompts = (torch.tensor([base.tokenizer.encode(text)]) for text in QUESTIONS)
            return torch.stack([model(ids).logits[0, -1] for ids in prompts])

    if not adapter:
        return logits(base.model)
    with attached(second, base) as model:
        return logits(model)


@pytest.fixture(scope="module")
def elsewhere(
    home: Home, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Folders that were exported, by name, and their logits in a process of PEFT's users."""
    folder = tmp_path_factory.mktemp("elsewhere")
    assert home.export(folder / "adapter", "--round", "best", kind="none") == 0
    for kind in FLAG:
        assert home.export(folder / kind, "--round", "best", "--merge", kind=kind) == 0
    jobs: list[list[Any]] = [["adapter", str(tiny_model), str(folder / "adapter"), str(tiny_model)]]
    jobs += [[kind, str(folder / kind), None, str(folder / kind)] for kind in FLAG]
    said = folder / "logits.json"
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(jobs), json.dumps(QUESTIONS), str(said)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder, {k: torch.tensor(v) for k, v in json.loads(said.read_text()).items()}


def test_the_adapter_gives_the_same_logits_where_there_is_only_peft(
    home: Home, elsewhere: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder, logits = elsewhere
    assert {p.name for p in (folder / "adapter").iterdir()} == ADAPTER
    assert torch.allclose(logits["adapter"], here(home, "none"), rtol=0, atol=1e-4)
    assert not torch.allclose(logits["adapter"], here(home, "none", adapter=False), atol=0.1)


@pytest.mark.parametrize("kind", FLAG)
def test_the_merged_model_gives_them_where_there_is_only_transformers(
    home: Home, elsewhere: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    folder, logits = elsewhere
    off = (logits[kind] - here(home, kind)).norm()
    assert off < 0.05 * (logits[kind] - here(home, kind, adapter=False)).norm()
    others = [other for other in FLAG if other != kind]
    assert all(off < (logits[kind] - here(home, other)).norm() for other in others)
    config = json.loads((folder / kind / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert not any(p.name.startswith("adapter") for p in (folder / kind).iterdir())


@pytest.mark.parametrize("kind", FLAG)
def test_each_merged_weight_is_rounded_once_from_base_and_adapter(
    home: Home, elsewhere: tuple[Path, dict[str, torch.Tensor]], kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(elsewhere[0] / kind).state_dict()
    base = load_base(HUB_ID, FLAG[kind], "cpu", home.models, home.models).model.state_dict()
    lora = load_file(home.results[kind] / "7" / "peft_2" / "adapter_model.safetensors")
    changed = 0
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        a = lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = lora[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            weight = weight + 8 / 4 * torch.from_numpy(b) @ torch.from_numpy(a)
            changed += 1
        assert torch.allclose(merged[name].float(), weight, rtol=2**-8, atol=1e-6), name
    assert changed == len(lora) / 2 == 4


def test_weights_that_quantising_has_turned_round_are_turned_back(tmp_path: Path) -> None:
    """GPT-2's; some of them are square, so a shape tells nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_tiny_family(tmp_path / "source", "gpt2")
    models = tmp_path / "models"
    made = prepare_model(models, tmp_path / "unused", str(tmp_path / "source"), "nf4", None)
    base = json.loads((made / "base.json").read_text()) | {"name": HUB_ID}
    (made / "base.json").write_text(json.dumps(base))
    train(tmp_path / "results", base, target_modules="all-linear")
    to, words = tmp_path / "to", ["export", "--merge", "--round", "best"]
    places = ["--results", str(tmp_path / "results"), "--models", str(models), "--to", str(to)]
    assert main([*words, *places]) == 0
    home = Home(models, {"nf4": tmp_path / "results"})
    merged = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(to)
    with torch.inference_mode():
        prompts = (tokenizer(text, return_tensors="pt").input_ids for text in QUESTIONS)
        logits = torch.stack([merged(ids).logits[0, -1] for ids in prompts])
    assert (logits - here(home, "nf4")).norm() < 0.05 * (
        logits - here(home, "nf4", adapter=False)
    ).norm()


@pytest.mark.parametrize(("asked", "number"), [("best", 2), ("last", 3), ("1", 1), (None, 3)])
def test_the_round_is_the_one_that_was_asked_for(
    home: Home, tmp_path: Path, asked: str | None, number: int
) -> None:
    words = ["--round", asked] if asked else []
    assert home.export(tmp_path / "deep" / "mine", "--run", "7", *words) == 0
    weights = (tmp_path / "deep" / "mine" / "adapter_model.safetensors").read_bytes()
    source = rounds(home.results["nf4"] / "7")[number]
    assert weights == (source / "adapter_model.safetensors").read_bytes()
    assert [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")] == []
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "deep" / "mine").rglob("*")}
    assert modes == {0o644}
    assert (tmp_path / "deep" / "mine").stat().st_mode & 0o777 == 0o755


def test_the_card_of_a_merged_model_says_into_what(
    elsewhere: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    for kind, words in (
        ("nf4", "the dequantised nf4 weights that the sites trained on, in bfloat16"),
        ("int8", "the dequantised int8 weights that the sites trained on, in bfloat16"),
        ("none", "the original weights that the sites trained on, in bfloat16"),
    ):
        head, text = card_of(elsewhere[0] / kind)
        assert head["library_name"] == "transformers"
        assert f"| merged into | {words} |" in text
