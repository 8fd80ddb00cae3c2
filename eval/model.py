"""The base model in the wanted precision, and an adapter on it, both checked before use."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from app.site.base_model import check_files, device_and_dtype, prepared
from app.site.verified import check_contents
from eval import EvalError
from eval.fetch import original_weights
from eval.identity import settings_digest
from supernode import source as sources

# --quantization -> how weights are stored. 4 is what the leaderboard asks for: bitsandbytes'
# defaults, FP4 computed in float32 (eval.py of its evaluation).
KINDS = {"4": "fp4", "8": "int8", "0": "none", "nf4-bf16": "nf4"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "fp4": {"load_in_4bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Base:
    """A loaded base model."""

    model: Any
    tokenizer: Any
    name: str
    linear_layers: dict[str, list[int]]  # name -> [out, in]
    fingerprints: set[str]  # as a run trained on these weights could have recorded
    folder: Path  # of its files
    facts: dict[str, Any]  # for the report


def load_base(name: str, quantization: str, device: str, models: Path, cache: Path) -> Base:
    """Load a base model: prepared in this precision, else quantised from its own weights.

    On the CPU the quantised weights are expanded to float32 once: the same numbers, computed
    as exactly as on a GPU (bitsandbytes' own CPU kernels multiply in bfloat16).

    Args:
        name: local folder, name of a prepared model, or hub id.
        device: "cuda" or "cpu".
        models: what ``supernode.prepare`` wrote.
        cache: where it keeps what it took from the hub.

    Raises:
        EvalError: the model can be had from nowhere, does not load, or is too large for the GPU.
        SiteError: there is no GPU, or a prepared file is not as it was prepared.
    """
    name = os.path.normpath(name)
    torch_device, fast = device_and_dtype(device)
    kind = KINDS[quantization]
    if device == "cpu":
        dtype = torch.float32
    else:
        dtype = {"4": torch.float32, "8": torch.float16}.get(quantization, fast)
    matches = [b for b in prepared(models) if (b.name, b.kind) == (name, kind)]
    made = matches[0] if matches and not Path(name).is_dir() else None
    if made:
        check_files(made)
        check_contents(made)
        source, fingerprints = made.folder, {kind: made.fingerprint}
    else:
        own = Path(name).is_dir()
        source = Path(name) if own else original_weights(name, quantization, models, cache)
    try:
        if not made:
            sources.check(source)
            fingerprints = sources.fingerprints(source)
        model, tokenizer = _loaded(source, kind, dtype, torch_device)
    except sources.SourceError as err:
        raise EvalError(str(err)) from None
    except torch.OutOfMemoryError:
        raise EvalError(
            f"the GPU is too small for {name} with --quantization {quantization}; "
            "use nf4-bf16, or free its memory"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        first = str(err).strip().split("\n")[0]
        raise EvalError(f"{source} does not load as a causal language model: {first}") from None
    layers = sources.linear_layers(model)
    if device == "cpu" and kind != "none":
        model = model.dequantize()
    facts = {
        "name": name,
        "quantization": quantization,
        "kind": kind,
        "compute_dtype": str(dtype).split(".")[1],
        "fingerprint": fingerprints[kind],
        "files_sha256": settings_digest(source),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else "cpu",
    }
    return Base(model.eval(), tokenizer, name, layers, set(fingerprints.values()), source, facts)


def _loaded(source: Path, kind: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer; what is quantised already was prepared in this kind.

    Raises SourceError: arrays are missing, or too many; and many other errors.
    """
    disable_progress_bar()
    config = AutoConfig.from_pretrained(source)
    stored, how = getattr(config, "quantization_config", None), None
    if stored and kind in ("nf4", "fp4"):  # at preparation, maybe for another kind of device
        stored["bnb_4bit_compute_dtype"] = str(dtype).split(".")[1]
    elif not stored and kind in _SETTINGS:
        settings = _SETTINGS[kind] | {"bnb_4bit_compute_dtype": dtype}
        how = {"quantization_config": BitsAndBytesConfig(**settings)}
    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        **sources.TOLD,
        **(how or {}),
    )  # with SDPA where the model has it, else eager attention
    sources.check_read(source, model, info)
    if stored:
        _cast(model, dtype)
    return model, AutoTokenizer.from_pretrained(source)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Let a stored quantised model compute in ``dtype``, whatever it was stored with.

    ``from_pretrained`` applies its dtype to none of the parameters of such a model.
    """
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder to be scored."""

    folder: Path
    name: str  # in the names of the files written
    round: int | None = None
    fingerprint: str | None = None  # of the base model that it was trained on, if recorded

    @property
    def weights(self) -> Path:
        return self.folder / "adapter_model.safetensors"


