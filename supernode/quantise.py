"""Quantise a base model once and store it with its tokenizer and base.json.

Flower starts a new process for every message, so the model is loaded in every round;
loading it pre-quantised takes an eighth of the time of quantising on load.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from supernode.download import PrepareError, model_folder, prepared

KINDS = ("nf4", "fp4", "int8", "none")


def prepare_model(models: Path, cache: Path, name: str, kind: str, token: str | None) -> Path:
    """Make ``models``/<name>-<kind> unless it is there; returns it.

    Args:
        name: a hub id or a local folder.
        kind: nf4 (with double quantisation), fp4, int8, or none.
        token: the hub's access token, for gated models.

    Raises:
        PrepareError: the model can be had neither locally nor from the hub.
    """
    if kind not in KINDS:
        raise PrepareError(f"--quantization {kind}: one of {', '.join(KINDS)}")
    target = prepared(models, name, kind)
    kept = target / "base.json"
    local = Path(name) if Path(name).is_dir() else None
    if kept.exists():
        made_of = json.loads(kept.read_text())["fingerprint"]
        if not local or made_of == fingerprint(local, kind):
            return target
    source = model_folder(cache, name, token)
    models.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models))
    part.chmod(0o755)
    try:
        _convert(source, part, name, kind)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _convert(source: Path, target: Path, name: str, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    settings: Any = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "int8": {"load_in_8bit": True},
        "none": None,
    }[kind]
    on_gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        # What is not quantised stays as exact as the source has it.
        dtype="auto",
        device_map={"": 0 if on_gpu else "cpu"},
        quantization_config=BitsAndBytesConfig(**settings) if settings else None,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    for path in target.iterdir():
        path.chmod(0o644)  # SuperNodes may run as another user
    base = {
        "name": name,
        "kind": kind,
        "bits": {"nf4": 4, "fp4": 4, "int8": 8, "none": 0}[kind],
        # Of what went in, not of what came out: CPU and GPU may round a weight differently.
        "fingerprint": fingerprint(source, kind),
        "linear_layers": {
            n: [m.out_features, m.in_features]
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear)
        },
        "files": {p.name: p.stat().st_size for p in sorted(target.iterdir())},
    }
    (target / "base.json").write_text(json.dumps(base, indent=2) + "\n")


def fingerprint(source: Path, kind: str) -> str:
    """16 hex digits of the source's weights, config and tokenizer, and of the quantisation."""
    digest = hashlib.sha256(kind.encode())
    settings = ("config.json", "tokenizer.json", "tokenizer.model")
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors" and path.name not in settings:
            continue
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
