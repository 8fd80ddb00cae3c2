"""Quantise a base model once and store it with its tokenizer and base.json.

Flower starts a new process for every message, so the model is loaded in every round;
loading it pre-quantised takes an eighth of the time of quantising on load.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from supernode.download import PARTS, PrepareError, is_prepared, model_folder, prepared

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
    local = Path(name) if Path(name).is_dir() else None
    base = is_prepared(target)
    if base and (not local or base.get("fingerprint") == fingerprint(local, kind)):
        return target
    source = model_folder(cache, name, token)
    models.mkdir(parents=True, exist_ok=True)
    _remove_what_was_killed(models, f".{target.name}-")
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models))
    part.chmod(0o755)
    held = _lock(part)
    try:
        _convert(source, part, name, kind)
        (target / "base.json").unlink(missing_ok=True)  # an old one goes as a whole
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if held is not None:
            os.close(held)
    return target


def _remove_what_was_killed(models: Path, prefix: str) -> None:
    """Gigabytes that a killed preparation left; not those of one that is at work."""
    for part in models.iterdir():
        if part.name.startswith(prefix) and (held := _lock(part)) is not None:
            shutil.rmtree(part, ignore_errors=True)
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A handle that keeps the folder until it is closed; None: another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _convert(source: Path, target: Path, name: str, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import set_tqdm_hook

    from supernode.progress import of_steps

    set_tqdm_hook(of_steps)
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    _say(f"loading {name}, {size / 1e9:.1f} GB, as {kind}")
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
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            # What is not quantised stays as exact as the source has it.
            dtype="auto",
            device_map={"": 0 if torch.cuda.is_available() else "cpu"},
            quantization_config=BitsAndBytesConfig(**settings) if settings else None,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as err:  # whatever the libraries make of a damaged file
        first = str(err).strip().split("\n")[0]
        raise PrepareError(
            f"{source} does not load as a causal language model: {type(err).__name__}: {first}"
        ) from None
    _say("writing it, and a fingerprint of what it was made of")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    for path in files:
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
        "files": {p.relative_to(target).as_posix(): p.stat().st_size for p in files},
        "sha256": {p.relative_to(target).as_posix(): _sha256(p).hex() for p in files},
    }
    (target / "base.json").write_text(json.dumps(base, indent=2) + "\n")


def _say(text: str) -> None:
    print(f"prepare: {text}", file=sys.stderr, flush=True)


def fingerprint(source: Path, kind: str) -> str:
    """16 hex digits of the quantisation and of all that the source's results depend on.

    Weights and every setting that Transformers reads: of model, tokenizer, generation and chat.
    """
    digest = hashlib.sha256(kind.encode())
    for path in sorted(p for p in source.iterdir() if p.suffix in PARTS and p.is_file()):
        digest.update(path.name.encode() + _sha256(path))
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
