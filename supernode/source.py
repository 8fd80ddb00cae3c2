"""A base model's source: may it be used at all, which files count, and was it read whole?

For ``supernode.prepare`` and for the evaluation, which quantises by itself what nobody prepared. A
library fills with random numbers what a file lacks, and says so in its log only.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What the files of a model are called: weights, settings, vocabularies, chat templates. No pickles
# (.bin): they are never read, since who wrote one would run code here.
PARTS = (".safetensors", ".json", ".model", ".txt", ".jinja")
KINDS = ("nf4", "fp4", "int8", "none")
# For from_pretrained: what it would only log. A mismatch would raise, and name no array.
TOLD: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_NO_FILE = {  # what a file begins with -> what it is
    b"version https://git-lfs": "is a Git LFS pointer, not the file; run git lfs pull there",
    b"<!doctype": "is a web page, not the file; download it again, logged in if it asks for that",
    b"<html": "is a web page, not the file; download it again, logged in if it asks for that",
}
_INDEX = "model.safetensors.index.json"
# Type and name. Buffers may be whole numbers (GPT-2's old attn.bias), weights may not.
_WHOLE_NUMBERS = re.compile(r"[IU]\d+.*weight")


class SourceError(Exception):
    """The source cannot be used; the message is one line: file, reason, way out."""


def files(source: Path) -> list[Path]:
    """All that the source's results depend on, by name."""
    return sorted(p for p in source.iterdir() if p.suffix in PARTS and p.is_file())


def fingerprints(source: Path) -> dict[str, str]:
    """For each quantisation 16 hex digits of it and of the source's files, names and contents."""
    content = b""
    for path in files(source):
        with path.open("rb") as file:
            content += path.name.encode() + hashlib.file_digest(file, "sha256").digest()
    return {k: hashlib.sha256(k.encode() + content).hexdigest()[:16] for k in KINDS}


def stamps(source: Path) -> dict[str, list[int]]:
    """Of each file bytes, times of the last change (of contents, of anything) and inode.

    Where they are the same, so are the contents. No copy has the time of anything's change.
    """
    there = {path.name: path.stat() for path in files(source)}
    return {n: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for n, s in there.items()}


def check(source: Path) -> None:
    """Look at the files before a library does.

    Raises:
        SourceError: the weights are missing, cut short, pickled, quantised already or an adapter's,
            or a file is not what its name says.
    """
    for path in files(source):
        check_file(path)
    if (source / "adapter_config.json").exists():
        raise SourceError(
            f"{source} holds an adapter (adapter_config.json); give its base model, or merge the "
            "two first (PEFT's merge_and_unload)"
        )
    settings = {path.name: _json(path) for path in files(source) if path.suffix == ".json"}
    _check_config(source / "config.json", settings)
    if not (weights := [p for p in files(source) if p.suffix == ".safetensors"]):
        raise SourceError(
            f"{source} holds no .safetensors file, and no other weights are read; save it anew "
            "with save_pretrained of Transformers"
        )
    arrays = {path.name: set(shapes(path)) for path in weights}
    _check_index(source / _INDEX, settings.get(_INDEX), arrays)


def check_file(path: Path) -> None:
    """Raises SourceError: it is what stands for a file, and not the file."""
    with path.open("rb") as file:
        head = file.read(32).lstrip().lower()
    for start, what in _NO_FILE.items():
        if head.startswith(start):
            raise SourceError(f"{path} {what}")


def shapes(path: Path) -> dict[str, list[int]]:
    """Of the arrays in a safetensors file.

    Raises:
        SourceError: it is none, damaged, or holds whole numbers for weights; OSError: not readable.
    """
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, "np") as opened:
            arrays = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {name: list(array.get_shape()) for name, array in arrays.items()}
            whole = [n for n, a in arrays.items() if _WHOLE_NUMBERS.fullmatch(a.get_dtype() + n)]
    except SafetensorError as err:
        raise SourceError(f"{path} is damaged or cut short ({err}); download it again") from None
    if whole:
        raise SourceError(
            f"{path}: {len(whole)} weights are whole numbers, as of quantised ones, the first is "
            f"{whole[0]}; give those that they were made of"
        )
    return found


def _check_index(path: Path, index: Any, arrays: dict[str, set[str]]) -> None:
    """Raises SourceError: a part of the weights is not there, or nobody says what the parts are."""
    if "model.safetensors" in arrays:  # it alone is read
        return
    if index is None:
        raise SourceError(
            f"{path} is missing, which says what is in {sorted(arrays)[0]}; give the whole folder"
        )
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict):
        raise SourceError(f"{path} has no weight_map; download it again")
    if lost := sorted({str(file) for file in named.values()} - set(arrays)):
        raise SourceError(
            f"{path} names {len(lost)} files that are not there, the first is {lost[0]}; download "
            "the model again"
        )
    if absent := sorted(n for n, file in named.items() if n not in arrays[file]):
        raise SourceError(
            f"{path} names {len(absent)} arrays that its files lack, the first is {absent[0]}; "
            "download the model again"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise SourceError(f"{path} is no JSON ({err}); download it again") from None


def _check_config(path: Path, settings: dict[str, Any]) -> None:
    if path.name not in settings:
        raise SourceError(f"{path} is missing; give the model's whole folder")
    config = settings[path.name]
    if not isinstance(config, dict):
        raise SourceError(f"{path} is no object of settings; download it again")
    for key in ("quantization_config", "compression_config"):
        if stored := config.get(key):
            method = stored.get("quant_method", "") if isinstance(stored, dict) else ""
            raise SourceError(
                f"{path}: {key}: the weights are quantised already ({method or 'unnamed'}); give "
                "the original model, which is quantised here"
            )


def check_read(source: Path, model: Any, info: Mapping[str, Any]) -> None:
    """``info``: what Transformers told, asked with ``TOLD`` (tied arrays are never missing).

    Raises:
        SourceError: weights and config.json do not have the same arrays; names the first.
    """
    for names, what in (
        (info["missing_keys"], "lack {} of the model's arrays"),
        (info["unexpected_keys"], "have {} arrays that the model has not"),
        (
            [name for name, *_ in info["mismatched_keys"]] + _of_other_shapes(model),
            "have {} arrays of another shape than config.json says",
        ),
    ):
        if found := sorted(set(names)):
            raise SourceError(
                f"{source}: its weights {what.format(len(found))}, the first is {found[0]}; give "
                "weights and config.json of one model, whole"
            )


def _of_other_shapes(model: Any) -> list[str]:
    """Quantised weights that are not [out, in]: those Transformers takes as they come."""
    from torch.nn import Linear

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear)]
    return [
        f"{n}.weight"
        for n, m in layers
        if (m.out_features, m.in_features)
        != tuple(getattr(getattr(m.weight, "quant_state", m.weight), "shape", ()))
    ]


def linear_layers(model: Any) -> dict[str, list[int]]:
    """Name -> [out, in], in the model's order, of all layers that LoRA adapts, and the head.

    GPT-2's Conv1D is a linear layer with its weights transposed; PEFT sees that by itself.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return {
        n: [m.nf, m.nx] if isinstance(m, Conv1D) else [m.out_features, m.in_features]
        for n, m in model.named_modules()
        if isinstance(m, Linear | Conv1D)
    }


def positions(model: Any) -> int | None:
    """How many tokens of a text it can place; None: as many as there are (RoPE), or unknown."""
    config = model.config.get_text_config()
    if getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None):
        return None
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((n for n in found if isinstance(n, int)), None)
