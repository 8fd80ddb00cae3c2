"""What others hold: the questions, at a pinned revision, and a base model's original weights."""

import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from eval import EvalError
from supernode.hub import HubError, OfflineError, asking, hub_token


def fetch(dataset: str, repository: str, file: str, revision: str, cache: Path) -> Path:
    """The hub's file of a set, from the cache or else the network.

    Raises:
        EvalError: neither has it.
        OSError: HF_TOKEN_FILE cannot be read.
    """
    from huggingface_hub import hf_hub_download

    if there := cached(repository, file, revision, cache):
        return there
    where = _where(revision, cache)
    try:
        token = hub_token()
        with asking(repository, "dataset", token):
            return Path(hf_hub_download(repository, file, token=token, **where))
    except OfflineError as err:
        way = (
            f"run `python -m eval fetch --datasets {dataset}` (compose: EVAL_DATASETS={dataset}) "
            "where the hub can be reached, or give --data-dir"
        )
        raise EvalError(f"{dataset}: {repository} is not in {cache}, and {err}; {way}") from None
    except HubError as err:
        raise EvalError(
            f"{dataset}: {repository}@{revision[:12]} is not in {cache}, and {err}; or give "
            "--data-dir"
        ) from None


def default_cache() -> Path:
    """Where the hub's files are kept, unless ``--cache`` says otherwise."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MODEL_CACHE", home / "fedllm-medical"))


def cached(repository: str, file: str, revision: str, cache: Path) -> Path | None:
    """The hub's file of a set, if the cache has it."""
    from huggingface_hub import try_to_load_from_cache

    there = try_to_load_from_cache(repository, file, **_where(revision, cache))
    return Path(there) if isinstance(there, str) else None


def _where(revision: str, cache: Path) -> dict[str, Any]:
    return {"repo_type": "dataset", "revision": revision, "cache_dir": cache / "hub"}


def original_weights(name: str, quantization: str, models: Path, cache: Path) -> Path:
    """A base model's own folder: from prepare's cache, else the hub's, or what is left of it here.

    Raises:
        EvalError: there is none, and ``models`` has it not in this ``quantization`` either.
        OSError: HF_TOKEN_FILE cannot be read.
    """
    kept = cache / name.replace("/", "--")
    if (kept / "complete").exists():
        return kept
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    where: dict[str, Any] = {"cache_dir": cache / "hub", "allow_patterns": patterns}
    try:
        token = hub_token()
        quiet = nullcontext() if sys.stderr.isatty() else disable_progress_bars()
        with quiet, asking(name, "model", token):
            return Path(snapshot_download(name, token=token, **where))
    except HubError as err:
        why = str(err)
    with suppress(LocalEntryNotFoundError, HFValidationError):
        return Path(snapshot_download(name, local_files_only=True, **where))
    raise EvalError(
        f"base model {name} is neither prepared for --quantization {quantization} in {models} nor "
        f"in {cache}, and {why}; run supernode.prepare model"
    )
