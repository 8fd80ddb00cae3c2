"""The CUDA path on the tiny model: CUDA_VISIBLE_DEVICES=0 make test-gpu."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from app.site import memory
from app.site.base_model import find, get_adapter, load_with_lora
from app.site.device import look
from app.site.examples import encode_all
from app.site.partition import Row
from app.site.training import evaluate, peak_memory_mb, settled, train
from app.wire.adapter import Layout, initial_adapter
from supernode.quantise import prepare_model
from tests.app.site.test_training import as_transformers_does_it
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
    before = evaluate(model, examples, config)
    trained = train(model, examples, config, lr=1e-2, seed=3)
    after = evaluate(model, examples, config)
    assert trained.steps == 20
    assert after.loss_sum < before.loss_sum
    moved = get_adapter(model, layout)
    assert np.isfinite(moved).all()
    assert not np.array_equal(moved, start)
    assert peak_memory_mb("cuda") > 0


def test_a_bf16_models_embeddings_and_head_stay_bf16_and_it_learns_as_in_float32(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(source)
    prepare_model(tmp_path / "models", tmp_path / "cache", str(source), "nf4", None)
    losses = []
    for models, name in ((models_dir, tiny_model), (tmp_path / "models", source)):
        config = run_config(model_name=str(name), max_steps=10, batch_size=8)
        base = find(models, str(name), 4)
        layout = Layout.of(base.linear_layers, config)
        model, tokenizer = load_with_lora(base, config, "cuda", layout, initial_adapter(layout, 1))
        kept = model.get_output_embeddings().weight.dtype
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        assert kept == (torch.bfloat16 if name == source and bf16 else torch.float32)
        examples = encode_all([Row(r["input"], r["output"]) for r in ROWS], tokenizer, 512)
        losses.append(train(model, examples, config, lr=1e-3, seed=3).loss)
        evaluate(model, examples, config)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_logits_at_the_answers_only_take_less_memory_and_give_the_same_loss(
    models_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(model_name=str(tiny_model), max_steps=3, batch_size=8, lora_dropout=0.0)
    base = find(models_dir, str(tiny_model), 4)
    layout = Layout.of(base.linear_layers, config)
    results = []
    for everywhere in (False, True):
        if everywhere:
            as_transformers_does_it(monkeypatch)
        model, tokenizer = load_with_lora(base, config, "cuda", layout, initial_adapter(layout, 1))
        rows = [Row(r["input"] * 6, r["output"]) for r in ROWS]  # long prompts, short answers
        examples = encode_all(rows, tokenizer, 512)
        torch.cuda.reset_peak_memory_stats()
        loss = train(model, examples, config, lr=1e-3, seed=3).loss
        results.append((loss, peak_memory_mb("cuda")))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
    assert results[0][1] < results[1][1]


def test_the_preflight_reads_name_and_memory_and_its_sum_is_no_less_than_the_peak(
    models_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "locks").mkdir()
    for name, value in (("DEVICE", "cuda"), ("LOCK_DIR", str(tmp_path / "locks"))):
        monkeypatch.setenv(name, value)
    for _ in range(2):  # asked, and remembered
        gpu = look(tmp_path / "state")
        assert gpu.name == torch.cuda.get_device_name(0)
        assert 0 < gpu.free <= gpu.total == torch.cuda.mem_get_info()[1]
    config = run_config(model_name=str(tiny_model), max_steps=3, batch_size=16)
    base = find(models_dir, str(tiny_model), 4)
    layout = Layout.of(base.linear_layers, config)
    model, tokenizer = load_with_lora(base, config, "cuda", layout, initial_adapter(layout, 1))
    examples = encode_all([Row(r["input"], r["output"] * 20) for r in ROWS], tokenizer, 512)
    torch.cuda.reset_peak_memory_stats()
    train(model, examples, config, lr=1e-3, seed=3)
    weights = memory.stored(base.folder, 4, gpu.bf16)
    needed = memory.needed(weights, base.linear_layers, config) - memory.CONTEXT_BYTES
    assert 0.5 * needed < torch.cuda.max_memory_allocated() < 1.1 * needed


def test_auto_turns_gradient_checkpointing_off_where_there_is_room_and_says_so(
    models_dir: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(model_name=str(tiny_model), gradient_checkpointing="auto")
    base = find(models_dir, str(tiny_model), 4)
    layout = Layout.of(base.linear_layers, config)
    load_with_lora(base, config, "cuda", layout, initial_adapter(layout, 1))
    with caplog.at_level("INFO", "app"):
        assert settled(config, base, "cuda").gradient_checkpointing is False
    assert "gradient checkpointing off: without it a pass of 4096 tokens needs" in caplog.text
