"""Take an adapter home: a PEFT folder of one round, or the base model with that adapter merged in.

The folder holds what PEFT or Transformers load, a model card, and nothing else of the run.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from app.server.checkpoint import newest, sha256
from app.site.base_model import BaseModel, prepared
from eval import EvalError
from eval.card import card
from eval.model import KINDS, Adapter, Base, attached, load_base
from eval.results import adapters, choose_run, metrics, round_number, state

CONFIG = "adapter_config.json"


def export(results: Path, run: str, asked: str, to: Path, models: Path | None) -> str:
    """Write the adapter of a run's round into the new folder ``to``; says what it has written.

    Args:
        run: its id, or latest.
        asked: best, last, or a round's number.
        models: what ``supernode.prepare`` wrote, where the adapter is to be merged into its base
            model; None: the adapter alone.

    Raises:
        EvalError: no such run or round, it is of another model, its base model is not prepared,
            ``to`` is there already or cannot be written.
        SiteError: a prepared file is not as it was prepared.
    """
    if os.path.lexists(to):
        raise EvalError(f"--to {to}: it is there already, and is left as it is; give a new name")
    if run == "latest" and not newest(results):
        raise EvalError(f"no complete adapter in {results}; is it the results folder (--results)?")
    folder = choose_run(results, run, 0)
    (adapter,) = adapters(folder, round_number(folder, asked), every=False)
    about = _about(folder, adapter, asked)
    base = _base(adapter, about["name"], models) if models else None
    try:
        text = card(about)
    except (LookupError, TypeError, ValueError, AttributeError) as err:
        raise EvalError(
            f"{folder}: run.json, metrics.jsonl or eval/report.json is not as it was written "
            f"({type(err).__name__}: {err})"
        ) from None
    with _new(to) as part:
        if models and base:
            about["merged"] = _merge(adapter, base, models, part)
            text = card(about)
        else:
            for name in ("adapter_model.safetensors", CONFIG):
                shutil.copyfile(adapter.folder / name, part / name)
        (part / "README.md").write_text(text, encoding="utf-8")
    what = f", merged into {about['merged']}" if about["merged"] else ""
    return f"{to}: round {adapter.round} of run {folder.name}{what}"


def _about(folder: Path, adapter: Adapter, asked: str) -> dict[str, Any]:
    """What the card tells, as ``card`` takes it. Raises EvalError: damaged, or of another run."""
    facts, settings = (_read(p) for p in (folder / "run.json", adapter.folder / CONFIG))
    config = facts.get("config")
    if not isinstance(config, dict) or "model.name" not in config:
        raise EvalError(f"{folder / 'run.json'} names no base model: it is not what a run wrote")
    # A run that ended in its preflight has taken rounds over, and no fingerprint.
    of_run = config["model.name"], facts.get("base_model_fingerprint", adapter.fingerprint)
    own = settings.get("base_model_name_or_path"), adapter.fingerprint
    if own != of_run:
        raise EvalError(
            f"{adapter.folder} is of base model {own[0]}, fingerprint {own[1]}, but its run of "
            f"{of_run[0]}, fingerprint {of_run[1]}: it is another run's; copy the run anew"
        )
    digest = sha256(adapter.folder)
    return {
        "name": own[0],
        "fingerprint": own[1],
        "run": folder.name,
        "round": adapter.round,
        "sha256": digest,
        "settings": settings,
        "facts": facts,
        "lines": [m for m in metrics(folder) if m["round"] <= (adapter.round or 0)],
        "state": state(folder),
        "asked": asked,
        "report": _report(folder / "eval" / "report.json", digest),
        "merged": "",
    }


def _report(path: Path, digest: str) -> dict[str, Any]:
    """The evaluation that scored the weights of this SHA-256; empty where the last did not."""
    report = _read(path) if path.is_file() else {"subjects": []}
    try:
        return report if digest in [s["sha256"] for s in report["subjects"]] else {}
    except (LookupError, TypeError):
        raise EvalError(f"{path} is not as the evaluation wrote it; evaluate again") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise EvalError(f"{path}: {err.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EvalError(f"{path} is no JSON object; copy the run anew")
    return found


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A hidden folder beside it, which gets its name when all is in it.

    Raises:
        EvalError: it cannot be written.
    """
    part = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        yield part
        for path in part.iterdir():
            path.chmod(0o644)
        part.chmod(0o755)
        part.rename(folder)  # no folder with anything in it is ever replaced
    except (OSError, SafetensorError) as err:
        why = getattr(err, "strerror", None) or str(err).split("\n")[0]
        raise EvalError(f"cannot write {folder}: {why}") from None
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)


