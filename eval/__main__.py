"""Load the final adapter of the newest run onto its base model, and say what it is.

    python -m eval            RESULTS_DIR, MODELS_DIR and DEVICE say where and on what

This checks that the results volume holds a whole adapter that PEFT accepts, name for name, on
the base model that the run was trained on.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from app.base_model import device_and_dtype, find
from app.checkpoint import rounds
from app.partition import SiteError


class EvalError(Exception):
    """Nothing to evaluate, or the adapter does not fit; the message is one line."""


def final_adapter(results: Path) -> Path:
    """The last complete checkpoint of the newest run.

    Raises:
        EvalError: there is none yet, or its weights are not those of its manifest.
    """
    found = rounds((results / "latest").resolve())
    if not found:
        raise EvalError(f"no complete adapter in {results} yet; has a run finished a round?")
    folder = found[max(found)]
    manifest = json.loads((folder / "round.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != manifest["sha256"]:
        raise EvalError(f"{folder}: adapter_model.safetensors is not what the run wrote")
    return folder


def load(folder: Path, models: Path, device: str) -> int:
    """Put the adapter on its base model with PEFT; returns the number of adapter arrays.

    Raises:
        EvalError: an array of the file is not in the model, or the other way round.
        SiteError: the base model is not prepared here, or is another one.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((folder.parent / "run.json").read_text())["config"]
    base = find(models, config["model.name"], config["model.quantization"])
    manifest = json.loads((folder / "round.json").read_text())
    if base.fingerprint != manifest["base_model_fingerprint"]:
        raise SiteError(
            f"{base.folder.name} has fingerprint {base.fingerprint}, the run's base model "
            f"{manifest['base_model_fingerprint']}"
        )
    torch_device, dtype = device_and_dtype(device)
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=dtype, device_map={"": torch_device}
    )
    peft_model = PeftModel.from_pretrained(model, str(folder))
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        stored = set(file.keys())
    loaded = set(get_peft_model_state_dict(peft_model))
    if stored != loaded:
        raise EvalError(f"{folder}: arrays that do not fit: {sorted(stored ^ loaded)[:4]}")
    return len(stored)


def main() -> int:
    try:
        folder = final_adapter(Path(os.environ.get("RESULTS_DIR", "results")))
        arrays = load(
            folder,
            Path(os.environ.get("MODELS_DIR", "models")),
            os.environ.get("DEVICE", "cuda"),
        )
    except (EvalError, SiteError) as err:
        print(f"eval: ERROR: {err}", file=sys.stderr)
        return 1
    print(f"eval: run {folder.parent.name}, {folder.name}: {arrays} arrays on the base model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
