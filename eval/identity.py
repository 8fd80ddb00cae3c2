"""Everything that an answer follows from, so that kept answers are never those of something else.

No file counts by its name or its date: what is in it does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.server.checkpoint import sha256
from eval.benchmarks import Question, labels_of

if TYPE_CHECKING:
    from eval.inference import Inference
    from eval.model import Adapter, Base

_SETTINGS = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # of a model: and its tokenizer
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers")
# The package's own files that turn a question into an answer.
_CODE = ("inference.py", "model.py")


def settings_digest(model: Path) -> str:
    """SHA-256 of a model folder's settings and tokenizer; a prepared one's name its weights'."""
    return hashlib.sha256(b"".join(file_digests(model, _SETTINGS))).hexdigest()


def file_digests(folder: Path, suffixes: tuple[str, ...]) -> list[bytes]:
    """Name and SHA-256 of each file of these kinds, sorted by name."""
    parts = []
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file()):
        with path.open("rb") as file:
            parts.append(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return parts


def of_model(base: "Base", adapter: "Adapter | None") -> dict[str, Any]:
    """What one model's answers to any set follow from; the keys are words for the user.

    Raises:
        OSError, ValueError: the adapter's files cannot be read.
    """
    settings = weights = None
    if adapter:
        # As PEFT reads it: one JSON object, however it is laid out.
        settings = json.loads((adapter.folder / "adapter_config.json").read_text())
        weights = sha256(adapter.folder)
    code = hashlib.sha256()
    for name in _CODE:
        code.update((Path(__file__).parent / name).read_bytes())
    facts = base.facts
    return {
        "the base model": [facts["fingerprint"], facts["files_sha256"]],
        "adapter_config.json": settings,
        "adapter_model.safetensors": weights,
        "--quantization": [facts[key] for key in ("quantization", "kind", "compute_dtype")],
        "generation_config.json": base.model.generation_config.to_dict(),
        "the device": facts["device"],
        "the evaluation's code": code.hexdigest(),
        **{f"the version of {name}": version(name) for name in _LIBRARIES},
    }


def of_answers(
    model: Mapping[str, Any], inference: "Inference", dataset: str, questions: Sequence[Question]
) -> dict[str, Any]:
    """What the answers of a model (``of_model``) to one set follow from."""
    labels = list(labels_of(dataset, questions))
    parts = {**model, "what is asked": [list(questions), inference.encoded(questions), labels]}
    if not inference.one_pass(questions):  # then a batch's first gold counts for all of it
        parts["--batch-size"] = inference.asked_batch_size
    return parts


def digests(parts: Mapping[str, Any]) -> dict[str, str]:
    """Each part as a SHA-256; the order of keys does not matter, nor how JSON was laid out."""
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }
