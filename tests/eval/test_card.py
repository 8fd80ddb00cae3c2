"""The model card: what was done, in counts; what was not; and the evaluation of this very round."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from app.server.checkpoint import sha256
from eval.__main__ import main
from tests.eval.taken_home import HUB_ID, Home, card_of, train
from tests.samples import ROWS, write_jsonl


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
