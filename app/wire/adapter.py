"""The LoRA adapter as one flat vector: its layout, its initial value, its PEFT files.

numpy only: the server builds, splits and saves adapters without torch or a base model.
One flat array costs a third of the round overhead of 128 (each Flower array travels as
objects of its own), so names and shapes live here and only their hash travels.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from app.config import RunConfig

Vector = NDArray[np.float32]
PROMPT = "model.prompt"  # in the weights' metadata, as in the run config


@dataclass(frozen=True)
class Layout:
    """Names (PEFT's, as in adapter_model.safetensors) and shapes, in the model's order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, linear_layers: Mapping[str, Sequence[int]], config: RunConfig) -> "Layout":
        """The adapter's layout for a base model's linear layers, name -> [out, in].

        Raises:
            ValueError: a target module matches no linear layer.
        """
        if config.targets == "all-linear":  # as in PEFT: all but the output head
            chosen = [n for n in linear_layers if n != "lm_head"]
        else:
            ends = {
                t: [n for n in linear_layers if f".{n}".endswith(f".{t}")] for t in config.targets
            }
            for target, matches in ends.items():
                if not matches:
                    last_parts = sorted({n.rsplit(".", 1)[-1] for n in linear_layers})
                    raise ValueError(
                        f"run config: model.lora.target-modules = {config.target_modules!r}: "
                        f"{target!r} is no linear layer of {config.model_name}; "
                        f"it has {', '.join(last_parts)}"
                    )
            wanted = {n for matches in ends.values() for n in matches}
            chosen = [n for n in linear_layers if n in wanted]
        names: list[str] = []
        shapes: list[tuple[int, int]] = []
        for name in chosen:
            n_out, n_in = linear_layers[name]
            for side, shape in (("A", (config.lora_r, n_in)), ("B", (n_out, config.lora_r))):
                names.append(f"base_model.model.{name}.lora_{side}.weight")
                shapes.append(shape)
        return cls(tuple(names), tuple(shapes))

    @cached_property
    def size(self) -> int:
        """Number of parameters."""
        return sum(prod(s) for s in self.shapes)

    @cached_property
    def hash(self) -> str:
        """Equal on both sides exactly when names, order and shapes are."""
        return hashlib.sha256(json.dumps([self.names, self.shapes]).encode()).hexdigest()[:16]

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Views into ``vector`` [size], by name and in shape."""
        if vector.shape != (self.size,):
            raise ValueError(f"adapter has shape {vector.shape}, expected ({self.size},)")
        ends = np.cumsum([prod(s) for s in self.shapes])[:-1]
        parts = np.split(vector, ends)
        return {n: p.reshape(s) for n, s, p in zip(self.names, self.shapes, parts, strict=True)}

    def join(self, arrays: Mapping[str, NDArray[np.floating]]) -> Vector:
        """One float32 vector [size] from arrays by name (never by position)."""
        if set(arrays) != set(self.names):
            raise ValueError(
                f"adapter has other arrays: {sorted(set(arrays) ^ set(self.names))[:4]}"
            )
        return np.concatenate([np.asarray(arrays[n], np.float32).ravel() for n in self.names])


def initial_adapter(layout: Layout, seed: int) -> Vector:
    """A uniform in ±1/sqrt(in) (PEFT's kaiming_uniform with a = sqrt 5), B zero.

    A pure function of seed and layout: every node can rebuild it bit by bit.
    """
    rng = np.random.default_rng(seed)
    vector = np.zeros(layout.size, np.float32)
    for name, array in layout.split(vector).items():
        if name.endswith(".lora_A.weight"):
            bound = array.shape[1] ** -0.5
            array[:] = rng.uniform(-bound, bound, array.shape)
    return vector


def save_peft(folder: Path, layout: Layout, vector: Vector, config: RunConfig) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT does.

    Another prompt than FlowerTune's stands in the metadata of the weights, which go wherever the
    adapter goes: it is to be asked in those words (eval/prompt.py).
    """
    about = {"format": "pt"} | ({} if config.prompt == "alpaca" else {PROMPT: config.prompt})
    # Not save_file: a full disk would be its own SafetensorError, no OSError.
    content = save(layout.split(vector), about)
    (folder / "adapter_model.safetensors").write_bytes(content)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model_name,
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
