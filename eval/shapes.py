"""Benchmark rows in the shapes that people hold: question, options or abstract, and gold.

Names of columns are compared without case. What the golds of a file mean (an option's letter, its
number from 0 or from 1, its text) is told by all rows together: by that which reads every one of
them. Where that is nothing, or more than one thing, RowError says for which row.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

LETTERS = "ABCDE"
_GROUPS = ("opa", "opb", "opc", "opd", "ope"), ("op1", "op2", "op3", "op4", "op5")
_NUMBERED = (
    "cop", "answer_idx", "answer_index", "answer_key", "answerkey", "correct_option",
)  # fmt: skip
_WORDED = "answer", "answer_text", "correct_answer"
_LETTERED = re.compile(r"\s*(\()?([A-E])(?(1)\)|[.):])(.*)", re.IGNORECASE | re.DOTALL)
_TEXT = -1  # beside 0 and 1, the numbers that a gold may count from
_CHOICE = (
    'wanted: question, options (texts, or {"A": text, ...}; or opa to opd, or op1 to op4), and the '
    "right one's letter in answer_idx, cop or answer"
)
_ABSTRACT = "wanted: QUESTION, CONTEXTS (a list of texts), final_decision (yes, no or maybe)"
_Options = list[Any]


class RowError(ValueError):
    """Row ``index`` (from 0) is not certain, or has no such shape; one line."""

    def __init__(self, index: int, why: str) -> None:
        super().__init__(why)
        self.index = index


class Asked(NamedTuple):
    """A question as its row has it."""

    question: str
    parts: _Options  # the options (texts, numbers, None), or the paragraphs of the abstract
    gold: str


def abstracts(rows: Sequence[Mapping[str, Any]], held: bool) -> list[Asked]:
    """Rows of PubMedQA: its authors', bigbio's, or the hub's own columns.

    Raises:
        RowError: a column is missing or of another type, or the decision is none; in somebody's
            own file (``held``) also a question or an abstract without a word.
    """
    found = []
    for index, row in enumerate(rows):
        try:
            found.append(_abstract(_named(row), held))
        except ValueError as err:
            raise RowError(index, f"{err}; {_ABSTRACT}") from None
    return found


def _abstract(named: dict[str, Any], held: bool) -> Asked:
    context = named.get("contexts", named.get("context"))
    context = context.get("contexts") if isinstance(context, dict) else context
    question = _question(named, "QUESTION", held)
    if not isinstance(context, list) or not all(isinstance(text, str) for text in context):
        raise ValueError("no list of texts in 'CONTEXTS'")
    if held and all(map(_empty, context)):
        raise ValueError("'CONTEXTS' is empty")
    columns = ("final_decision", "correct_answer", "answer")
    column = next((c for c in columns if c in named), columns[0])
    said = named.get(column)
    gold = said.strip().casefold() if isinstance(said, str) else None
    if gold not in ("yes", "no", "maybe"):
        raise ValueError(f"{column} = {short(said)} is none of yes, no, maybe")
    return Asked(question, context, gold)


def _question(named: dict[str, Any], column: str, held: bool) -> str:
    question = named.get("question")
    if not isinstance(question, str):
        raise ValueError(f"no text in '{column}'")
    if held and _empty(question):
        raise ValueError(f"'{column}' is empty")
    return question


def choices(rows: Sequence[Mapping[str, Any]], published: Sequence[int], held: bool) -> list[Asked]:
    """Rows of a multiple-choice set.

    Args:
        published: what numbers of its golds count from in the files that its authors and the hub
            publish, the hub's first.
        held: whether the rows are of somebody's own file, rather than the hub's.

    Raises:
        RowError: a column is missing or of another type, the gold is no option, two readings of
            the golds fit, or, in somebody's own file, the question or an option is blank: "None",
            the leaderboard's word for a null, would make up an option that real questions have.
    """
    asked: list[tuple[str, _Options, dict[str, Any]]] = []
    for index, row in enumerate(rows):
        try:
            named = _named(row)
            asked.append((_question(named, "question", held), _options(named, held), named))
        except ValueError as err:
            raise RowError(index, f"{err}; {_CHOICE}") from None
    answers = [(options, named) for _, options, named in asked]
    columns = [c for c in (*_NUMBERED, *_WORDED) if any(not _empty(n.get(c)) for _, n in answers)]
    golds = _golds(answers, columns, published, held)
    return [
        Asked(question, options, LETTERS[gold])
        for (question, options, _), gold in zip(asked, golds, strict=True)
    ]


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's columns under lower-case names; NaN, which stands for null, as None.

    Raises:
        ValueError: two columns with one such name say different things.
    """
    inner = row.get("data")
    found: dict[str, Any] = {}
    for name, value in ({**row, **inner} if isinstance(inner, dict) else row).items():
        key = name.casefold().replace(" ", "_")
        if _empty(found.get(key)):
            found[key] = None if value != value else value
        elif not _empty(value) and value != found[key]:
            raise ValueError(f"more than one column '{key}', and they differ")
    return found


