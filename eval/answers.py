"""Answers on the disk: as they come, so that an interrupted evaluation goes on, and at the end
in the leaderboard's two files."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from eval import EvalError
from eval.benchmarks import Question
from eval.identity import digests
from eval.inference import Answer


class Journal:
    """The answers of one model to one set, a line each, in the order in which they came.

    Its first line says what they follow from, part by part, and its name holds a hash of that:
    whatever differs has a journal of its own, and the one before stays.
    """

    def __init__(self, folder: Path, name: str, parts: Mapping[str, Any], count: int) -> None:
        """Open ``folder``/.answers_<name>_<hash of parts>.jsonl for appending.

        Args:
            parts: all that the answers follow from, under names for the user.
            count: of the questions.

        Raises:
            EvalError: the folder cannot be written, or what is there is no such journal.
        """
        self._folder, self._name, self._count = folder, name, count
        head = json.dumps(digests(parts), sort_keys=True)
        identity = hashlib.sha256(head.encode()).hexdigest()[:16]
        self.path = path = folder / f".answers_{name}_{identity}.jsonl"
        self.answers: dict[int, Answer] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                kept = self._read(head)
            else:
                kept = []
                self._say_what_differs(json.loads(head))
            replace_file(path, "\n".join([head, *kept]) + "\n")
            self._file = path.open("a")
        except OSError as err:
            raise self._failed(err) from None

    def _read(self, head: str) -> list[str]:
        """The lines that hold answers, which are taken; raises EvalError under another head."""
        first, *lines = self.path.read_bytes().split(b"\n")
        if first != head.encode() and (lines or not head.encode().startswith(first)):  # or cut off
            raise EvalError(f"{self.path} is not what it is called; move it away")
        kept = []
        for line in lines:
            try:
                index, output, pick = json.loads(line)
                if not (type(index) is int and 0 <= index < self._count):
                    raise ValueError
                if not (isinstance(output, str) and isinstance(pick, str | None)):
                    raise ValueError
            except (ValueError, TypeError):
                break  # a killed process left it unfinished, or it is damaged
            self.answers[index] = Answer(output, pick)
            kept.append(line.decode())
        return kept

    def _say_what_differs(self, parts: dict[str, str]) -> None:
        """From the answers that this model's name already has to this set, if any."""
        prefix, old_forms = f".answers_{self._name}_", 0
        differences: list[list[str]] = []
        for path in self._folder.glob(f"{prefix}*.jsonl"):
            if not (re.fullmatch("[0-9a-f]+", path.stem.removeprefix(prefix)) and path.is_file()):
                continue  # of a longer name
            with path.open(encoding="utf-8", errors="replace") as file:
                first = file.readline(1 << 16)
            try:
                before = dict(json.loads(first))
            except (ValueError, TypeError):
                before = {}
            if unlike := [k for k in parts if before and before.get(k) != parts[k]]:
                differences.append(unlike)
            else:
                old_forms += 1
        if differences or old_forms:
            what = min(differences, key=len, default=["the evaluation's version"])
            print(
                f"eval: {self._name}: answering anew: {', '.join(what)} "
                f"{'differs' if len(what) == 1 else 'differ'}",
                flush=True,
            )

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
