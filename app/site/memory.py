"""How much of a GPU's memory a run needs at a site: a sum, for the preflight and the plan.

Its terms and what it was held against (tests/app/site/test_memory.py): 26.1 GB at the peak on an
H100 with embeddings and head in float32, and the bytes that autograd keeps for a layer's backward
pass.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from app.config import ConfigError, RunConfig
from app.site.base_model import BaseModel
from app.site.device import Gpu, device_name
from app.site.partition import SiteError
from app.wire.adapter import Layout

CONTEXT_BYTES = 600_000_000  # CUDA's own, and what the allocator cannot use; assumed
# A logit in float32, what log-softmax keeps of it, and the gradients of both: the peak is there.
LOGIT_BYTES = 12
LORA_BYTES = 16  # a parameter, its gradient and AdamW's two moments
# Per token and layer, for the backward pass in bf16 (counted on the CPU): for each value of the
# MLP's width, of the hidden state (keys and values among it: where there is a mask, SDPA gets them
# once for each head), of a key, of what goes into a LoRA layer, and for each token of the pass,
# since SDPA makes the mask of a packed pass anew in each layer.
MLP_BYTES, HIDDEN_BYTES, KEY_BYTES, LORA_INPUT_BYTES, MASK_BYTES = 12.0, 16.2, 0.25, 6.6, 2.0
STREAM_BYTES = 4  # of the hidden state between two layers, float32 as the norms are
_BITS_BYTES = {4: 0.516, 8: 1.0, 0: 2.0}  # NF4 with its scales; bf16
_SIZES = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I64": 8}  # bytes; others 1


@dataclass(frozen=True)
class Weights:
    """The base model on the GPU, in bytes; ``head_copy`` is the head's in the compute dtype."""

    size: int
    head_copy: int = 0


def stored(folder: Path, bits: int, bf16: bool) -> Weights:
    """A prepared model as ``app.site.base_model`` loads it, from its files' headers."""
    size = copy = 0.0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for tensor in (t for name, t in header.items() if name != "__metadata__"):
            dtype, count = tensor["dtype"], math.prod(tensor["shape"])
            in_bf16 = bf16 and (not bits or (dtype == "BF16" and len(tensor["shape"]) > 1))
            each = (
                (2 if in_bf16 else 4) if dtype in ("F32", "F16", "BF16") else _SIZES.get(dtype, 1)
            )
            size += count * each
            if bits and bf16 and each == 4 and len(tensor["shape"]) > 1:
                copy = max(copy, 2 * count)
    return Weights(int(size), int(copy))


def estimated(linear_layers: Mapping[str, Sequence[int]], bits: int) -> Weights:
    """A model that is not prepared here; embedding and head in bf16."""
    vocabulary, hidden = _head(linear_layers)
    inner = sum(math.prod(s) for s in linear_layers.values()) - vocabulary * hidden
    return Weights(int(inner * _BITS_BYTES[bits]) + 2 * 2 * vocabulary * hidden)


def needed(weights: Weights, linear_layers: Mapping[str, Sequence[int]], config: RunConfig) -> int:
    """Bytes at the peak of a training step whose rows all fill train.seq-length with answers.

    Evaluation needs less: it keeps nothing for a backward pass. For gradient checkpointing "auto"
    it is the least that the run can do with.
    """
    vocabulary, hidden = _head(linear_layers)
    layout = Layout.of(linear_layers, config)
    layers = len({m[0] for n in linear_layers if (m := re.search(r"\.\d+\.", n))})
    widths = [out for name, (out, _) in linear_layers.items() if re.search(r"\.\d+\.", name)]
    lora_inputs = sum(s[1] for s in layout.shapes[::2]) / layers  # A is [rank, in]
    tokens = pass_tokens(config)
    a_layer = tokens * (
        MLP_BYTES * max(widths)
        + HIDDEN_BYTES * hidden
        + KEY_BYTES * min(widths)
        + LORA_INPUT_BYTES * lora_inputs
        + MASK_BYTES * tokens
    )
    between = tokens * hidden * STREAM_BYTES
    kept = between + layers * (between if config.gradient_checkpointing is not False else a_layer)
    loss = tokens * vocabulary * LOGIT_BYTES + weights.head_copy
    backward = 2 * a_layer  # a layer computed once more, and the gradients in it
    return int(CONTEXT_BYTES + weights.size + LORA_BYTES * layout.size + kept + max(loss, backward))


def check_free(gpu: Gpu, base: BaseModel, config: RunConfig) -> int:
    """Bytes that the run needs on this GPU, which has them free.

    Raises:
        SiteError: it has not; ConfigError: the run adapts no layer of this model.
    """
    weights = stored(base.folder, base.bits, gpu.bf16)
    try:
        size = needed(weights, base.linear_layers, config)
    except ValueError as err:  # model.lora.target-modules
        raise ConfigError(str(err)) from None
    if size > gpu.free:
        raise SiteError(
            f"{device_name()} ({gpu.name}) has {gpu.free / 1e9:.1f} GB free of "
            f"{gpu.total / 1e9:.1f}, this run needs about {size / 1e9:.1f} GB; "
            + advice(weights, base.linear_layers, config, gpu.free)
        )
    return size


def pass_tokens(config: RunConfig) -> int:
    """Tokens of the longest pass that can come: a whole batch, or what the config allows."""
    allowed = max(config.max_tokens_per_pass, config.seq_length)
    return min(config.batch_size * config.seq_length, allowed)


def checkpointing(
    weights: Weights, linear_layers: Mapping[str, Sequence[int]], config: RunConfig, free: int
) -> tuple[bool, str]:
    """What "auto" is where ``free`` bytes are left beside the weights, and why."""
    without = replace(config, gradient_checkpointing=False)
    more = needed(weights, linear_layers, without) - weights.size
    on = more > free
    return on, (
        f"gradient checkpointing {'on' if on else 'off'}: without it a pass of "
        f"{pass_tokens(config)} tokens needs about {more / 1e9:.1f} GB beside the weights, "
        f"{free / 1e9:.1f} GB are free"
    )


def advice(
    weights: Weights, linear_layers: Mapping[str, Sequence[int]], config: RunConfig, free: int
) -> str:
    """What to change so that the run needs no more than ``free`` bytes."""
    key, tokens = "train.max-tokens-per-pass", pass_tokens(config)
    while tokens > config.seq_length:
        tokens = max(tokens // 2, config.seq_length)
        size = needed(weights, linear_layers, replace(config, max_tokens_per_pass=tokens))
        if size <= free:
            return f"{key} = {tokens} needs {size / 1e9:.1f} GB and trains the same"
    return f"lower train.seq-length, or take a larger GPU ({key} alone does not help)"


def _head(linear_layers: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """Vocabulary and hidden size: the widest linear layer is the head."""
    out, size = max(linear_layers.values(), key=lambda shape: shape[0])
    return out, size
