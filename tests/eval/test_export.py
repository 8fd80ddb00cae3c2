"""python -m eval export: what goes home loads elsewhere with the same logits."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from safetensors.numpy import load_file, save_file

from app.server.checkpoint import RunFolder, rounds, sha256
from app.server_app import run
from app.wire.adapter import Layout, initial_adapter
from app.wire.codec import decode, encode
from eval.__main__ import main
from eval.benchmarks import wrap
from eval.model import Adapter, attached, load_base
from supernode.quantise import prepare_model
from tests.full_disk import full_disk
from tests.samples import ROWS, run_config, write_jsonl, write_site_list
from tests.stand_in_grid import Node, StandInGrid
from tests.tiny_model import build_tiny_family

HUB_ID = "org/tiny"
LOSSES = (4.0, 3.0, 2.0, 2.5)  # held out: before, and of rounds 1, 2, 3
ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "README.md"}
FLAG = {"nf4": "nf4-bf16", "int8": "8", "none": "0"}
BITS = {"nf4": 4, "int8": 8, "none": 0}
QUESTIONS = [wrap(row["input"]) for row in ROWS[:4]]


@dataclass(frozen=True)
class Home:
    """Prepared models under a hub's name, and a run of three rounds for each kind of them."""

    models: Path
    results: dict[str, Path]  # kind -> results folder, its run 7

    def export(self, to: Path, *arguments: str, kind: str = "nf4") -> int:
        places = ["--results", str(self.results[kind]), "--models", str(self.models)]
        return main(["export", *places, "--to", str(to), *arguments])


def site(number: int, base: dict[str, Any], layout: Layout, seed: int) -> Node:
    """Its training is a draw of noise, its loss the round's; all else is the server's own."""

    def answer(message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == "query":
            facts: dict[str, Any] = {
                "partition-id": number, "num-partitions": 2, "num-examples": 30 + number,
                "num-holdout": 3, "fingerprint": base["fingerprint"], "device": "cpu",
                "versions": "{}", "linear-layers": json.dumps(base["linear_layers"]),
                "turn": str(number),
            }  # fmt: skip
            return Message(RecordDict({"preflight": ConfigRecord(facts)}), reply_to=message)
        server_round = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
        if kind == "evaluate":
            loss: dict[str, Any] = {
                "num-tokens": 10,
                "num-correct": 4,
                "loss-sum": 10 * LOSSES[server_round],
            }
            return Message(RecordDict({"metrics": MetricRecord(loss)}), reply_to=message)
        sent = message.content.array_records["adapter"]["payload"].numpy().tobytes()
        received = decode("fp32", sent, initial_adapter(layout, seed))
        step = np.random.default_rng([number, server_round]).normal(0, 0.1, layout.size)
        payload = encode("fp32", received + step.astype(np.float32), received)
        arrays = ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})
        numbers = dict.fromkeys(("train-loss", "load-s", "train-s", "peak-memory-mb"), 1.5)
        counts = {"num-examples": 30 + number, "steps": 2, "num-tokens": 30}
        content = RecordDict({"adapter": arrays, "metrics": MetricRecord({**numbers, **counts})})
        return Message(content, reply_to=message)

    return answer


