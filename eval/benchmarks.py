"""The questions: where they come from and how they are worded.

Instructions, question mark rule, options and wrapper are the leaderboard's, to the letter
(adap/flower, benchmarks/flowertune-llm/evaluation/medical/{benchmarks,utils}.py): one other
character would change the answers.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval import EvalError
from eval.fetch import fetch

Row = Mapping[str, Any]

BUNDLED = Path(__file__).parent / "questions"
_KNOWLEDGE = (
    "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, "
    "patient care, and modes of therapy"
)
_STANDARD = (
    "Base your answer on the current and standard practices referenced in medical guidelines."
)
_ABSTRACT = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
    "following statement is correct? Answer yes, no, or maybe."
)
_ENTRANCE_EXAM = (
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    f"understanding of {_KNOWLEDGE}, answer the following multiple-choice question. Select one "
    f"correct answer from A to D. {_STANDARD}"
)
_LICENSING_EXAM = (
    "You are a medical doctor taking the US Medical Licensing Examination. You need to "
    f"demonstrate your understanding of {_KNOWLEDGE}. Show your ability to apply the knowledge "
    "essential for medical practice. For the following multiple-choice question, select one "
    f"correct answer from A to E. {_STANDARD}"
)


_FOUR, _YES_NO = ("A", "B", "C", "D"), ("yes", "no", "maybe")


class Question(NamedTuple):
    """What the model is asked (without the chat wrapper), and the right answer."""

    prompt: str
    gold: str


def _choice(question: str, options: list[Any]) -> str:
    if any(isinstance(option, list | dict) for option in options):
        raise TypeError
    if not question.endswith(("?", ".")):
        question += "?"
    lines = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))
    return f"Question: {question}\n\nOptions:\n{lines}"


def _abstract(row: Row) -> Question:
    if row["final_decision"] not in _YES_NO:
        raise ValueError(f"final_decision {row['final_decision']!r} is none of {_YES_NO}")
    if not isinstance(row["CONTEXTS"], list) or not isinstance(row["QUESTION"], str):
        raise TypeError
    context = "\n".join(row["CONTEXTS"])
    return Question(f"{context}\n{row['QUESTION']}", row["final_decision"])


def _numbered(row: Row, columns: tuple[str, ...], first: int) -> Question:
    try:
        index = int(row["cop"]) - first
    except OverflowError:
        index = -1
    if index not in range(len(columns)):
        raise ValueError(f"cop = {row['cop']} is none of its {len(columns)} options")
    text = _choice(row["question"], [row[c] for c in columns])
    return Question(text, chr(ord("A") + index))


def _medmcqa(row: Row) -> Question:
    return _numbered(row, ("opa", "opb", "opc", "opd"), 0)


def _careqa(row: Row) -> Question:
    return _numbered(row, ("op1", "op2", "op3", "op4"), 1)


def _medqa(row: Row) -> Question:
    keys = [o["key"] for o in row["options"] if o["value"] == row["answer"]]
    if not keys:
        raise ValueError("its answer is none of its options")
    return Question(_choice(row["question"], [o["value"] for o in row["options"]]), keys[0])


@dataclass(frozen=True)
class Benchmark:
    """One set of questions; where ``repository`` is empty, it is bundled with this package."""

    title: str
    instruction: str
    labels: tuple[str, ...]
    body: Callable[[Row], Question]
    repository: str = ""
    revision: str = ""
    file: str = ""
    questions: int = 0


# `datasets` 4 runs no loader scripts, and bigbio's two sets have nothing else on main: these are
# the revisions into which the hub converted them (parquet, the script's own columns and order).
BENCHMARKS = {
    "pubmedqa": Benchmark(
        "PubMedQA", _ABSTRACT, _YES_NO, _abstract,
        "bigbio/pubmed_qa", "1fd5c9aa6cdf264f6c0867061769db9ec1d2bdcd",
        "pubmed_qa_labeled_fold0_source/test/0000.parquet", 500,
    ),
    "medmcqa": Benchmark(
        "MedMCQA", _ENTRANCE_EXAM, _FOUR, _medmcqa,
        "openlifescienceai/medmcqa", "91c6572c454088bf71b679ad90aa8dffcd0d5868",
        "data/validation-00000-of-00001.parquet", 4183,
    ),
    "medqa": Benchmark(
        "MedQA", _LICENSING_EXAM, _FOUR, _medqa,
        "bigbio/med_qa", "23be9145433d91ab1ef920ca5b6a4a220a63cd56",
        "med_qa_en_4options_source/test/0000.parquet", 1273,
    ),
    "careqa": Benchmark(
        "CareQA", _ENTRANCE_EXAM, _FOUR, _careqa,
        "HPAI-BSC/CareQA", "743ea64415b8a195eb3954bdaa19c222a96370ec",
        "CareQA_en.json", 5621,
    ),
    "demo-yesno": Benchmark("demo: yes, no, maybe", _ABSTRACT, _YES_NO, _abstract),
    "demo-four": Benchmark("demo: four options", _ENTRANCE_EXAM, _FOUR, _medmcqa),
    "demo-five": Benchmark("demo: five options", _LICENSING_EXAM, (*_FOUR, "E"), _medqa),
}  # fmt: skip
LEADERBOARD = ("pubmedqa", "medmcqa", "medqa", "careqa")


def benchmark(dataset: str) -> Benchmark:
    """The benchmark of that name. Raises EvalError naming those there are."""
    if dataset not in BENCHMARKS:
        raise EvalError(f"--datasets: no {dataset!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[dataset]


def render(dataset: str, row: Row) -> tuple[str, str]:
    """A row in the hub's columns as prompt (without the chat wrapper) and gold.

    Raises:
        EvalError: unknown dataset.
        ValueError: a column is missing, the question is no text (options may be numbers or
            nothing, worded as Python does), or the gold is no option.
    """
    chosen = benchmark(dataset)
    try:
        body, gold = chosen.body(row)
    except KeyError as err:
        raise ValueError(f"no column {err}") from None
    except (TypeError, AttributeError):
        raise ValueError("a column is not of the expected type") from None
    return f"{chosen.instruction}\n{body}\nThe answer is:\n", gold


def wrap(prompt: str) -> str:
    """The leaderboard's chat wrapper, plain text whatever the model's own template is."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def load(
    dataset: str, data_dir: Path | None, cache: Path, limit: int | None = None
) -> tuple[list[Question], str]:
    """The first ``limit`` questions of a set in its own order, and where they are from.

    Args:
        data_dir: folder with a JSON, JSONL or parquet file whose name has the set's name as a
            word (medqa.jsonl, generation_medqa_x.jsonl), in the hub's columns or as
            prompt/gold pairs. Without it: the bundled file, or the hub's.
        cache: where the hub's files are kept; with HF_HUB_OFFLINE=1 nothing else is tried.

    Raises:
        EvalError: no file, more than one, or a row that cannot be read (file and line).
    """
    chosen = benchmark(dataset)
    if data_dir:
        path, origin = _file_in(data_dir, dataset), ""
    elif chosen.repository:
        path = fetch(dataset, chosen.repository, chosen.file, chosen.revision, cache)
        origin = f"{chosen.repository}@{chosen.revision[:12]}, {chosen.file}"
    else:
        path, origin = BUNDLED / f"{dataset}.jsonl", "bundled"
    questions = []
    for place, row in read_rows(path):
        try:
            pair = Question(row["prompt"], row["gold"]) if {"prompt", "gold"} <= set(row) else None
            prompt, gold = pair or render(dataset, row)
            if not (isinstance(prompt, str) and isinstance(gold, str) and gold):
                raise ValueError("prompt or gold is not a text")
            prompt.encode()  # a lone surrogate could be asked, but not be written
        except ValueError as err:
            raise EvalError(f"{path}, {place}: {err}") from None
        questions.append(Question(prompt, gold))
    if not questions:
        raise EvalError(f"{path} holds no question")
    if not data_dir and chosen.questions not in (0, len(questions)):
        raise EvalError(f"{path}: {len(questions)} questions, {chosen.questions} expected")
    return questions[:limit], origin or str(path)


