"""The memory that a run needs on a GPU, against what was seen and what can be counted here."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from app import memory, plan
from app.adapter import Layout
from app.base_model import find
from app.config import RunConfig
from app.memory import CONTEXT_BYTES, Weights, advice, estimated, needed, stored
from tests.samples import run_config

NOWHERE = Path("/nowhere")
RECIPE = run_config()
LLAMA = plan.linear_layers(RECIPE, NOWHERE)
NF4_LLAMA = estimated(LLAMA, 4)


def test_the_peak_seen_on_an_h100_is_what_the_sum_gives_for_what_ran_there() -> None:
    """26.1 GB, by torch.cuda.max_memory_allocated: batch 16 of 512, NF4, gradient checkpointing,

    with embeddings and head in float32 (and so a bf16 copy of the head), and logits at every place.
    """
    table = prod(LLAMA["lm_head"])
    weights = Weights(NF4_LLAMA.size + 2 * 2 * table, head_copy=2 * table)
    seen = needed(weights, LLAMA, RECIPE) - CONTEXT_BYTES
    assert seen == pytest.approx(26.1e9, rel=0.01)


def test_what_the_recipe_needs_now() -> None:
    assert NF4_LLAMA.size == pytest.approx(5.7e9, rel=0.01)
    assert needed(NF4_LLAMA, LLAMA, RECIPE) == pytest.approx(23.6e9, rel=0.005)
    half = run_config(batch_size=8, gradient_accumulation_steps=2)
    assert needed(NF4_LLAMA, LLAMA, half) < 16e9


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"batch_size": 32}, True),
        ({"seq_length": 1024}, True),
        ({"lora_r": 64}, True),
        ({"gradient_checkpointing": False}, True),
        ({"target_modules": "all-linear"}, True),
        ({"seq_length": 256}, False),
        ({"max_steps": 99, "gradient_accumulation_steps": 4, "num_server_rounds": 1}, None),
    ],
)
def test_what_takes_memory_counts_and_nothing_else(
    change: dict[str, Any], more: bool | None
) -> None:
    before, after = (needed(NF4_LLAMA, LLAMA, c) for c in (RECIPE, run_config(**change)))
    assert (after > before, after < before) == (more is True, more is False)


def test_the_advice_is_a_batch_that_fits_and_leaves_the_recipe_as_it_is() -> None:
    words = advice(NF4_LLAMA, LLAMA, RECIPE, 16_000_000_000)
    assert words.startswith(
        "train.training-arguments.per-device-train-batch-size = 8 with "
        "gradient-accumulation-steps = 2 needs 15.0 GB"
    )
    uneven = advice(NF4_LLAMA, LLAMA, run_config(batch_size=20), 9_000_000_000)
    assert "batch-size = 2 with gradient-accumulation-steps = 10" in uneven
    assert "a larger GPU" in advice(NF4_LLAMA, LLAMA, RECIPE, 5_000_000_000)


# --- prepared models ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_prepared_models_size_is_that_of_its_tensors_once_loaded(
    models_dir: Path, tiny_model: Path, bits: int, bf16: bool
) -> None:
    base = find(models_dir, str(tiny_model), bits)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, device_map={"": "cpu"})
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    counted = stored(base.folder, bits, bf16)
    assert counted.size == pytest.approx(size, rel=0.02)
    head = model.lm_head.weight
    assert counted.head_copy == (2 * head.numel() if bits and bf16 else 0)


# --- what autograd keeps, counted -----------------------------------------------------------------


@contextmanager
def kept_bytes(model: Any) -> Iterator[list[int]]:
    """Bytes of all that is saved for the backward pass, but for parameters; afterwards."""
    ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ours:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(t.untyped_storage().nbytes() for t in saved.values()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_what_a_layer_keeps_for_the_backward_pass_is_what_is_counted(
    tmp_path: Path, checkpointing: bool, targets: str
) -> None:
    hidden, mlp, keys, batch, length = 256, 896, 64, 2, 64
    config = run_config(
        target_modules=targets, batch_size=batch, seq_length=length,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    kept, counted = [], []
    for layers in (2, 4):
        model, linear = _llama(tmp_path / str(layers), layers, hidden, mlp, keys, config)
        ids = torch.zeros((batch, length), dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), kept_bytes(model) as total:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        kept.append(total[0])
        counted.append(_terms(linear, config))
    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.1)


def _llama(
    folder: Path, layers: int, hidden: int, mlp: int, keys: int, config: RunConfig
) -> tuple[Any, dict[str, list[int]]]:
    """Weights in bf16, norms in float32, LoRA: as ``app.base_model`` loads it on a GPU."""
    shape = LlamaConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=keys // 64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    linear = {
        n: [m.out_features, m.in_features]
        for n, m in base.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    for parameter in base.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    lora = LoraConfig(task_type="CAUSAL_LM", r=32, lora_dropout=0.1, target_modules=config.targets)
    model = get_peft_model(base, lora).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, linear


def _terms(linear: dict[str, list[int]], config: RunConfig) -> int:
    """The sum without weights, LoRA's own and the loss: what is kept, and one layer's backward."""
    layout = Layout.of(linear, config)
    return needed(Weights(0), linear, config) - memory.LORA_BYTES * layout.size