def train(results: Path, base: dict[str, Any], **changes: Any) -> None:
    """Run 7, by the ServerApp's own code."""
    sizes = {"num_server_rounds": 3, "min_nodes": 2, "min_train_nodes": 2, "max_norm_ratio": 99.0}
    config = run_config(
        **sizes, lora_r=4, lora_alpha=8, model_name=base["name"], quantization=base["bits"],
        **{"fraction_evaluate": 1.0} | changes,
    )  # fmt: skip
    layout = Layout.of(base["linear_layers"], config)
    grid = StandInGrid({100 + n: site(n, base, layout, config.seed) for n in range(2)})
    listed = write_site_list(results / "sites", {100 + n: n for n in range(2)})
    folder = RunFolder(results, 7)
    facts: dict[str, Any] = {"run_id": "7", "status": "running", "versions": {"flwr": "1.36.0"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITES_DIR", str(listed))
        run(grid, config, folder, facts)
    folder.write_run(facts | {"status": "completed"})


@pytest.fixture(scope="module")
def home(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    models = Path(shutil.copytree(models_dir, folder / "models"))
    results = {}
    for path in models.glob("*/base.json"):
        base = json.loads(path.read_text()) | {"name": HUB_ID}
        path.write_text(json.dumps(base))
        results[base["kind"]] = folder / base["kind"]
        train(results[base["kind"]], base)
    return Home(models, results)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULTS_DIR", "MODELS_DIR", "MODEL_CACHE", "DEVICE", "CA_FILE"):
        monkeypatch.delenv(name, raising=False)


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


# --- The card ---------------------------------------------------------------------------------


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The hub's metadata, and the text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_was_done_in_counts(home: Home, tmp_path: Path) -> None:
    assert home.export(tmp_path / "a", "--round", "best") == 0
    head, text = card_of(tmp_path / "a")
    assert head == {
        "library_name": "peft",
        "base_model": HUB_ID,
        "tags": ["federated-learning", "lora", "medical"],
    }
    second = home.results["nf4"] / "7" / "peft_2"
    fingerprint = json.loads((second / "round.json").read_text())["base_model_fingerprint"]
    for part in (
        f"`{HUB_ID}`, fingerprint `{fingerprint}`",
        "LoRA, r 4, alpha 8, on q_proj, v_proj",
        f"`{sha256(second)}`",
        "7: completed, 3 of 3 rounds",
        "2, the lowest held-out loss",
        "2, with 61 rows to train on and 6 held out",
        "| 1 | 2 | 1.5000 | 3.0000 | 2 | 0.4000 |",
        "| 2 | 2 | 1.5000 | 2.0000 | 2 | 0.4000 |",
        "No noise was added",
        "No benchmark",
        "medical_meadow_medical_flashcards",
        "which flatters that loss",
    ):
        assert part in text, part
    assert "| 3 | 2 |" not in text  # what came after it is another adapter's
    assert not re.search(r"site-\d|\b3[01]\b rows", text)  # whose rows, or how many of one site
    (recipe,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert tomllib.loads(recipe)["model"]["lora"]["peft-lora-r"] == 4


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


def test_the_card_has_the_evaluation_of_this_round_and_of_no_other(
    home: Home, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    results = Path(shutil.copytree(home.results["none"], tmp_path / "results", symlinks=True))
    pairs = [{"prompt": row["input"], "gold": "ABCD"[n % 4]} for n, row in enumerate(ROWS[:8])]
    write_jsonl(tmp_path / "demo-four.jsonl", pairs)
    words = ["--datasets", "demo-four", "--data-dir", str(tmp_path), "--quantization", "0"]
    places = ["--results", str(results), "--models", str(home.models)]
    assert main([*words, *places, "--round", "best"]) == 0
    report = json.loads((results / "7" / "eval" / "report.json").read_text())
    assert [s["round"] for s in report["subjects"]] == [None, 2]
    for asked in ("best", "last"):
        assert main(["export", *places, "--round", asked, "--to", str(tmp_path / asked)]) == 0
    score = report["subjects"][1]["scores"]["demo-four"]
    text = card_of(tmp_path / "best")[1]
    assert f"| demo: four options | 8 | {100 * base_accuracy(report):.2f} | " in text
    assert f" | {100 * score['accuracy']:.2f} | {100 * score['ci95'][0]:.2f} to " in text
    assert "Not comparable with published figures" in text
    assert "demo: four options" not in card_of(tmp_path / "last")[1]


def base_accuracy(report: dict[str, Any]) -> float:
    return float(report["subjects"][0]["scores"]["demo-four"]["accuracy"])


def test_the_card_says_what_was_not_measured_and_what_noise_was_added(
    home: Home, tmp_path: Path
) -> None:
    base = json.loads(next(home.models.glob("*none*/base.json")).read_text())
    train(tmp_path / "results", base, fraction_evaluate=0.0, clip_norm=2.0, noise_multiplier=0.5)
    words = ["export", "--results", str(tmp_path / "results"), "--to", str(tmp_path / "a")]
    assert main(words) == 0
    text = card_of(tmp_path / "a")[1]
    assert "Noise of 0.5 times a clipping norm of 2 was added at each site" in text
    assert "No held-out loss was measured" in text


# --- What cannot be done is one line --------------------------------------------------------------


def error(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("eval: ERROR: ")
    assert said.count("\n") == 1, said
    return said.removeprefix("eval: ERROR: ").strip()


@pytest.mark.parametrize("there", ["file", "empty folder", "folder", "link to nowhere"])
def test_what_is_there_is_left_as_it_is(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    to = tmp_path / "to"
    if there == "file":
        to.write_text("mine")
    elif there == "link to nowhere":
        to.symlink_to("nowhere")
    else:
        to.mkdir()
        (to / "mine").write_text("mine") if there == "folder" else None
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert home.export(to) == 1
    assert f"--to {to}: it is there already" in error(capsys)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--run", "8"], ["--run 8", "runs: 7"]),
        (["--run", "latest", "--results", "/no/such"], ["/no/such", "--results"]),
        (["--round", "4"], ["--round 4", "1, 2, 3"]),
        (["--round", "first"], ["--round first: best, last, or the number of a round"]),
        (["--merge", "--models", "/no/such"], [HUB_ID, "/no/such", "supernode.prepare"]),
    ],
    ids=" ".join,
)
def test_a_bad_argument_is_one_line_that_names_it(
    home: Home,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: list[str],
) -> None:
    assert home.export(tmp_path / "to", *arguments) == 1
    message = error(capsys)
    assert all(part in message for part in named), message
    assert list(tmp_path.iterdir()) == []


def changed(home: Home, tmp_path: Path, file: str, **values: Any) -> list[str]:
    """Arguments of a copy of the run, with other values in this file."""
    results = Path(shutil.copytree(home.results["nf4"], tmp_path / "results", symlinks=True))
    path = results / "7" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return ["--results", str(results), "--models", str(home.models)]


def test_best_without_a_held_out_loss_says_which_key_measures_one(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = changed(home, tmp_path, "run.json")
    metrics = tmp_path / "results" / "7" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    write_jsonl(metrics, [{k: v for k, v in m.items() if not k.startswith("eval_")} for m in lines])
    for command in (["export", "--to", str(tmp_path / "to")], ["--datasets", "demo-four"]):
        assert main([*command, *places, "--round", "best", "--run", "7"]) == 1
        assert "strategy.fraction-evaluate" in error(capsys)


@pytest.mark.parametrize("file", ["run.json", "peft_2/round.json"])
def test_rounds_of_another_model_are_refused(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    places = changed(home, tmp_path, file, base_model_fingerprint="0" * 16)
    assert main(["export", *places, "--round", "2", "--to", str(tmp_path / "to")]) == 1
    message = error(capsys)
    assert "0" * 16 in message
    assert "another run's" in message


def test_a_base_model_of_another_revision_is_not_merged_into(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Path(shutil.copytree(home.models, tmp_path / "models"))
    (path,) = models.glob("*nf4/base.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "1" * 16}))
    assert home.export(tmp_path / "to", "--merge", "--models", str(models)) == 1
    message = error(capsys)
    assert "1" * 16 in message
    assert "same revision" in message


@pytest.mark.parametrize(
    ("file", "text"),
    [("run.json", "[]"), ("run.json", "{}"), ("run.json", "{"), ("eval/report.json", "{"),
     ("eval/report.json", '{"subjects": 3}'), ("metrics.jsonl", '{"round": 1}\n')],
)  # fmt: skip
def test_a_damaged_file_of_the_run_is_one_line(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str
) -> None:
    places = changed(home, tmp_path, "run.json")
    (tmp_path / "results" / "7" / file).write_text(text)
    assert main(["export", *places, "--to", str(tmp_path / "to")]) == 1
    assert file.split("/")[-1] in error(capsys)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_a_full_disk_leaves_nothing_behind(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], merge: list[str]
) -> None:
    with full_disk(4096):
        assert home.export(tmp_path / "to", *merge) == 1
    assert f"cannot write {tmp_path / 'to'}: " in error(capsys)
    assert list(tmp_path.iterdir()) == []


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_head_that_is_the_embeddings_as_well_is_not_merged(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = Path(shutil.copytree(home.models, tmp_path / "models"))
    (folder,) = models.glob("*none")
    arrays = load_file(folder / "model.safetensors")
    del arrays["lm_head.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base = json.loads((folder / "base.json").read_text())
    base["files"] = {name: (folder / name).stat().st_size for name in base["files"]}
    base["sha256"] = {n: sha256_of(folder / n) for n in base["files"]}
    (folder / "base.json").write_text(json.dumps(base))
    for targets, code in (("q_proj,v_proj", 0), ("q_proj,lm_head", 1)):
        train(tmp_path / targets, base, target_modules=targets)
        words = ["export", "--merge", "--results", str(tmp_path / targets)]
        places = ["--models", str(models), "--to", str(tmp_path / f"{code}")]
        assert main([*words, *places]) == code
    assert "lm_head" in error(capsys)
    assert os.path.lexists(tmp_path / "0")
    assert not os.path.lexists(tmp_path / "1")
