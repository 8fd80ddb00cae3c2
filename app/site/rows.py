"""Question/answer rows out of files: the one reader, for a site's own file and for the data set
that ``supernode.prepare`` splits.

It stands here because the app travels without the rest. The supernode's image, which has no app of
its own, gets this file and ``row_files`` (docker/Dockerfile), without an ``__init__.py``: a
namespace package never hides the app that a run brings. So they import nothing else of ours,
neither torch nor datasets. Messages carry a file's name, line numbers and counts, never its text.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.site.row_files import TWICE, BadRowError, RowsError, records

VERSION = 3  # of what comes out: partitions that another one made are made anew
FORMS = "instruction, input, output; question, answer; or messages"
SHOWN = 10  # bad rows that are named
# What stands where there is nothing, without brackets and signs between the letters. "None" is an
# answer, though, to some questions.
_NO_ANSWERS = {"", "noinput", "nooutput", "n/a", "#n/a", "n.a.", "nan", "null"}
_NO_QUESTIONS = _NO_ANSWERS | {"none", "none."}
_PREPARED = ["instruction", "input", "output"]  # the columns that supernode.prepare writes
_Texts = tuple[str, str, str]  # instruction, input, answer


@dataclass(frozen=True)
class Row:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Table:
    """What files hold: ``rows`` with question and answer, in their order, each once."""

    rows: list[Row]
    classes: list[str]  # of the rows, by the column asked for
    read: int
    empty: int  # without a question or an answer
    repeated: int  # the same question and answer again
    left_out: str | None  # the instruction that all rows share
    columns: list[str]


def read(
    files: Mapping[str, Path],
    columns: str = "",
    class_column: str = "",
    like: Table | None = None,
    at_site: bool = False,
) -> Table:
    """The rows of these files, as one.

    An instruction that is the same in all rows beside an input is no part of the questions (the
    flashcards' "Answer this question truthfully"); else question and input are both in it.

    Args:
        files: by the name that messages give them.
        columns: "QUESTION,ANSWER", names of the two columns, where a file has those.
        class_column: a column whose texts are asked for as well.
        like: rows that these are held out from: whose shared instruction is left out here too.
        at_site: a file that prepare wrote is read as it stands, whatever ``columns`` says.

    Raises:
        RowsError: a file cannot be read, or holds bad rows: all are counted, some named.
    """
    found = [(name, *r) for name, path in files.items() for r in records(name, path)]
    names = dict.fromkeys(k for *_, r in found if isinstance(r, dict) for k in r)
    called = " and ".join(files)
    if at_site and columns and _as_prepared([r for *_, r in found], columns, called):
        columns = ""
    form = _form(list(names), columns, called) if names else _alpaca
    kept: list[tuple[_Texts, str]] = []
    bad: list[tuple[str, str, str]] = []  # file, place, why
    for name, place, record in found:
        try:
            texts = _texts(record, form)
            if not texts[2] and not columns:  # of another form than most, in files put together
                others = (_texts(record, f) for f in _FORMS)
                texts = next((t for t in others if any(t[:2]) and t[2]), texts)
            of_class = _text(record, class_column.strip().casefold()) if class_column else ""
            if _bare(of_class.strip()) in _NO_ANSWERS:
                of_class = ""
            if any(texts[:2]) and texts[2]:
                kept.append((texts, of_class))
        except BadRowError as err:
            bad.append((name, place, str(err)))
    if bad:
        raise RowsError(_named(bad))
    shared = {instruction for (instruction, _, _), _ in kept}
    one = len(shared) == 1 < len(kept)  # a single row shares nothing
    left_out = like.left_out if like else (shared.pop() if one else None)
    rows: dict[Row, str] = {}  # a dict keeps the order and drops repeats
    for (instruction, given, answer), of_class in kept:
        parts = [given] if given and instruction == left_out else [instruction, given]
        rows.setdefault(Row("\n".join(filter(None, parts)), answer), of_class)
    return Table(
        list(rows), list(rows.values()), len(found), len(found) - len(kept),
        len(kept) - len(rows), left_out, list(names),
    )  # fmt: skip


def _named(bad: list[tuple[str, str, str]]) -> str:
    if len(bad) == 1:
        return "{}, {}: {}".format(*bad[0])
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, place, why in bad[:SHOWN]:
        reasons.setdefault((name, why), []).append(place)
    shown = "; ".join(f"{n}, {', '.join(places)}: {why}" for (n, why), places in reasons.items())
    return (
        f"{len(bad)} rows cannot be taken{', the first ten' if len(bad) > SHOWN else ''}: {shown}"
    )


def _as_prepared(records: list[Any], columns: str, called: str) -> bool:
    """Whether supernode.prepare wrote these rows: its three columns, nothing in the first.

    It took question and answer by DATA_COLUMNS then; to do that again could swap the two. The form
    tells, not a checksum: a site may correct the file, and has no manifest. Raises RowsError: some
    rows are of it, some not, so that it matters which of the two is right.
    """
    rows = [r for r in records if isinstance(r, dict)]
    ours = len([r for r in rows if list(r) == _PREPARED and r["instruction"] == ""])
    pair = _pair(columns)
    if 0 < ours < len(rows) and pair != _PREPARED[1:] and any(c in r for r in rows for c in pair):
        raise RowsError(
            f"{called}: {ours} rows as supernode.prepare wrote them, the question in 'input', and "
            f"{len(rows) - ours} others; take DATA_COLUMNS out, or keep rows of one kind"
        )
    return 0 < ours == len(rows)


def _pair(columns: str) -> list[str]:
    return [c.strip().casefold() for c in columns.split(",")]


def _form(names: list[str], columns: str, called: str) -> Callable[[dict[str, Any]], _Texts]:
    """How to read a record with these columns. Raises RowsError: it cannot be told."""
    if columns:
        pair = _pair(columns)
        if len(set(pair)) != 2 or not all(pair) or len(pair) != 2:
            raise RowsError(f"DATA_COLUMNS={columns}: two names are needed, QUESTION,ANSWER")
        if lacking := [f"'{c}'" for c in pair if c not in names]:
            if set(names) == {"instruction", "input", "output"}:  # prepare made it of such a file
                return _alpaca
            raise RowsError(f"{called}: no column {' nor '.join(lacking)} (DATA_COLUMNS)", names)
        return lambda record: ("", _text(record, pair[0]), _text(record, pair[1]))
    if "output" in names and {"instruction", "input"} & set(names):
        return _alpaca
    if {"question", "answer"} <= set(names):
        return _asked
    if "messages" in names:
        return _chat
    column = "instruction" if "output" in names else "output"
    raise RowsError(
        f"{called}: no column '{column}'; a file is an array of rows, or one row a line, with the "
        f"columns {FORMS}; or DATA_COLUMNS=QUESTION,ANSWER names two others",
        names,
    )


def _alpaca(record: dict[str, Any]) -> _Texts:
    return _text(record, "instruction"), _text(record, "input"), _text(record, "output")


def _asked(record: dict[str, Any]) -> _Texts:
    return _text(record, "instruction"), _text(record, "question"), _text(record, "answer")


def _chat(record: dict[str, Any]) -> _Texts:
    """One question and one answer, behind a system's turn or not."""
    turns = record.get("messages") or []
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise BadRowError("no list of turns in column 'messages'")
    said = {str(turn.get("role")).strip().lower(): _text(turn, "content") for turn in turns}
    roles = list(said) if len(said) == len(turns) else []
    if turns and roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise BadRowError("'messages' is not one turn of the user and one of the assistant")
    return said.get("system", ""), said.get("user", ""), said.get("assistant", "")


_FORMS = _alpaca, _asked, _chat


def _texts(record: Any, form: Callable[[dict[str, Any]], _Texts]) -> _Texts:
    """What the row says; empty what is a placeholder. Raises BadRowError."""
    if isinstance(record, BadRowError):
        raise record
    if not isinstance(record, dict):
        raise BadRowError("not an object of columns, as the rows of an array or of lines are")
    instruction, given, answer = map(str.strip, form(record))
    return (
        "" if _bare(instruction) in _NO_QUESTIONS else instruction,
        "" if _bare(given) in _NO_QUESTIONS else given,
        "" if _bare(answer) in _NO_ANSWERS else answer,
    )


def _bare(text: str) -> str:
    """Without brackets around it, and without spaces and dashes: "<No-input>", "[no_input]".

    All of the text: a note may begin with a ruled line. "Na" is an answer, but as these two write
    nothing, pandas and Postgres, it is none.
    """
    if text in ("<NA>", "\\N"):
        return ""
    return re.sub(r"[\s_-]", "", text).lstrip("<[({").rstrip(">])}").casefold()


def _text(record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if value is TWICE:
        raise BadRowError(f"column '{column}' is there twice")
    if isinstance(value, bool):
        value = json.dumps(value)
    elif isinstance(value, list | dict | bytes):
        raise BadRowError(f"no text in column '{column}'")
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say it, and no tokenizer takes it
        raise BadRowError("half a character (\\ud800 to \\udfff without its pair)") from None
    return text