def short(value: Any) -> str:
    """A value as a message shows it, in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _options(named: dict[str, Any], held: bool) -> _Options:
    """A to E in their order. Raises ValueError: what is not as wanted."""
    names = [f"option {letter}" for letter in LETTERS]
    given = named.get("options", named.get("choices"))
    if given is None:
        group = next((g for g in _GROUPS if g[0] in named), None)
        if not group:
            raise ValueError("no column 'options'")
        columns = [c for c in group if c in group[:4] or c in named]
        if lacking := [c for c in columns if c not in named]:
            raise ValueError(f"no column '{lacking[0]}'")
        names, options = columns, [named[c] for c in columns]
    elif isinstance(given, dict):
        options = _by_letter([*given.items()])
    elif isinstance(given, list) and given and all(isinstance(o, dict) for o in given):
        if any(not {"key", "value"} <= o.keys() for o in given):
            raise ValueError("no 'key' and 'value' in each of 'options'")
        options = _by_letter([(o["key"], o["value"]) for o in given])
    elif isinstance(given, list):
        options = given
    else:
        raise ValueError("'options' is no list or object")
    # A table has null, or pandas "", where other rows have one option more.
    options = options[:4] if len(options) == 5 and _empty(options[4]) else options
    if any(isinstance(o, list | dict | bytes) for o in options):
        raise ValueError("an option is no text")
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options")
    texts = [_own_text(option, index) for index, option in enumerate(options)]
    if held and None not in texts:  # the prompt puts the letters before them
        options = texts
    blank = next((n for n, o in zip(names, options, strict=False) if _empty(o)), None)
    if held and blank:
        raise ValueError(f"{blank} is empty")
    return options


def _own_text(text: Any, index: int) -> str | None:
    """Of "B. text", "B) text" and "(B) text" the text, where B is option ``index``; else None."""
    found = _LETTERED.fullmatch(text) if isinstance(text, str) else None
    return found[3].strip() if found and found[2].upper() == LETTERS[index] else None


def _by_letter(pairs: list[tuple[Any, Any]]) -> _Options:
    of_key = {str(key).strip().upper(): value for key, value in pairs}
    if sorted(of_key) != list(LETTERS[: len(pairs)]):
        raise ValueError("the keys of 'options' are not A, B, C and so on, each once")
    return [of_key[key] for key in sorted(of_key)]


def _golds(
    asked: list[tuple[_Options, dict[str, Any]]],
    columns: list[str],
    published: Sequence[int],
    held: bool,
) -> list[int]:
    """Of each row the index of the option that all these columns name. Raises RowError."""
    counts = [*published, *({0, 1} - set(published))] if held else published[:1]
    meanings = [[_TEXT, *counts] if c in _WORDED else counts for c in columns]
    read = {
        way: [_gold(options, named, columns, way) for options, named in asked]
        for way in product(*meanings)
    }
    whole = {way: golds for way, golds in read.items() if None not in golds}
    if not whole and not held and columns[1:]:  # the leaderboard looks at the text alone
        return _golds(asked, columns[-1:], published, held)
    if not whole:
        way = max(read, key=lambda w: len(asked) - read[w].count(None))
        index = read[way].index(None)
        raise RowError(index, f"{_why_not(*asked[index], columns, way)}; {_CHOICE}")
    if len({tuple(golds) for golds in whole.values()}) > 1 and held:
        as_published = [w for w in whole if set(w) <= {_TEXT, *published}]
        whole = {w: whole[w] for w in as_published} or whole
        if len({tuple(golds) for golds in whole.values()}) > 1:
            raise _untold(asked, columns, list(whole.values()))
    return [gold for gold in next(iter(whole.values())) if gold is not None]


def _empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _gold(
    options: _Options, named: dict[str, Any], columns: list[str], way: Sequence[int]
) -> int | None:
    """The option that all the row's golds name, the first if they are several equal ones."""
    sets = [
        _meant(named.get(column), options, meaning)
        for column, meaning in zip(columns, way, strict=True)
        if not _empty(named.get(column))
    ]
    return min(set.intersection(*sets), default=None) if sets else None