def base_model_name(adapter: Adapter) -> str:
    """The base model that the adapter says it is for. Raises EvalError if it says none."""
    name = _settings(adapter).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise EvalError(
            f"{adapter.folder / 'adapter_config.json'} names no base_model_name_or_path; "
            "give --base-model-name-path"
        )
    return name


def _settings(adapter: Adapter) -> dict[str, Any]:
    path = adapter.folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text())
    except OSError as err:
        raise EvalError(f"no adapter in {adapter.folder}: {path.name}: {err.strerror}") from None
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise EvalError(f"{path} is no adapter_config.json")
    return settings


def check(adapter: Adapter, base: Base) -> str:
    """Compare every array of the adapter with the base model's layers.

    Returns a note for the report where the adapter names another model: a mirror has another name
    and the same weights, so fingerprint and shapes decide.

    Raises:
        EvalError: a file is missing or cut short, or an array does not fit; names the array.
    """
    settings = _settings(adapter)
    if settings.get("peft_type") != "LORA":
        raise EvalError(f"{adapter.folder}: peft_type {settings.get('peft_type')}, not LORA")
    made_for = os.path.normpath(str(settings.get("base_model_name_or_path") or base.name))
    # A path says nothing here; a hub id does.
    ids = made_for.count("/") == base.name.count("/") == 1 and not Path(base.name).is_dir()
    note = ""
    if made_for != base.name and ids:
        same = adapter.fingerprint in base.fingerprints
        known = "the weights are the same" if same else "its arrays fit, no more is known"
        note = f"{adapter.name} is an adapter of {made_for}, scored on {base.name}: {known}."
    if adapter.fingerprint and adapter.fingerprint not in base.fingerprints:
        # A prepared model knows the fingerprint of its own kind only.
        text = (
            f"{adapter.folder} was trained on weights with fingerprint {adapter.fingerprint}, "
            f"{base.name} here has {', '.join(sorted(base.fingerprints))}"
        )
        if len(base.fingerprints) > 1:
            raise EvalError(f"{text}; prepare the same revision of the base model")
        print(f"eval: cannot compare base models: {text}", file=sys.stderr)
    try:
        shapes = sources.shapes(adapter.weights)
    except FileNotFoundError:
        raise EvalError(f"no adapter_model.safetensors in {adapter.folder}") from None
    except sources.SourceError as err:
        raise EvalError(str(err)) from None
    except OSError as err:
        raise EvalError(f"{adapter.weights}: {err.strerror}") from None
    for name, shape in shapes.items():
        layer, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):
            continue  # not plain LoRA: for PEFT to judge
        if layer not in base.linear_layers:
            raise EvalError(f"{adapter.folder}: {name} has no layer in {base.name}")
        n_out, n_in = base.linear_layers[layer]
        fits = len(shape) == 2 and (shape[1] == n_in if side[0] == "A" else shape[0] == n_out)
        if not fits:
            raise EvalError(
                f"{adapter.folder}: {name} is {shape}, but that layer of {base.name} is "
                f"{[n_out, n_in]}; the adapter is of another base model"
            )
    return note


@contextmanager
def attached(adapter: Adapter, base: Base) -> Iterator[Any]:
    """The base model with the adapter on it; taken off again afterwards.

    Raises:
        EvalError: PEFT does not take it, or arrays of the file are not in the model.
    """
    from peft import get_peft_model_state_dict

    check(adapter, base)
    # As PeftModel.from_pretrained, in two steps: what fails half-way must come off again.
    try:
        model = PeftModelForCausalLM(base.model, PeftConfig.from_pretrained(str(adapter.folder)))
    except _PEFT_ERRORS as err:
        raise _not_taken(adapter, err) from None
    try:
        try:
            model.load_adapter(str(adapter.folder), "default", is_trainable=False)
        except _PEFT_ERRORS as err:
            raise _not_taken(adapter, err) from None
        with safe_open(adapter.weights, "np") as file:
            loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
            unlike = {n for n in set(file.keys()) ^ set(loaded) if ".base_layer." not in n}
        if unlike:
            raise EvalError(f"{adapter.folder}: arrays that do not fit: {sorted(unlike)[:4]}")
        yield model.eval()
    finally:
        model.unload()


_PEFT_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def _not_taken(adapter: Adapter, err: Exception) -> EvalError:
    first = str(err).strip().split("\n")[0]
    return EvalError(f"{adapter.folder}: PEFT does not load it: {first}")
