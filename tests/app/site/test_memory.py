"""The memory that a run needs on a GPU, against what was seen and what can be counted here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from app import plan
from app.config import RunConfig
from app.site import memory
from app.site.base_model import find
from app.site.examples import IGNORED, Example, collate
from app.site.memory import CONTEXT_BYTES, Weights, advice, checkpointing, estimated, needed, stored
from app.site.packing import passes
from app.wire.adapter import Layout
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
    padded = run_config(max_tokens_per_pass=16 * 512)
    seen = needed(weights, LLAMA, padded) - CONTEXT_BYTES
    assert seen == pytest.approx(26.1e9, rel=0.01)


def test_what_the_recipe_needs_now() -> None:
    assert NF4_LLAMA.size == pytest.approx(5.7e9, rel=0.01)
    assert needed(NF4_LLAMA, LLAMA, RECIPE) == pytest.approx(15.0e9, rel=0.005)
    # In one pass it is what a batch padded to 512 tokens a row needed.
    whole = run_config(max_tokens_per_pass=16 * 512)
    assert needed(NF4_LLAMA, LLAMA, whole) == pytest.approx(23.6e9, rel=0.005)


@pytest.mark.parametrize(
    ("change", "more"),
    [
        ({"batch_size": 32}, None),  # in passes
        ({"batch_size": 4}, False),
        ({"seq_length": 1024}, None),
        ({"seq_length": 5000}, True),  # a row is never cut in two
        ({"seq_length": 255}, False),
        ({"max_tokens_per_pass": 4097}, True),
        ({"max_tokens_per_pass": 4095}, False),
        ({"max_tokens_per_pass": 8192, "batch_size": 8}, None),
        ({"max_tokens_per_pass": 1}, False),
        ({"lora_r": 64}, True),
        ({"gradient_checkpointing": False}, True),
        ({"target_modules": "all-linear"}, True),
        ({"gradient_checkpointing": "auto"}, None),  # the least that it can do with
        ({"max_steps": 99, "gradient_accumulation_steps": 4, "num_server_rounds": 1}, None),
    ],
)
def test_what_takes_memory_counts_and_nothing_else(
    change: dict[str, Any], more: bool | None
) -> None:
    before, after = (needed(NF4_LLAMA, LLAMA, c) for c in (RECIPE, run_config(**change)))
    assert (after > before, after < before) == (more is True, more is False)


def test_the_advice_is_a_shorter_pass_that_fits_and_leaves_the_recipe_as_it_is() -> None:
    words = advice(NF4_LLAMA, LLAMA, RECIPE, 12_000_000_000)
    assert words == "train.max-tokens-per-pass = 2048 needs 10.8 GB and trains the same"
    small = run_config(batch_size=3, seq_length=600)  # 1800 tokens, then 900, then one row
    assert "max-tokens-per-pass = 600 needs" in advice(NF4_LLAMA, LLAMA, small, 7_900_000_000)
    assert "a larger GPU" in advice(NF4_LLAMA, LLAMA, RECIPE, 5_000_000_000)


@settings(max_examples=100)
@given(st.integers(1, 64), st.integers(16, 2048), st.integers(1, 9000), st.integers(6, 40))
def test_what_is_advised_fits_and_where_nothing_is_nothing_would(
    batch: int, length: int, tokens: int, free_gb: int
) -> None:
    config = run_config(batch_size=batch, seq_length=length, max_tokens_per_pass=tokens)
    assume(needed(NF4_LLAMA, LLAMA, config) > free_gb * 10**9)
    words = advice(NF4_LLAMA, LLAMA, config, free_gb * 10**9)
    if found := re.search(r"max-tokens-per-pass = (\d+) needs", words):
        then = replace(config, max_tokens_per_pass=int(found[1]))
        assert needed(NF4_LLAMA, LLAMA, then) <= free_gb * 10**9
        assert needed(NF4_LLAMA, LLAMA, then) < needed(NF4_LLAMA, LLAMA, config)
    else:
        least = replace(config, max_tokens_per_pass=1)
        assert needed(NF4_LLAMA, LLAMA, least) > free_gb * 10**9


# --- gradient checkpointing "auto" ----------------------------------------------------------------


@pytest.mark.parametrize("tokens", [512, 2048, 4096, 8192])
def test_checkpointing_is_on_exactly_where_the_pass_would_not_fit_without(tokens: int) -> None:
    config = run_config(gradient_checkpointing="auto", max_tokens_per_pass=tokens)
    without = needed(NF4_LLAMA, LLAMA, replace(config, gradient_checkpointing=False))
    beside = without - NF4_LLAMA.size
    assert needed(NF4_LLAMA, LLAMA, config) < without
    for free, on in ((beside, False), (beside - 1, True)):
        decided, why = checkpointing(NF4_LLAMA, LLAMA, config, free)
        assert decided == on
        assert why.startswith(f"gradient checkpointing {'on' if on else 'off'}: ")
        assert f"a pass of {tokens} tokens needs about {beside / 1e9:.1f} GB" in why
        assert f"{free / 1e9:.1f} GB are free" in why


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


@pytest.mark.parametrize("batch", [2, 16])  # of these 1024 tokens the mask is a tenth
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_what_a_layer_keeps_for_the_backward_pass_is_what_is_counted(
    tmp_path: Path, checkpointed: bool, targets: str, batch: int
) -> None:
    hidden, mlp, keys, length = 256, 896, 64, 64
    config = run_config(
        target_modules=targets, batch_size=batch, seq_length=length,
        gradient_checkpointing=checkpointed,
    )  # fmt: skip
    kept, counted = [], []
    for layers in (2, 4):
        model, linear = _llama(tmp_path / str(layers), layers, hidden, mlp, keys, config)
        batch_of_rows = collate([Example([1] * length, [IGNORED] * (length - 1) + [1])] * batch)
        (one,) = passes(batch_of_rows, batch * length, True)
        del one["labels"]
        with torch.autocast("cpu", torch.bfloat16), kept_bytes(model) as total:
            model(**one)
        kept.append(total[0])
        counted.append(_terms(linear, config))
    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


def _llama(
    folder: Path, layers: int, hidden: int, mlp: int, keys: int, config: RunConfig
) -> tuple[Any, dict[str, list[int]]]:
    """Weights in bf16, norms in float32, LoRA: as ``app.site.base_model`` loads it on a GPU."""
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
