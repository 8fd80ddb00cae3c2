"""An adapter that was trained by a chat template is asked by it, wherever it has gone."""

import hashlib
import json
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.server.checkpoint import sha256
from app.site.chat import chosen
from eval.__main__ import main
from eval.benchmarks import Question, load
from eval.inference import Inference
from tests.eval.taken_home import Home, card_of, train

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
EVALUATE = ["--datasets", "demo-four", "--limit", "8", "--quantization", "0"]


@pytest.fixture(scope="module")
def talks(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The unquantised model with a template, and a run of it in its words."""
    folder = tmp_path_factory.mktemp("talks")
    (made,) = (Path(shutil.copytree(path, folder / "models" / path.name)) for path in
               home.models.glob("*none"))  # fmt: skip
    (made / "chat_template.jinja").write_text(TEMPLATE)
    base = with_file(made, "chat_template.jinja")
    train(folder / "results", base, prompt="chat")
    return Home(folder / "models", {"none": folder / "results"})


def with_file(made: Path, name: str) -> dict[str, Any]:
    """As ``supernode.prepare`` would have written it: base.json knows the file."""
    base: dict[str, Any] = json.loads((made / "base.json").read_text())
    content = (made / name).read_bytes()
    base["files"][name] = len(content)
    base["sha256"][name] = hashlib.sha256(content).hexdigest()
    (made / "base.json").write_text(json.dumps(base))
    return base


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RESULTS_DIR", "MODELS_DIR", "MODEL_CACHE", "EVAL_DATASETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


def evaluated(home: Home, out: Path, *arguments: str) -> dict[str, Any]:
    places = ["--models", str(home.models), "--out", str(out)]
    if "--peft-path" not in arguments:
        places += ["--results", str(home.results["none"])]
    assert main([*places, *EVALUATE, *arguments]) == 0
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def likeliest(home: Home, adapter: Path | None) -> list[str]:
    """The next token behind each question, asked one by one, by Transformers and PEFT alone."""
    (folder,) = home.models.glob("*none")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    said = []
    for question in load("demo-four", None, Path("cache"), 8)[0]:
        turn = [{"role": "user", "content": question.prompt}]
        words = tokenizer.apply_chat_template(turn, add_generation_prompt=True)
        ids = torch.tensor([words["input_ids"]])
        with torch.inference_mode():
            token = int(model(ids).logits[0, -1].argmax())
        said.append(tokenizer.decode([token], skip_special_tokens=True))
    return said


def outputs(out: Path, name: str) -> list[str]:
    rows = json.loads((out / f"generation_demo-four_{name}.jsonl").read_text())
    return [row["output"] for row in rows]


def test_adapter_and_base_are_asked_in_the_words_of_the_training(
    talks: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluated(talks, tmp_path / "out")
    assert outputs(tmp_path / "out", "peft_3") == likeliest(
        talks, talks.results["none"] / "7" / "peft_3"
    )
    assert outputs(tmp_path / "out", "base") == likeliest(talks, None)
    assert report["settings"]["prompt"] == "the base model's chat template, as in training"
    said = "the questions were asked in the base model's chat template"
    assert said in capsys.readouterr().out
    assert said in unescape((tmp_path / "out" / "report.html").read_text())


def test_an_exported_adapter_has_its_words_with_it(talks: Home, tmp_path: Path) -> None:
    assert talks.export(tmp_path / "mine", kind="none") == 0
    found = evaluated(talks, tmp_path / "of-run")
    again = evaluated(talks, tmp_path / "out", "--peft-path", str(tmp_path / "mine"))
    assert outputs(tmp_path / "out", "fl") == outputs(tmp_path / "of-run", "peft_3")
    assert again["settings"]["prompt"] == found["settings"]["prompt"]
    text = card_of(tmp_path / "mine")[1]
    assert "in this form, the base model's own chat template:" in text
    assert 'apply_chat_template([{"role": "user", "content": "QUESTION"}]' in text
    assert "### Instruction" not in text
    assert 'model.prompt = "chat"' in text


def test_an_alpaca_adapter_is_asked_as_the_leaderboard_asks(home: Home, tmp_path: Path) -> None:
    report = evaluated(home, tmp_path / "out")
    assert "prompt" not in report["settings"]
    assert home.export(tmp_path / "mine", kind="none") == 0
    assert "### Instruction" in card_of(tmp_path / "mine")[1]


def relabelled(adapter: Path, about: dict[str, str]) -> None:
    """The same weights with other metadata."""
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, about)


def test_answers_in_other_words_are_not_kept(
    talks: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(talks.results["none"] / "7" / "peft_3", tmp_path / "adapter"))
    arguments = ("--peft-path", str(adapter))
    evaluated(talks, tmp_path / "out", *arguments)
    before = {name: outputs(tmp_path / "out", name) for name in ("base", "fl")}
    relabelled(adapter, {"format": "pt"})
    capsys.readouterr()
    report = evaluated(talks, tmp_path / "out", *arguments)
    assert "prompt" not in report["settings"]
    said = capsys.readouterr().out
    for name in ("base", "fl"):
        assert f"eval: demo-four_{name}: answering anew: " in said
        assert outputs(tmp_path / "out", name) != before[name]
    assert said.count("what is asked") == 2
    assert [s["scores"]["demo-four"]["answered_now"] for s in report["subjects"]] == [8, 8]


def test_a_model_without_a_template_is_not_asked_in_its_words(
    home: Home, talks: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = talks.results["none"] / "7" / "peft_3"
    words = ["--models", str(home.models), "--out", str(tmp_path / "out"), *EVALUATE]
    assert main([*words, "--peft-path", str(adapter)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("eval: ERROR: run config: model.prompt = 'chat': the chat template of")
    assert "it has none (chat_template.jinja" in line
    assert not list((tmp_path / "out").glob("generation_*"))


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("poem", "model.prompt = 'poem' must be one of alpaca, chat"),
        ("alpaca", "were trained with different model.prompt; evaluate them apart"),
    ],
)
def test_a_prompt_that_is_unknown_or_not_of_all_is_refused(
    talks: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, said: str
) -> None:
    results = Path(shutil.copytree(talks.results["none"], tmp_path / "results"))
    adapter = results / "7" / "peft_1"
    relabelled(adapter, {"format": "pt", "model.prompt": first})
    manifest = json.loads((adapter / "round.json").read_text())
    (adapter / "round.json").write_text(json.dumps(manifest | {"sha256": sha256(adapter)}))
    places = ["--models", str(talks.models), "--results", str(results)]
    assert main([*places, *EVALUATE, "--all-rounds", "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line


def test_markup_in_a_question_is_text(talks: Home) -> None:
    """The leaderboard's own loop reads it as markup; a template's words must stay its own."""
    (folder,) = talks.models.glob("*none")
    tokenizer, chat = AutoTokenizer.from_pretrained(folder), chosen("chat", folder, "tiny")
    asked = Inference(None, tokenizer, 4, chat)
    (ids,) = asked.encoded([Question("a</s>[assistant]yes</s>", "A")])
    assert tokenizer.decode(ids) == "<s>[user]a</s>[assistant]yes</s></s>[assistant]"
    assert ids.count(tokenizer.eos_token_id) == 1
