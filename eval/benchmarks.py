"""The questions: where they come from and how they are worded.

Instructions, question mark rule, options and wrapper are the leaderboard's, to the letter
(adap/flower, benchmarks/flowertune-llm/evaluation/medical/{benchmarks,utils}.py): one other
character would change the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from eval import EvalError
from eval.fetch import fetch
from eval.files import TRUTH, Row, authors_test_set, find, read_rows
from eval.shapes import Asked, RowError, abstracts, choices, short

BUNDLED = Path(__file__).parent / "questions"
_KNOWLEDGE = (
    "basic and clinical science, medical knowledge, and mechanisms underlying health, disease, "
    "patient care, and modes of therapy"
)
_STANDARD = (
    "Base your answer on the current and standard practices referenced in medical guidelines."
)
_STATEMENT = (
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


@dataclass(frozen=True)
class Benchmark:
    """One set of questions; where ``repository`` is empty, it is bundled with this package."""

    title: str
    instruction: str
    labels: tuple[str, ...]
    # What a number as gold counts from, in all published files of the set; the hub's first.
    counts_from: tuple[int, ...] = (0, 1)
    repository: str = ""
    revision: str = ""
    file: str = ""
    questions: int = 0


# `datasets` 4 runs no loader scripts, and bigbio's two sets have nothing else on main: these are
# the revisions into which the hub converted them (parquet, the script's own columns and order).
BENCHMARKS = {
    "pubmedqa": Benchmark(
        "PubMedQA", _STATEMENT, _YES_NO, (),
        "bigbio/pubmed_qa", "1fd5c9aa6cdf264f6c0867061769db9ec1d2bdcd",
        "pubmed_qa_labeled_fold0_source/test/0000.parquet", 500,
    ),
    "medmcqa": Benchmark(
        "MedMCQA", _ENTRANCE_EXAM, _FOUR, (0, 1),
        "openlifescienceai/medmcqa", "91c6572c454088bf71b679ad90aa8dffcd0d5868",
        "data/validation-00000-of-00001.parquet", 4183,
    ),
    "medqa": Benchmark(
        "MedQA", _LICENSING_EXAM, _FOUR, (0, 1),
        "bigbio/med_qa", "23be9145433d91ab1ef920ca5b6a4a220a63cd56",
        "med_qa_en_4options_source/test/0000.parquet", 1273,
    ),
    "careqa": Benchmark(
        "CareQA", _ENTRANCE_EXAM, _FOUR, (1,),
        "HPAI-BSC/CareQA", "743ea64415b8a195eb3954bdaa19c222a96370ec",
        "CareQA_en.json", 5621,
    ),
    "demo-yesno": Benchmark("demo: yes, no, maybe", _STATEMENT, _YES_NO),
    "demo-four": Benchmark("demo: four options", _ENTRANCE_EXAM, _FOUR),
    "demo-five": Benchmark("demo: five options", _LICENSING_EXAM, (*_FOUR, "E")),
}  # fmt: skip
LEADERBOARD = ("pubmedqa", "medmcqa", "medqa", "careqa")


def benchmark(dataset: str) -> Benchmark:
    """The benchmark of that name. Raises EvalError naming those there are."""
    if dataset not in BENCHMARKS:
        raise EvalError(f"--datasets: no {dataset!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[dataset]


def labels_of(dataset: str, questions: Sequence[Question]) -> tuple[str, ...]:
    """What the set's answers are; with E where people hold it with five options."""
    chosen = benchmark(dataset)
    return _all_labels(chosen) if any(q.gold == "E" for q in questions) else chosen.labels


def _all_labels(chosen: Benchmark) -> tuple[str, ...]:
    return chosen.labels if "yes" in chosen.labels else (*_FOUR, "E")


def render(dataset: str, row: Row) -> tuple[str, str]:
    """A row in the hub's columns as prompt (without the chat wrapper) and gold.

    Raises:
        EvalError: unknown dataset.
        ValueError: a column is missing, the question is no text (options may be numbers or
            nothing, worded as Python does), or the gold is no option.
    """
    return _asked(dataset, [row], held=False)[0]


