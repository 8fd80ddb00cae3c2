"""The CUDA path on the tiny model: CUDA_VISIBLE_DEVICES=0 make test-gpu."""

from pathlib import Path

import numpy as np
import pytest
import torch

from app.adapter import Layout, initial_adapter
from app.base_model import find, get_adapter, load_with_lora
from app.examples import encode_all
from app.partition import Row
from app.training import evaluate, peak_memory_mb, train
from tests.samples import ROWS, run_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible"),
]


@pytest.mark.parametrize("bits", [4, 8, 0])
def test_training_on_a_gpu_lowers_the_loss_and_moves_the_adapter(
    bits: int, models_dir: Path, tiny_model: Path
) -> None:
    config = run_config(model_name=str(tiny_model), quantization=bits, max_steps=20, batch_size=8)
    base = find(models_dir, str(tiny_model), bits)
    layout = Layout.of(base.linear_layers, config)
    start = initial_adapter(layout, 1)
    model, tokenizer = load_with_lora(base, config, "cuda", layout, start)
    rows = [Row(r["input"], r["output"]) for r in ROWS]
    examples = encode_all(rows, tokenizer, config.seq_length)
    before = evaluate(model, examples, 8)
    trained = train(model, examples, config, lr=1e-2, seed=3)
    after = evaluate(model, examples, 8)
    assert trained.steps == 20
    assert after.loss_sum < before.loss_sum
    moved = get_adapter(model, layout)
    assert np.isfinite(moved).all()
    assert not np.array_equal(moved, start)
    assert peak_memory_mb("cuda") > 0
