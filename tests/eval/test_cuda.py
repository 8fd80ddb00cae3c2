"""The evaluation on a GPU, with the tiny model: CUDA_VISIBLE_DEVICES=0 make test-gpu."""

from pathlib import Path

import pytest
import torch

from eval.benchmarks import load
from eval.inference import Inference
from eval.model import KINDS, load_base
from tests.benchmarks.eval_speed import leaderboard_loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]


@pytest.mark.parametrize("quantization", KINDS)
def test_answers_are_those_of_the_leaderboards_loop(
    quantization: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = load_base(str(tiny_model), quantization, "cuda", tmp_path, tmp_path)
    questions, _ = load("demo-four", None, tmp_path)
    expected, _ = leaderboard_loop(base.model, base.tokenizer, questions, 16)
    inference = Inference(base.model, base.tokenizer, 16)
    answers = dict(inference.answers(questions, "ABCD", {}))
    assert [answers[i].output for i in range(len(questions))] == expected