def _meant(value: Any, options: _Options, meaning: int) -> set[int]:
    """Indices of the options that a gold names, if it is a text or counts from ``meaning``."""
    if meaning == _TEXT:
        texts = ["" if o is None else str(o) for o in options]
        said = str(value)
        same = {i for i, text in enumerate(texts) if text == said}
        return same or {
            i for i, t in enumerate(texts) if t.strip() in (said.strip(), _own_text(said, i))
        }
    index = _number(value)
    if index is not None:
        index -= meaning
    elif isinstance(value, str) and len(value.strip()) == 1:
        index = LETTERS.find(value.strip().upper())
    return {index} if index is not None and 0 <= index < len(options) else set()


def _number(value: Any) -> int | None:
    """Of 2, 2.0, "2" and "2.0"; None of anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and not isinstance(value, bool) else None


def _why_not(
    options: _Options, named: dict[str, Any], columns: list[str], way: Sequence[int]
) -> str:
    given = {c: m for c, m in zip(columns, way, strict=True) if not _empty(named.get(c))}
    if not given:
        return f"no answer in {' or '.join(map(repr, columns or ['answer_idx']))}"
    said = {c: f"{c} = {short(named[c])}" for c in given}
    for column, meaning in given.items():
        if not _meant(named[column], options, meaning):
            number = _number(named[column])
            if number is not None and number < 0:
                return (
                    f"{said[column]} is no answer (a test split's golds are kept back; MedMCQA has "
                    "them in its validation split)"
                )
            since = f", counted from {meaning}" if number is not None and meaning != _TEXT else ""
            return f"{said[column]} is none of its {len(options)} options{since}"
    return f"{' and '.join(said.values())} are not the same option"


def _untold(
    asked: list[tuple[_Options, dict[str, Any]]], columns: list[str], golds: list[list[int | None]]
) -> RowError:
    index = next(i for i, of_row in enumerate(zip(*golds, strict=True)) if len(set(of_row)) > 1)
    letters = " or ".join(
        sorted({LETTERS[g] for of_row in golds if (g := of_row[index]) is not None})
    )
    for column in columns:
        value = asked[index][1].get(column)
        if _number(value) is not None:
            numbers = [n for _, named in asked if (n := _number(named.get(column))) is not None]
            return RowError(
                index,
                f"{column} = {short(value)} is {letters}: with {min(numbers)} to {max(numbers)} "
                f"in the file it may count from 0 or from 1; write letters, A to D, in '{column}'",
            )
    value = asked[index][1].get(columns[-1])
    return RowError(
        index,
        f"{columns[-1]} = {short(value)} is {letters}: an option's letter and another one's text; "
        "write the letter in 'answer_idx' beside it",
    )
