"""Quantise a base model once and store it with its tokenizer and base.json.

Flower starts a new process for every message, so the model is loaded in every round;
loading it pre-quantised takes an eighth of the time of quantising on load.
"""

import fcntl
import gc
import hashlib
import json
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from supernode import source as sources
from supernode import tokens
from supernode.download import PrepareError, cached, check_id, is_prepared, model_folder, prepared
from supernode.source import KINDS, SourceError
from supernode.trial import UnfitError, train_one_row


def prepare_model(models: Path, cache: Path, name: str, kind: str, token: str | None) -> Path:
    """Make ``models``/<name>-<kind> unless it is there; returns it.

    Args:
        name: a hub id or a local folder.
        kind: nf4 (with double quantisation), fp4, int8, or none.
        token: the hub's access token, for gated models.

    Raises:
        PrepareError: the model can be had neither locally nor from the hub, or cannot be used.
    """
    name = name and os.path.normpath(name)  # of an empty one it makes this folder
    if kind not in KINDS:
        raise PrepareError(f"--quantization {kind}: one of {', '.join(KINDS)}")
    target = prepared(models, name, kind)
    there = cached(cache, name) if name else None
    if (base := is_prepared(target)) and os.path.normpath(str(base.get("name"))) == name:
        if not there or _made_of(target, base, there, kind):
            return target
        _say(f"{there} has changed, or was not looked at as it is now")
    if not there:
        check_id("base model", name)
    source = there or model_folder(cache, name, token)
    models.mkdir(parents=True, exist_ok=True)
    _remove_what_was_killed(models, f".{target.name}-")
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models))
    part.chmod(0o755)
    held = _lock(part)
    try:
        try:
            _convert(source, part, name, kind)
        except SourceError as err:
            raise PrepareError(str(err)) from None
        (target / "base.json").unlink(missing_ok=True)  # an old one goes as a whole
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if held is not None:
            os.close(held)
    return target


def _made_of(target: Path, base: dict[str, Any], source: Path, kind: str) -> bool:
    """Contents decide; but what nobody has touched since is not read again at every start."""
    stamps = sources.stamps(source)
    if "source" not in base:  # an older version's: nobody asked whether all arrays were there
        return False
    if base["source"] != stamps:
        if base.get("fingerprint") != sources.fingerprints(source)[kind]:
            return False
        with suppress(OSError):  # then it is read again next time
            _write(target, base | {"source": stamps})
    return True


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
    sources.check(source)
    stamps = sources.stamps(source)
    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    _say(f"loading {name}, {size / 1e9:.1f} GB, as {kind}")
    model, tokenizer = _loaded(source, kind)
    layers, positions = sources.linear_layers(model), sources.positions(model)
    _say("writing it, and a fingerprint of what it was made of")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    del model
    gc.collect()  # it is loaded again
    _say("training one row, as a site will")
    try:
        train_one_row(target)
    except Exception as err:  # whatever the libraries make of a model that they do not know
        why = str(err) if isinstance(err, UnfitError) else _first_line(err)
        raise PrepareError(f"{source} ({kind}) cannot be trained: {why}") from None
    files = sorted(p for p in target.rglob("*") if p.is_file())
    for path in files:
        path.chmod(0o644)  # SuperNodes may run as another user
    base = {
        "name": name,
        "kind": kind,
        "bits": {"nf4": 4, "fp4": 4, "int8": 8, "none": 0}[kind],
        # Of what went in, not of what came out: CPU and GPU may round a weight differently.
        "fingerprint": sources.fingerprints(source)[kind],
        "source": stamps,
        "linear_layers": layers,
        "positions": positions,
        "files": {p.relative_to(target).as_posix(): p.stat().st_size for p in files},
        "sha256": {p.relative_to(target).as_posix(): _sha256(p) for p in files},
    }
    if sources.stamps(source) != stamps:
        raise PrepareError(f"{source} has changed while it was read; run it again")
    _write(target, base)


def _loaded(source: Path, kind: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises PrepareError, SourceError: they do not load, or not whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import set_tqdm_hook

    from supernode.progress import of_steps

    set_tqdm_hook(of_steps)
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
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            # What is not quantised stays as exact as the source has it.
            dtype="auto",
            device_map={"": 0 if torch.cuda.is_available() else "cpu"},
            quantization_config=BitsAndBytesConfig(**settings) if settings else None,
            use_safetensors=True,
            trust_remote_code=False,
            **sources.TOLD,
        )
    except Exception as err:  # whatever the libraries make of a damaged file
        raise PrepareError(
            f"{source} does not load as a causal language model: {_first_line(err)}"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as err:
        raise PrepareError(
            f"{source}: its tokenizer does not load ({_first_line(err)}); give the model's whole "
            "folder, with tokenizer.json"
        ) from None
    sources.check_read(source, model, info)
    tokens.check_tokenizer(source, tokenizer, len(model.get_input_embeddings().weight))
    tokens.mark_markup(tokenizer)
    for note in tokens.notes(tokenizer, model.generation_config.eos_token_id):
        _say(note)
    return model, tokenizer


def _write(target: Path, base: dict[str, Any]) -> None:
    part = target / ".base.json.part"
    part.write_text(json.dumps(base, indent=2) + "\n")
    part.replace(target / "base.json")


def _say(text: str) -> None:
    print(f"prepare: {text}", file=sys.stderr, flush=True)


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {str(err).strip().split(chr(10))[0]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
