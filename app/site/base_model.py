"""The site's prepared base model: finding it, loading it, and the adapter in and out of it.

``supernode.prepare`` wrote the folder: weights already quantised, tokenizer, and base.json
with name, bits, fingerprint, linear layers, and each file's size and SHA-256. Finding imports no
torch, so the preflight answers at once; torch and PEFT are imported where they are used.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.config import RunConfig
from app.site.partition import SiteError
from app.wire.adapter import Layout, Vector

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

# Weights of at most so many bytes in float32 are expanded once where there is no GPU.
EXPANDED_BYTES = 1 << 30


@dataclass(frozen=True)
class BaseModel:
    """What base.json says of a prepared model."""

    folder: Path
    name: str
    kind: str  # nf4, fp4, int8 or none
    bits: int
    fingerprint: str
    linear_layers: dict[str, list[int]]  # name -> [out, in], in the model's order
    files: dict[str, int]  # name -> bytes
    sha256: dict[str, str]  # name -> hex digits; empty if an older version prepared it
    positions: int | None  # tokens of a row that it can place; None: any number, or unknown


def prepared(models_dir: Path) -> list[BaseModel]:
    """Every model that ``supernode.prepare`` put into the folder.

    Raises:
        SiteError: a base.json is damaged.
    """
    found = []
    for path in sorted(models_dir.glob("*/base.json")):
        try:
            base = json.loads(path.read_text())
            name = os.path.normpath(base["name"])  # an older version wrote it as it was typed
            facts = {"sha256": {}, "positions": None} | base | {"folder": path.parent, "name": name}
            found.append(BaseModel(**{f.name: facts[f.name] for f in fields(BaseModel)}))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SiteError(
                f"{path.parent.name}/base.json is not what supernode.prepare wrote; delete "
                f"{path.parent.name} and run supernode.prepare again"
            ) from None
    return found


def check_files(base: BaseModel) -> None:
    """Raises SiteError if a file of the prepared model is missing or cut short."""
    for file, size in base.files.items():
        there = base.folder / file
        actual = there.stat().st_size if there.is_file() else None
        if actual != size:
            raise SiteError(
                f"base model {base.name}: {file} has {actual} bytes, {size} expected; "
                f"delete {base.folder.name} and run supernode.prepare again"
            )


def find(models_dir: Path, name: str, bits: int) -> BaseModel:
    """The prepared model of this name and number of bits.

    Raises:
        SiteError: it is not there, or there twice (nf4 and fp4), or a file is cut short.
    """
    models = prepared(models_dir)
    matches = [base for base in models if (base.name, base.bits) == (name, bits)]
    if not matches:
        seen = ", ".join(f"{base.name} ({base.bits} bits)" for base in models)
        raise SiteError(
            f"no base model {name} ({bits} bits) among the prepared ones ({seen or 'none'}); "
            "run supernode.prepare, or change model.name or model.quantization"
        )
    for base in matches:
        check_files(base)
    if len(matches) > 1:
        folders = " and ".join(m.folder.name for m in matches)
        raise SiteError(f"{folders} are both {name} in {bits} bits; delete one")
    return matches[0]


def device_and_dtype(device: str) -> "tuple[torch.device, torch.dtype]":
    """The torch device and the compute dtype: bf16 where CUDA has it, else fp32.

    A CPU without bf16 units is ten times slower in bf16 than in fp32.

    Raises:
        SiteError: CUDA is asked for and torch sees none.
    """
    import torch

    if device == "cpu":
        return torch.device("cpu"), torch.float32
    if not torch.cuda.is_available():
        raise SiteError("DEVICE=cuda, but torch sees no GPU; check the driver or set DEVICE=cpu")
    return torch.device("cuda", 0), (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    )


def mixed_precision(device: str) -> "torch.autocast":
    """Where a forward pass runs: matrix products in the compute dtype, sums in float32."""
    import torch

    _, dtype = device_and_dtype(device)
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def load_with_lora(
    base: BaseModel, config: RunConfig, device: str, layout: Layout, adapter: Vector
) -> "tuple[PeftModel, Any]":
    """The base model with LoRA attached and set to ``adapter``, and the tokenizer.

    Raises:
        SiteError: the model's LoRA arrays are not those of ``layout``.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch_device, dtype = device_and_dtype(device)
    settings = AutoConfig.from_pretrained(base.folder)
    quantised = getattr(settings, "quantization_config", None)
    if quantised and base.bits == 4:  # stored at preparation, maybe on another kind of device
        quantised["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(
        base.folder,
        config=settings,
        dtype=dtype,
        device_map={"": torch_device},
        use_safetensors=True,
    )  # with SDPA where the model has it, else eager attention
    model.config.use_cache = False
    if base.bits:
        _unquantised_dtypes(model, dtype)
    if base.bits and (device, dtype) == ("cpu", torch.float32) and _fits_expanded(base):
        model = model.dequantize()
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.targets,
    )
    peft_model = get_peft_model(model, lora)
    set_adapter(peft_model, layout, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    return peft_model, tokenizer


def _unquantised_dtypes(model: Any, dtype: "torch.dtype") -> None:
    """What is not quantised in float32, but embeddings and head in bf16 where they are stored so.

    ``from_pretrained`` leaves it as stored. PEFT's prepare_model_for_kbit_training would take
    float32 for all of it (2.1 GB more for Llama-3 8B); norms need it, as in QLoRA. The Trainer
    turns on gradient checkpointing, and PEFT freezes the base model.
    """
    import torch

    for parameter in model.parameters():
        kept = parameter.dtype == dtype == torch.bfloat16 and parameter.ndim > 1
        if parameter.is_floating_point() and not kept:
            parameter.data = parameter.data.float()


def _fits_expanded(base: BaseModel) -> bool:
    """Whether a CPU computes with the same weights in float32, and not out of 4 or 8 bits.

    bitsandbytes expands them anew in each pass, which takes half of a small model's training; what
    it computes without gradients there, it computes in bfloat16.
    """
    return 4 * sum(math.prod(shape) for shape in base.linear_layers.values()) <= EXPANDED_BYTES


def _lora_parameters(model: "PeftModel") -> "dict[str, torch.nn.Parameter]":
    """Trainable parameters under the names that PEFT saves them with."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def set_adapter(model: "PeftModel", layout: Layout, adapter: Vector) -> None:
    """Copy ``adapter`` [layout.size] into the model, by name.

    Raises:
        SiteError: names or shapes differ.
    """
    import torch

    parameters = _lora_parameters(model)
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    if shapes != dict(zip(layout.names, layout.shapes, strict=True)):
        raise SiteError("the base model's LoRA arrays are not those of the run's layout")
    with torch.no_grad():
        for name, array in layout.split(adapter).items():
            # A copy: the message's buffer is read-only.
            parameters[name].copy_(torch.from_numpy(np.array(array)))


def get_adapter(model: "PeftModel", layout: Layout) -> Vector:
    """The model's adapter as float32 [layout.size]."""
    parameters = _lora_parameters(model)
    return layout.join({n: p.detach().float().cpu().numpy() for n, p in parameters.items()})
