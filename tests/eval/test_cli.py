"""python -m eval, in-process with the tiny model: the files agree, and every mistake is named."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from app.server.checkpoint import RunFolder
from app.wire.adapter import Layout, initial_adapter, save_peft
from eval.__main__ import main
from eval.answers import Journal
from eval.benchmarks import wrap
from eval.identity import of_model
from eval.inference import Answer
from supernode.source import fingerprints
from tests.samples import REPOSITORY, ROWS, run_config, write_jsonl
from tests.terminal import Terminal

N_FOUR, N_YES_NO = 14, 6
SETS = {"demo-four": N_FOUR, "demo-yesno": N_YES_NO}
DATASETS = ["--datasets", ",".join(SETS)]


@dataclass(frozen=True)
class Site:
    """Everything that an evaluation reads."""

    model: Path
    data: Path
    results: Path
    adapter: Path
    folder: Path

    def evaluate(self, out: Path, *arguments: str) -> int:
        """Of prepared data and --quantization 0, which is the fastest here."""
        return main(
            [
                *("--base-model-name-path", str(self.model), "--quantization", "0", *DATASETS),
                *("--data-dir", str(self.data), "--batch-size", "4", "--out", str(out)),
                *("--models", str(self.folder / "models"), "--cache", str(self.folder / "cache")),
                *("--results", str(self.results), *arguments),
            ]
        )


def texts(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The likeliest next token of each, in words."""
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            row = model(torch.tensor([tokenizer.encode(wrap(prompt))])).logits[0, -1]
        found.append(tokenizer.decode([int(row.argmax())], skip_special_tokens=True))
    return found