def _file_in(data_dir: Path, dataset: str) -> Path:
    if not data_dir.is_dir():
        raise EvalError(f"--data-dir: no folder {data_dir}")
    word = re.compile(rf"(?<![a-z0-9]){re.escape(dataset)}(?![a-z0-9])", re.IGNORECASE)
    kinds = (".json", ".jsonl", ".parquet")
    found = [p for p in sorted(data_dir.iterdir()) if p.suffix in kinds and word.search(p.stem)]
    if len(found) == 1:
        return found[0]
    names = " and ".join(p.name for p in found) or f"no {dataset}.jsonl, .json or .parquet"
    raise EvalError(f"--data-dir {data_dir}: {names}; one file is needed for {dataset}")


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every row with its place ("line 3", "row 3") of a JSONL, JSON array or parquet file.

    Raises:
        EvalError: the file cannot be read, or a line is no JSON object.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                rows = pyarrow.parquet.read_table(path).to_pylist()
            except (pyarrow.ArrowException, OSError) as err:
                if getattr(err, "strerror", None):
                    raise
                raise EvalError(f"{path} is no parquet file") from None
            yield from ((f"row {n}", row) for n, row in enumerate(rows, 1))
            return
        text = path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise EvalError(f"cannot read {path}: {err.strerror}") from None
    except UnicodeDecodeError:
        raise EvalError(f"{path} is not UTF-8") from None
    if text.lstrip().startswith("["):  # as the leaderboard writes, whatever the suffix says
        try:
            values = [(f"row {n}", value) for n, value in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as err:
            line = f", line {err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
            raise EvalError(f"{path}{line}: not JSON") from None
    else:
        values = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() cuts at U+2028 as well
            if line.strip():
                try:
                    values.append((f"line {number}", json.loads(line)))
                except (ValueError, RecursionError):
                    raise EvalError(f"{path}, line {number}: not JSON") from None
    for place, value in values:
        if not isinstance(value, dict):
            raise EvalError(f"{path}, {place}: not a JSON object")
        yield place, value
