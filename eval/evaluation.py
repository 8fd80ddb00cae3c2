"""Base model and adapters through all the questions, one after the other."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from app.site.chat import Chat
from eval import EvalError
from eval.answers import Journal, write_results
from eval.benchmarks import Question, labels_of
from eval.identity import of_answers, of_model
from eval.inference import Inference, NotFiniteError
from eval.model import Adapter, Base, attached, check
from eval.scoring import compare, right, score


def evaluate(
    base: Base,
    adapters: Sequence[Adapter],
    sets: Mapping[str, tuple[Sequence[Question], str]],
    batch_size: int,
    name_alone: str,
    out: Path,
    chat: Chat | None = None,
) -> list[dict[str, Any]]:
    """Base model and adapters, each with its scores: the ``subjects`` of the report.

    Args:
        sets: name -> questions and where they are from.
        name_alone: the base model's name in the files, where no adapter stands beside it.
        out: folder for answers and scores; what is answered there already is kept.
        chat: all of them are asked in its words, as the adapters were trained.

    Raises:
        EvalError: an adapter does not fit (before anything is answered), the disk is full, or a
            model's logits are not finite.
    """
    notes = [check(a, base) for a in adapters]  # all of them, before hours of answering
    for note in filter(None, notes):
        print(f"eval: {note}", file=sys.stderr)
    base_name = "base" if adapters else name_alone
    subjects: list[dict[str, Any]] = []
    base_right: dict[str, list[bool]] = {}
    for adapter, note in zip((None, *adapters), ("", *notes), strict=True):
        name = adapter.name if adapter else base_name
        identity = of_model(base, adapter)
        subject: dict[str, Any] = {
            "name": name,
            "adapter": str(adapter.folder) if adapter else None,
            "sha256": identity["adapter_model.safetensors"],
            "config": identity["adapter_config.json"],
            "round": adapter.round if adapter else None,
            "note": note,
            "scores": {},
        }
        with attached(adapter, base) if adapter else nullcontext(base.model) as model:
            inference = Inference(model, base.tokenizer, batch_size, chat)
            for dataset, (questions, _) in sets.items():
                result, correct = _answer(inference, identity, dataset, questions, name, out)
                subject["scores"][dataset] = result
                if adapter is None:
                    base_right[dataset] = correct
                else:
                    against = compare(base_right[dataset], correct)
                    subject.setdefault("against_base", {})[dataset] = against
        accuracies = [s["accuracy"] for s in subject["scores"].values()]
        subject["average"] = sum(accuracies) / len(accuracies)
        subjects.append(subject)
    return subjects


def _answer(
    inference: Inference,
    identity: dict[str, Any],
    dataset: str,
    questions: Sequence[Question],
    name: str,
    out: Path,
) -> tuple[dict[str, Any], list[bool]]:
    """One model, one set: answers, files, the score, and which questions it has right."""
    labels = labels_of(dataset, questions)
    parts = of_answers(identity, inference, dataset, questions)
    journal = Journal(out, f"{dataset}_{name}", parts, len(questions))
    kept, tokens, repeated = len(journal.answers), inference.tokens, inference.repeated
    started = time.monotonic()
    with tqdm(
        total=len(questions), initial=kept, desc=f"{name}, {dataset}", unit="question",
        mininterval=1, dynamic_ncols=True, disable=None,
    ) as bar:  # fmt: skip
        try:
            for index, answer in inference.answers(questions, labels, journal.answers):
                new = index not in journal.answers
                journal.add(index, answer)
                bar.update(new)
                if new and bar.disable:
                    _say(name, dataset, len(journal.answers), len(questions))
        except NotFiniteError as err:
            raise EvalError(
                f"{dataset}, question {err.index + 1}: the logits of {name} are not finite: "
                f"broken weights, or --quantization {identity['--quantization'][0]} is too coarse; "
                "try --quantization 0"
            ) from None
        finally:
            journal.close()
    answers = [journal.answers[i] for i in range(len(questions))]
    outputs, golds = [a.output for a in answers], [q.gold for q in questions]
    result = score(outputs, golds, labels, [a.pick for a in answers])
    if len(questions) > kept:  # else nothing was measured
        result |= {
            "seconds": time.monotonic() - started,
            "answered_now": len(questions) - kept,
            "tokens_computed": inference.tokens - tokens,
            "near_tie": inference.near_tie,
            "repeated_alone": inference.repeated - repeated,
        }
    write_results(out, dataset, name, questions, outputs, result["accuracy"])
    return result, right(outputs, golds, "yes" in labels)


def _say(name: str, dataset: str, answered: int, total: int) -> None:
    """A line for each tenth of the questions, where no terminal shows the bar."""
    if answered * 10 // total > (answered - 1) * 10 // total:
        print(f"eval: {name}, {dataset}: {answered} of {total}", file=sys.stderr, flush=True)
