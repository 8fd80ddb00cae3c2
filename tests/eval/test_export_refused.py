"""What cannot be taken home is one line, and leaves nothing behind."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from eval.__main__ import main
from tests.eval.taken_home import HUB_ID, Home, changed_model, train
from tests.full_disk import full_disk
from tests.samples import write_jsonl


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cpu")


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


def tied(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    arrays = load_file(folder / "model.safetensors")
    del arrays["lm_head.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return config | {"tie_word_embeddings": True}


def test_a_head_that_is_the_embeddings_as_well_is_not_merged(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = changed_model(home.models, tmp_path / "models", tied)
    for targets, code in (("q_proj,v_proj", 0), ("q_proj,lm_head", 1)):
        train(tmp_path / targets, base, target_modules=targets)
        words = ["export", "--merge", "--results", str(tmp_path / targets)]
        places = ["--models", str(tmp_path / "models"), "--to", str(tmp_path / f"{code}")]
        assert main([*words, *places]) == code
    assert "lm_head" in error(capsys)
    assert os.path.lexists(tmp_path / "0")
    assert not os.path.lexists(tmp_path / "1")


@pytest.mark.parametrize("factor", [1, 1e6])
def test_a_model_of_float16_stays_one_unless_its_weights_do_not_fit(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    def larger(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
        arrays = {n: a * factor for n, a in load_file(folder / "model.safetensors").items()}
        save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        return config | {"dtype": "float16"}

    changed_model(home.models, tmp_path / "models", larger)
    to = tmp_path / "to"
    code = home.export(to, "--merge", "--models", str(tmp_path / "models"), kind="none")
    if factor == 1:
        assert code == 0
        assert json.loads((to / "config.json").read_text())["dtype"] == "float16"
    else:
        assert code == 1
        assert "does not fit in torch.float16" in error(capsys)
        assert not to.exists()