def _base(adapter: Adapter, name: str, models: Path) -> BaseModel:
    """The prepared model whose weights the sites trained on. Raises EvalError: it is not here."""
    here = [base for base in prepared(models) if base.name == os.path.normpath(name)]
    for base in here:
        if base.fingerprint == adapter.fingerprint:
            return base
    if not here:
        raise EvalError(
            f"--merge: base model {name} is not prepared in {models}; run supernode.prepare model, "
            "or leave out --merge"
        )
    raise EvalError(
        f"--merge: {adapter.folder} was trained on weights with fingerprint {adapter.fingerprint}; "
        f"{name} in {models} has {', '.join(base.fingerprint for base in here)}; prepare the same "
        "revision in the same quantisation"
    )


def _merge(adapter: Adapter, made: BaseModel, models: Path, to: Path) -> str:
    """The merged model and its tokenizer into ``to``; returns what it was merged into, in words.

    In float32, and rounded to 16 bits once. Quantised weights are not quantised again: that would
    round much of the adapter away.

    Raises:
        EvalError: the adapter cannot be merged.
    """
    flags = {kind: flag for flag, kind in KINDS.items()}
    base = load_base(made.name, flags[made.kind], "cpu", models, models)
    _check_head(adapter, base)
    with attached(adapter, base) as model:
        merged = model.merge_and_unload()
    _as_the_config_has_it(merged)
    dtype = _sixteen_bits(made.folder)
    with torch.no_grad():
        for parameter in merged.parameters():  # tied ones stay tied
            parameter.data = parameter.data.to(dtype)
            if not parameter.isfinite().all():
                raise EvalError(f"--merge: {made.name} with this adapter does not fit in {dtype}")
    # How its arrays were read: a way back into 4 bits, which Transformers would look for, is none.
    merged._weight_conversions = None
    merged.save_pretrained(to, max_shard_size="5GB")
    base.tokenizer.save_pretrained(to)
    weights = "original weights" if made.kind == "none" else f"dequantised {made.kind} weights"
    return f"the {weights} that the sites trained on, in {str(dtype).removeprefix('torch.')}"


def _as_the_config_has_it(model: Any) -> None:
    """Quantised, GPT-2's Conv1D becomes a Linear, and stays one: its weights are turned back."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and isinstance(plain.get_submodule(name), Conv1D):
            module.weight.data = module.weight.data.T.contiguous()


def _check_head(adapter: Adapter, base: Base) -> None:
    """Raises EvalError: it adapts an output head that is the embeddings as well."""
    head = base.model.get_output_embeddings()
    if head is None or head.weight is not base.model.get_input_embeddings().weight:
        return
    (name,) = (n for n, module in base.model.named_modules() if module is head)
    with safe_open(adapter.weights, "np") as file:
        if f"base_model.model.{name}.lora_A.weight" in file.keys():  # noqa: SIM118
            raise EvalError(
                f"--merge: {adapter.folder} adapts {name}, whose weights {base.name} shares with "
                "its embeddings: merged, it would change both; leave out --merge"
            )


def _sixteen_bits(source: Path) -> torch.dtype:
    """float16 where the model itself is stored so, else bfloat16."""
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    stored = settings.get("dtype", settings.get("torch_dtype"))
    return torch.float16 if stored == "float16" else torch.bfloat16
