"""Answers on the disk: as they come, so that an interrupted evaluation goes on, and at the end
in the leaderboard's two files."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from eval import EvalError
from eval.benchmarks import Question
from eval.inference import Answer


class Journal:
    """The answers of one model to one set, a line each, in the order in which they came.

    Its name and its first line say what they are answers to: another model, adapter, precision
    or choice of questions has a journal of its own.
    """

    def __init__(
        self, folder: Path, name: str, facts: dict[str, Any], questions: Sequence[Question]
    ) -> None:
        """Open ``folder``/.answers_<name>_<what they answer>.jsonl for appending.

        Raises:
            EvalError: the folder cannot be written.
        """
        content = json.dumps([facts, questions], sort_keys=True)
        identity = hashlib.sha256(content.encode()).hexdigest()
        self.path = path = folder / f".answers_{name}_{identity[:8]}.jsonl"
        self.answers: dict[int, Answer] = {}
        kept = [identity]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().split("\n") if path.exists() else []
            if lines and lines[0] == identity:
                for line in lines[1:]:
                    try:
                        index, output, pick = json.loads(line)
                    except ValueError:
                        break  # a killed process left it unfinished
                    self.answers[index] = Answer(output, pick)
                    kept.append(line)
            replace_file(path, "\n".join(kept) + "\n")
            self._file = path.open("a")
        except OSError as err:
            raise self._failed(err) from None

    def add(self, index: int, answer: Answer) -> None:
        """Keep one answer. Raises EvalError if the disk does not take it."""
        self.answers[index] = answer
        try:
            self._file.write(json.dumps([index, *answer]) + "\n")
            self._file.flush()
        except OSError as err:
            raise self._failed(err) from None

    def close(self) -> None:
        with suppress(OSError):  # what `add` has reported already
            self._file.close()

    def _failed(self, err: OSError) -> EvalError:
        return EvalError(
            f"cannot write {self.path}: {err.strerror}; make room or give --out, and run it "
            "again: what is answered is kept"
        )


def write_results(
    folder: Path,
    dataset: str,
    name: str,
    questions: Sequence[Question],
    outputs: Sequence[str],
    accuracy: float,
) -> None:
    """acc_<dataset>_<name>.txt and generation_<dataset>_<name>.jsonl, byte for byte in the
    leaderboard's format (its .jsonl is one JSON array, by pandas as well).

    Raises:
        EvalError: the folder cannot be written.
    """
    rows = [(q.prompt, q.gold, o) for q, o in zip(questions, outputs, strict=True)]
    table = pd.DataFrame(rows, columns=["prompt", "gold", "output"])
    for file, text in (
        (f"acc_{dataset}_{name}.txt", f"Accuracy: {accuracy}. "),
        (f"generation_{dataset}_{name}.jsonl", table.to_json(orient="records")),
    ):
        try:
            replace_file(folder / file, text)
        except OSError as err:
            raise EvalError(f"cannot write {folder / file}: {err.strerror}") from None


def replace_file(path: Path, text: str) -> None:
    """The whole new text or, where the disk is full, the old one. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