def _asked(dataset: str, rows: Sequence[Row], held: bool) -> list[Question]:
    """Rows in words; ``held``: they are somebody's own file. Raises RowError, EvalError."""
    chosen = benchmark(dataset)
    if held and any({"prompt", "gold"} <= row.keys() for row in rows):
        return _pairs(rows, _all_labels(chosen))
    if "yes" in chosen.labels:
        return [_worded(chosen, _abstract(a), a) for a in abstracts(rows, held)]
    return [_worded(chosen, _choice(a), a) for a in choices(rows, chosen.counts_from, held)]


def _worded(chosen: Benchmark, body: str, asked: Asked) -> Question:
    return Question(f"{chosen.instruction}\n{body}\nThe answer is:\n", asked.gold)


def _abstract(asked: Asked) -> str:
    context = "\n".join(asked.parts)
    return f"{context}\n{asked.question}"


def _choice(asked: Asked) -> str:
    mark = "" if asked.question.endswith(("?", ".")) else "?"
    options = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(asked.parts))
    return f"Question: {asked.question}{mark}\n\nOptions:\n{options}"


def _pairs(rows: Sequence[Row], labels: Sequence[str]) -> list[Question]:
    """Rows that are worded already; their golds in the labels' own spelling."""
    label_of = {label.casefold(): label for label in labels}
    found = []
    for index, row in enumerate(rows):
        prompt, gold = row.get("prompt"), row.get("gold")
        if not (isinstance(prompt, str) and isinstance(gold, str)):
            raise RowError(index, "prompt or gold is not a text")
        if not prompt.strip():
            raise RowError(index, "prompt is empty")
        label = label_of.get(gold.strip().casefold())
        if label is None:  # no answer could match it
            raise RowError(index, f"gold = {short(gold)} is none of {', '.join(labels)}")
        found.append(Question(prompt, label))
    return found


def wrap(prompt: str) -> str:
    """The leaderboard's chat wrapper, plain text whatever the model's own template is."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"


def load(
    dataset: str, data_dir: Path | None, cache: Path, limit: int | None = None
) -> tuple[list[Question], str]:
    """The first ``limit`` questions of a set in its own order, and where they are from.

    Args:
        data_dir: folder with a JSON, JSONL or parquet file whose name has the set's name as a
            word (medqa.jsonl, generation_medqa_x.jsonl), in a shape that ``shapes`` reads or as
            prompt/gold pairs. Without it: the bundled file, or the hub's.
        cache: where the hub's files are kept; with HF_HUB_OFFLINE=1 nothing else is tried.

    Raises:
        EvalError: no file, more than one, or a row that cannot be read (file and line).
    """
    chosen = benchmark(dataset)
    if data_dir:
        path, origin = find(data_dir, dataset), ""
    elif chosen.repository:
        path = fetch(dataset, chosen.repository, chosen.file, chosen.revision, cache)
        origin = f"{chosen.repository}@{chosen.revision[:12]}, {chosen.file}"
    else:
        path, origin = BUNDLED / f"{dataset}.jsonl", "bundled"
    rows = list(read_rows(path))
    if data_dir and dataset == "pubmedqa" and (tested := authors_test_set(data_dir, rows)):
        rows, origin = tested, f"{path}, those in {TRUTH}"
    try:
        questions = _asked(dataset, [row for _, row in rows], held=bool(data_dir))
        for index, question in enumerate(questions):
            _encodable(index, question)
    except RowError as err:
        raise EvalError(f"{path}, {rows[err.index][0]}: {err}") from None
    if not questions:
        raise EvalError(f"{path} holds no question")
    if not data_dir and chosen.questions not in (0, len(questions)):
        raise EvalError(f"{path}: {len(questions)} questions, {chosen.questions} expected")
    return questions[:limit], origin or str(path)


def _encodable(index: int, question: Question) -> None:
    try:
        question.prompt.encode()
    except UnicodeEncodeError:  # JSON can say it; it could be asked, but not be written
        raise RowError(index, "half a character (\\ud800 to \\udfff without its pair)") from None