def with_letters_only(source: Path, tokenizer: Any, target: Path) -> Path:
    """The same model, but it says only letters of options."""
    shutil.copytree(source, target)
    arrays = load_file(target / "model.safetensors")
    for token in range(len(arrays["lm_head.weight"])):
        if tokenizer.decode([token]).upper() not in list("ABCDE"):
            arrays["lm_head.weight"][token] = 0
    save_file(arrays, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def site(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A model, a run of three rounds with base model's and second round's answers as golds."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("site")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    hub = with_letters_only(tiny_model, tokenizer, folder / "hub")
    model = AutoModelForCausalLM.from_pretrained(hub, dtype="float32").eval()
    layers = {
        n: [m.out_features, m.in_features]
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    config = run_config(lora_r=4, lora_alpha=8, model_name=str(hub))
    layout = Layout.of(layers, config)
    run = RunFolder(folder / "results", 7)
    run.write_run({"status": "running"})
    for number in (1, 2, 3):
        vector = initial_adapter(layout, number)
        vector += np.random.default_rng(number).normal(0, 0.1, vector.shape).astype(np.float32)
        facts = {"base_model_fingerprint": fingerprints(hub)["nf4"]}
        run.save_round(number, layout, vector, config, facts)
        run.add_metrics({"round": number})
    (folder / "adapter").mkdir()
    save_peft(folder / "adapter", layout, vector, config)

    prompts = [f"{row['input']}\n" for row in ROWS]
    base = texts(model, tokenizer, prompts)
    peft = PeftModel.from_pretrained(model, str(run.path / "peft_2")).eval()
    second = texts(peft, tokenizer, prompts)
    differ = [n for n in range(len(prompts)) if base[n].upper() != second[n].upper()]
    chosen = differ[:N_FOUR]
    assert len(chosen) == N_FOUR
    # Every third gold is what the base says, the others what the second round says.
    pairs = [
        {"prompt": prompts[i], "gold": (base[i] if n % 3 == 0 else second[i]).upper()}
        for n, i in enumerate(chosen)
    ]
    write_jsonl(folder / "data" / "demo-four.jsonl", pairs)
    golds = ("yes", "no", "maybe")
    decisions = [{"prompt": p, "gold": golds[n % 3]} for n, p in enumerate(prompts[:N_YES_NO])]
    write_jsonl(folder / "data" / "demo-yesno.jsonl", decisions)
    return Site(hub, folder / "data", folder / "results", folder / "adapter", folder)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And with no environment, in a folder of the test's own."""
    for name in ("RESULTS_DIR", "MODELS_DIR", "MODEL_CACHE", "EVAL_DATASETS", "CA_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)


def names(out: Path) -> set[str]:
    """Of the files for the user."""
    return {p.name for p in out.iterdir() if not p.name.startswith(".")}


def results(out: Path) -> dict[str, bytes]:
    """The leaderboard's files."""
    kinds = ("acc_*", "generation_*")
    return {p.name: p.read_bytes() for kind in kinds for p in out.glob(kind)}


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def accuracy(out: Path, dataset: str, name: str) -> float:
    text = (out / f"acc_{dataset}_{name}.txt").read_text()
    assert text.startswith("Accuracy: ")
    assert text.endswith(". ")
    return float(text.removeprefix("Accuracy: ").removesuffix(". "))


def files_of(*subjects: str) -> set[str]:
    pairs = [(d, s) for d in SETS for s in subjects]
    return {f"acc_{d}_{s}.txt" for d, s in pairs} | {f"generation_{d}_{s}.jsonl" for d, s in pairs}


def test_an_adapter_is_scored_beside_its_base(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert site.evaluate(out, "--peft-path", str(site.adapter)) == 0
    shown = capsys.readouterr().out
    assert str(out / "report.html") in shown
    assert names(out) == files_of("base", "fl") | {"report.json", "report.html"}
    found = report(out)
    assert [s["name"] for s in found["subjects"]] == ["base", "fl"]
    assert (found["run"], found["best"], found["rounds"]) == (None, None, [])
    assert {d: facts["questions"] for d, facts in found["datasets"].items()} == SETS
    for subject in found["subjects"]:
        for dataset, n in SETS.items():
            path = out / f"generation_{dataset}_{subject['name']}.jsonl"
            assert main(["score", str(path)]) == 0
            printed = capsys.readouterr().out.split()
            scored = subject["scores"][dataset]
            assert printed[0] == dataset
            assert float(printed[1]) == accuracy(out, dataset, subject["name"])
            assert float(printed[1]) == scored["accuracy"]
            assert (int(printed[2]), int(printed[3])) == (n, scored["unparsed"])
            asked = (site.data / f"{dataset}.jsonl").read_text().splitlines()
            rows = [(row["prompt"], row["gold"]) for row in json.loads(path.read_text())]
            assert rows == [tuple(json.loads(line).values()) for line in asked]
            assert scored["answered_now"] == n
        values = [s["accuracy"] for s in subject["scores"].values()]
        assert subject["average"] == sum(values) / 2
    base, adapter = found["subjects"]
    assert 0 < base["scores"]["demo-four"]["accuracy"] < 1
    for dataset, against in adapter["against_base"].items():
        a, b = (s["scores"][dataset]["accuracy"] for s in (adapter, base))
        assert against["difference"] == pytest.approx(a - b)
    assert "against_base" not in base
    assert "fl" in (out / "report.html").read_text()


def test_without_a_terminal_it_says_how_far_it_is_in_lines(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container's log would hold a bar that is drawn again and again as one long line."""
    assert site.evaluate(tmp_path, "--peft-path", "none") == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = [line for line in said.splitlines() if line.startswith("eval: base, ")]
    tenths = [2, 3, 5, 6, 7, 9, 10, 12, 13, 14]
    assert lines == [
        *(f"eval: base, demo-four: {n} of {N_FOUR}" for n in tenths),
        *(f"eval: base, demo-yesno: {n} of {N_YES_NO}" for n in range(1, N_YES_NO + 1)),
    ]
    assert site.evaluate(tmp_path, "--peft-path", "none") == 0  # all of it is kept
    assert "eval: base, " not in capsys.readouterr().err


def test_in_a_terminal_a_bar_is_drawn(site: Site, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "eval", "--peft-path", "none", "--out", str(tmp_path / "out")),
        *("--base-model-name-path", str(site.model), "--quantization", "0"),
        *("--data-dir", str(site.data), "--datasets", "demo-four"),
    ]
    terminal = Terminal(command, DEVICE="cpu")
    assert terminal.end() == 0
    assert "\r" in terminal.output.replace("\r\n", "\n")
    assert any(f"{N_FOUR}/{N_FOUR} [" in line for line in terminal.screen())
    assert "eval: base, " not in terminal.output


def test_a_mirrors_name_given_by_hand_is_noted_in_the_report(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(site.model, cache / "mirror--tiny")
    (cache / "mirror--tiny" / "complete").touch()
    adapter = shutil.copytree(site.adapter, tmp_path / "adapter")
    change_json(adapter / "adapter_config.json", base_model_name_or_path="org/tiny")
    out, direct = tmp_path / "out", tmp_path / "direct"
    more = ["--peft-path", str(adapter), "--cache", str(cache)]
    assert site.evaluate(out, *more, "--base-model-name-path", "mirror/tiny/") == 0
    note = "fl is an adapter of org/tiny, scored on mirror/tiny: its arrays fit, no more is known."
    assert f"eval: {note}\n" in capsys.readouterr().err
    assert [s["note"] for s in report(out)["subjects"]] == ["", note]
    assert report(out)["model"]["name"] == "mirror/tiny"
    assert note in (out / "report.html").read_text()
    assert site.evaluate(direct, "--peft-path", str(site.adapter)) == 0
    assert results(out) == results(direct)
    assert "is an adapter of" not in (direct / "report.html").read_text()


def test_the_base_model_alone_goes_under_the_run_name(site: Site, tmp_path: Path) -> None:
    assert site.evaluate(tmp_path, "--peft-path", "none", "--run-name", "plain_1-b") == 0
    assert names(tmp_path) == files_of("plain_1-b") | {"report.json", "report.html"}
    (subject,) = report(tmp_path)["subjects"]
    assert (subject["name"], subject["adapter"]) == ("plain_1-b", None)


def test_without_a_path_the_newest_runs_last_round_is_scored(site: Site, tmp_path: Path) -> None:
    assert site.evaluate(tmp_path, "--limit", "3") == 0
    assert names(tmp_path) == files_of("base", "peft_3") | {"report.json", "report.html"}
    found = report(tmp_path)
    assert (found["run"], found["subjects"][1]["round"]) == ("7", 3)
    assert found["settings"]["limit"] == 3
    assert {s["scores"]["demo-four"]["n"] for s in found["subjects"]} == {3}
    assert [m["round"] for m in found["rounds"]] == [1, 2, 3]


def test_all_rounds_are_scored_and_the_best_is_marked(site: Site, tmp_path: Path) -> None:
    assert site.evaluate(tmp_path, "--all-rounds") == 0
    rounds = ("peft_1", "peft_2", "peft_3")
    assert results(tmp_path).keys() == files_of("base", *rounds)
    found = report(tmp_path)
    assert [s["round"] for s in found["subjects"]] == [None, 1, 2, 3]
    averages = {
        name: sum(accuracy(tmp_path, dataset, name) for dataset in SETS) / 2 for name in rounds
    }
    assert averages == {s["name"]: s["average"] for s in found["subjects"][1:]}
    assert averages["peft_2"] > max(averages["peft_1"], averages["peft_3"])
    assert found["best"] == "peft_2"
    assert len({s["sha256"] for s in found["subjects"]}) == 4


def test_all_rounds_go_under_the_run_name_with_their_number(site: Site, tmp_path: Path) -> None:
    assert site.evaluate(tmp_path, "--all-rounds", "--run-name", "mine", "--limit", "1") == 0
    assert results(tmp_path).keys() == files_of("base", "mine_1", "mine_2", "mine_3")


def test_by_default_four_bits_are_scored_into_the_runs_folder(site: Site, tmp_path: Path) -> None:
    shared = [*DATASETS, "--data-dir", str(site.data), "--limit", "1"]
    assert main([*shared, "--results", str(site.results), "--round", "1"]) == 0
    out = site.results / "7" / "eval"
    assert names(out) >= files_of("base", "peft_1") | {"report.json", "report.html"}
    assert report(out)["model"]["name"] == str(site.model)  # as the adapter says
    assert (report(out)["model"]["quantization"], report(out)["model"]["kind"]) == ("4", "fp4")
    base = ["--peft-path", "none", "--base-model-name-path", str(site.model)]
    assert main([*shared, *base]) == 0
    assert names(tmp_path / "benchmarks") == files_of("base") | {"report.json", "report.html"}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Press Ctrl-C when so many answers are kept; the list says which were."""
    add = Journal.add

    def after(answers: int) -> list[int]:
        kept: list[int] = []

        def add_or_stop(self: Journal, index: int, answer: Answer) -> None:
            if len(kept) == answers:
                raise KeyboardInterrupt
            add(self, index, answer)
            kept.append(index)

        monkeypatch.setattr(Journal, "add", add_or_stop)
        return kept

    return after


@pytest.mark.parametrize("answers", [0, 1, 9, N_FOUR, N_FOUR + 2, N_FOUR + N_YES_NO + 5])
def test_an_interrupted_evaluation_goes_on(
    site: Site,
    tmp_path: Path,
    interrupt: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
    answers: int,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    path = ["--peft-path", str(site.adapter)]
    assert site.evaluate(whole, *path) == 0
    interrupt(answers)
    assert site.evaluate(out, *path) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "eval: stopped; run it again to go on"
    assert "report.json" not in names(out)
    asked = interrupt(10**9)
    assert site.evaluate(out, *path) == 0
    total = 2 * (N_FOUR + N_YES_NO)
    assert len(asked) == total - answers
    again = [
        score.get("answered_now", 0)
        for subject in report(out)["subjects"]
        for score in subject["scores"].values()
    ]
    assert sum(again) == total - answers
    assert results(out) == results(whole)


def test_a_finished_evaluation_answers_nothing_again(
    site: Site, tmp_path: Path, interrupt: Callable[[int], list[int]]
) -> None:
    path = ["--peft-path", str(site.adapter), "--limit", "4"]
    assert site.evaluate(tmp_path, *path) == 0
    first, accuracies = results(tmp_path), [s["average"] for s in report(tmp_path)["subjects"]]
    interrupt(0)
    assert site.evaluate(tmp_path, *path) == 0
    assert results(tmp_path) == first
    assert [s["average"] for s in report(tmp_path)["subjects"]] == accuracies


def test_other_settings_are_answered_anew(
    site: Site, tmp_path: Path, interrupt: Callable[[int], list[int]]
) -> None:
    asked = interrupt(10**9)
    base = ["--peft-path", "none", "--datasets", "demo-four"]
    for changed, count in (
        ([], 4),
        (["--limit", "5"], 5),
        (["--batch-size", "2"], 0),  # changes no answer
        (["--quantization", "8"], 4),
        ([], 0),  # and none of these has cost the first its answers
    ):
        asked.clear()
        assert site.evaluate(tmp_path, *base, "--limit", "4", *changed) == 0
        assert len(asked) == count


def test_another_adapter_of_the_same_name_is_answered_anew(
    site: Site, tmp_path: Path, interrupt: Callable[[int], list[int]]
) -> None:
    asked = interrupt(10**9)
    rounds = [site.results / "7" / f"peft_{n}" for n in (1, 2)]
    found = []
    for folder in rounds:
        asked.clear()
        assert site.evaluate(tmp_path, "--peft-path", str(folder)) == 0
        found.append((results(tmp_path)["generation_demo-four_fl.jsonl"], len(asked)))
    (first, before), (second, after) = found
    assert first != second
    assert (before, after) == (2 * (N_FOUR + N_YES_NO), N_FOUR + N_YES_NO)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


Change = Callable[[Path, pytest.MonkeyPatch], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "lora_alpha": (
        lambda at, _: change_json(at / "adapter" / "adapter_config.json", lora_alpha=64),
        "adapter_config.json differs",
    ),
    "another tokenizer": (
        lambda at, _: change_json(at / "hub" / "tokenizer_config.json", model_max_length=99),
        "the base model differs",
    ),
    "generation_config.json": (
        lambda at, _: change_json(at / "hub" / "generation_config.json", repetition_penalty=1.5),
        "--batch-size, generation_config.json, the base model differ",  # now asked in a loop
    ),
    "a library": (
        lambda _, patch: patch.setattr("eval.identity.version", lambda p: f"{p} 99"),
        "the version of bitsandbytes, the version of peft",
    ),
    "the device": (
        lambda _, patch: (
            patch.setattr("torch.cuda.get_device_name", lambda _: "another GPU")
            if torch.cuda.is_available()
            else patch.setattr("eval.evaluation.of_model", on_another_device)
        ),
        "the device differs",
    ),
    "the wrapper around a question": (
        lambda _, patch: patch.setattr("eval.inference.wrap", lambda prompt: f"Q: {prompt}"),
        "what is asked differs",
    ),
}


def on_another_device(base: Any, adapter: Any) -> dict[str, Any]:
    return of_model(base, adapter) | {"the device": "another GPU"}


@pytest.mark.parametrize("what", CHANGES)
def test_answers_are_kept_for_exactly_what_they_follow_from(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    for name in ("adapter", "hub"):
        shutil.copytree(site.folder / name, tmp_path / name)
    mine = ["--peft-path", str(tmp_path / "adapter"), "--base-model-name-path"]
    mine += [str(tmp_path / "hub"), "--datasets", "demo-four"]
    asked = interrupt(10**9)

    def evaluate() -> tuple[int, list[str]]:
        """How many questions the adapter was asked now, and what was said about it."""
        asked.clear()
        assert site.evaluate(tmp_path / "out", *mine) == 0
        said = capsys.readouterr().out.splitlines()
        score = report(tmp_path / "out")["subjects"][1]["scores"]["demo-four"]
        return score.get("answered_now", 0), [line for line in said if "demo-four_fl" in line]

    assert evaluate() == (N_FOUR, [])
    before = results(tmp_path / "out")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    # Laid out anew it is the same.
    change_json(tmp_path / "adapter" / "adapter_config.json")
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() != config
    assert evaluate() == (0, [])
    with monkeypatch.context() as patch:
        change, named = CHANGES[what]
        change(tmp_path, patch)
        count, said = evaluate()
        assert count == N_FOUR
        assert len(said) == 1
        assert said[0].startswith(f"eval: demo-four_fl: answering anew: {named}")
        if what == "lora_alpha":
            assert results(tmp_path / "out") != before
            assert report(tmp_path / "out")["subjects"][1]["config"]["lora_alpha"] == 64
        assert evaluate() == (0, [])
        for name in ("adapter", "hub"):
            shutil.copytree(site.folder / name, tmp_path / name, dirs_exist_ok=True)
    assert evaluate() == (0, [])  # the first answers are still there
    assert results(tmp_path / "out") == before


def test_a_second_evaluation_at_once_is_locked_out(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--peft-path", "none", "--datasets", "demo-four"]
    add = Journal.add
    second: list[int] = []

    def add_and_try(self: Journal, index: int, answer: Answer) -> None:
        if not second:
            second.append(site.evaluate(tmp_path / "out", *arguments))
        add(self, index, answer)

    monkeypatch.setattr(Journal, "add", add_and_try)
    assert site.evaluate(tmp_path / "out", *arguments) == 0
    assert second == [1]
    errors = [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line]
    (said,) = (line.partition("eval: ERROR: ")[2] for line in errors)
    assert said == (
        f"another evaluation is at work in {tmp_path / 'out'}; wait until it ends, or give --out"
    )
    assert len(report(tmp_path / "out")["subjects"]) == 1


def test_an_evaluation_that_was_killed_leaves_no_lock(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"""
import sys, time
from pathlib import Path
from eval.folder import claimed
with claimed(Path({str(out)!r})):
    print("in", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", code]
    arguments = ["--peft-path", "none", "--datasets", "demo-four", "--limit", "1"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout
        assert first.stdout.readline() == "in\n"
        assert site.evaluate(out, *arguments) == 1
        first.kill()
    assert site.evaluate(out, *arguments) == 0


@pytest.mark.parametrize("kind", ["a symlink", "a FIFO"])
def test_what_stands_in_the_locks_place_is_named_and_left_alone(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / ".lock"
    if kind == "a symlink":
        lock.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(lock)
    assert site.evaluate(tmp_path / "out", "--peft-path", "none") == 1
    assert str(lock) in error(capsys)
    assert not (tmp_path / "elsewhere").exists()


def with_a_token_that_breaks(source: Path, target: Path, token: int) -> Path:
    """The same model, but its embedding of one token is no number."""
    shutil.copytree(source, target)
    arrays = load_file(target / "model.safetensors")
    arrays["model.embed_tokens.weight"][token] = np.nan
    save_file(arrays, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("dataset", "gold"),
    [("demo-four", "A"), ("demo-yesno", "yes")],
    ids=["one token", "several tokens"],
)
def test_a_question_without_finite_logits_is_an_error_that_names_it(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, gold: str
) -> None:
    from transformers import AutoTokenizer

    odd = AutoTokenizer.from_pretrained(site.model).encode("~")[-1]
    model = with_a_token_that_breaks(site.model, tmp_path / "hub", odd)
    pairs = [{"prompt": f"{row['input']}\n", "gold": gold} for row in ROWS[:9]]
    pairs[4]["prompt"] += "~ a secret\n"
    write_jsonl(tmp_path / "data" / f"{dataset}.jsonl", pairs)
    arguments = ["--peft-path", "none", "--datasets", dataset]
    arguments += ["--base-model-name-path", str(model), "--data-dir", str(tmp_path / "data")]
    assert site.evaluate(tmp_path / "out", *arguments) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        f"eval: ERROR: {dataset}, question 5: the logits of base are not finite: broken weights, "
        "or --quantization 0 is too coarse; try --quantization 0"
    )
    assert "secret" not in said
    assert not names(tmp_path / "out")
    assert "[4, " not in "".join(p.read_text() for p in (tmp_path / "out").glob(".answers_*"))
    assert site.evaluate(tmp_path / "out", *arguments, "--limit", "4") == 0


def test_a_set_is_asked_once_however_often_it_is_named(site: Site, tmp_path: Path) -> None:
    twice = ["--datasets", "demo-four,demo-four", "--limit", "2"]
    assert site.evaluate(tmp_path, "--peft-path", "none", *twice) == 0
    assert list(report(tmp_path)["datasets"]) == ["demo-four"]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands behind the one line on stderr."""
    said = capsys.readouterr().err
    assert said.startswith("eval: ERROR: ")
    assert said.endswith("\n")
    assert said.count("\n") == 1
    return said.removeprefix("eval: ERROR: ").strip()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--limit", "0"], ["--limit 0"]),
        (["--limit", "-1"], ["--limit -1"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--quantization", "5"], ["--quantization 5", "nf4-bf16"]),
        (["--datasets", "medqa4"], ["--datasets", "'medqa4'", "pubmedqa", "demo-five"]),
        (["--datasets", "demo-four,"], ["--datasets", "''"]),
        (["--peft-path", "/no/such/adapter"], ["/no/such/adapter"]),
        (["--peft-path", "x", "--run", "7"], ["--peft-path", "--run"]),
        (["--peft-path", "x", "--round", "0"], ["--peft-path", "--round"]),
        (["--peft-path", "none", "--all-rounds"], ["--peft-path", "--all-rounds"]),
        (["--round", "1", "--all-rounds"], ["--round", "--all-rounds"]),
        (["--round", "4"], ["--round 4", "1, 2, 3"]),
        (["--round", "worst"], ["--round worst", "best, last"]),
        (["--round", "best"], ["--round best", "run 7", "strategy.fraction-evaluate"]),
        (["--run", "8"], ["--run 8", "7"]),
        (["--results", "/no/such/results"], ["/no/such/results", "--wait"]),
        (["--run-name", "a/b"], ["--run-name a/b"]),
        (["--run-name", "../x"], ["--run-name ../x"]),
        (["--run-name", "-"], ["--run-name -"]),
        (["--data-dir", "/no/such/data"], ["--data-dir", "/no/such/data"]),
        (["--datasets", "medqa"], ["--data-dir", "no medqa.jsonl"]),
        (["--out", "file/out"], ["file/out", "--out"]),
        (["--base-model-name-path", "org/none-such"], ["org/none-such", "supernode.prepare"]),
        (["--peft-path", "none", "--base-model-name-path", ""], ["--base-model-name-path"]),
    ],
    ids=" ".join,
)
def test_a_bad_argument_is_one_line_that_names_it(
    site: Site,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: list[str],
) -> None:
    (tmp_path / "file").touch()
    assert site.evaluate(tmp_path / "out", *arguments) == 1
    message = error(capsys)
    assert all(part in message for part in named), message
    out = tmp_path / "out"
    assert not out.exists() or not names(out)


@pytest.mark.parametrize("device", ["tpu", "CUDA", "cuda:0"])
def test_an_unknown_device_is_named(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
) -> None:
    monkeypatch.setenv("DEVICE", device)
    assert site.evaluate(tmp_path) == 1
    assert f"DEVICE={device}" in error(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DEVICE", "cuda")
    assert site.evaluate(tmp_path) == 1
    assert "DEVICE=cuda" in error(capsys)


def test_a_bad_line_of_the_data_is_named(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo-four.jsonl"
    path.write_text('{"prompt": "p", "gold": "A"}\n{"prompt": "p"\n')
    given = ["--data-dir", str(tmp_path), "--datasets", "demo-four"]
    assert site.evaluate(tmp_path / "out", *given) == 1
    assert error(capsys) == f"{path}, line 2: not JSON"


def test_a_damaged_round_is_named_before_anything_is_answered(
    site: Site,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    interrupt: Callable[[int], list[int]],
) -> None:
    shutil.copytree(site.results, tmp_path / "results", symlinks=True)
    weights = tmp_path / "results" / "7" / "peft_3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    interrupt(0)
    arguments = ["--results", str(tmp_path / "results"), "--all-rounds"]
    assert site.evaluate(tmp_path / "out", *arguments) == 1
    assert str(weights) in error(capsys)


def test_an_adapter_is_not_written_over_its_base(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--peft-path", str(site.adapter), "--run-name", "base", "--limit", "1"]
    assert site.evaluate(tmp_path, *arguments) == 1
    assert "--run-name base" in error(capsys)


@pytest.mark.parametrize("command", ["", "fetch"])
def test_without_the_hub_one_line_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    arguments = ["--datasets", "medqa", "--cache", str(tmp_path / "cache")]
    assert main([command, *arguments] if command else arguments) == 1
    assert "--data-dir" in error(capsys)


def test_fetching_bundled_sets_needs_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--datasets", "demo-four,demo-five", "--cache", str(tmp_path)]
    assert main(["fetch", *arguments]) == 0
    assert capsys.readouterr() == ("", "")
