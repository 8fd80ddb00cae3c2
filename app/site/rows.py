"""Question/answer rows out of files: the one reader, for a site's own file and for the data set
that ``supernode.prepare`` splits.

It stands here because the app travels without the rest. The supernode's image, which has no app of
its own, gets this one file (docker/Dockerfile), without an ``__init__.py``: a namespace package
never hides the app that a run brings. So it imports nothing of ours, neither torch nor datasets.

No type is guessed: null and missing are empty, a number or a date is the text that stands in the
file. Messages carry a file's name, line numbers and counts, never its text.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1  # of what comes out: partitions that another one made are made anew
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
FORMS = "instruction, input, output; question, answer; or messages"
SHOWN = 10  # bad rows that are named
# What stands where there is nothing. "None" is an answer, though, to some questions.
_NO_ANSWERS = {"", "<noinput>", "<no input>", "<nooutput>", "n/a", "nan", "null"}
_NO_QUESTIONS = _NO_ANSWERS | {"none"}
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"} | {
    b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16",
}  # fmt: skip
_FLOATS = "halffloat", "float", "double"
_RESAVE = "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, or -f UTF-16)"
_Texts = tuple[str, str, str]  # instruction, input, answer


class RowsError(Exception):
    """The file cannot be read as rows; one line without a word of its text.

    ``columns``: that it has, where it lacks one. Their names may be somebody's text as well.
    """

    def __init__(self, message: str, columns: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.columns = list(columns)


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


class _BadError(Exception):  # why a row cannot be taken
    pass


def suffix(path: Path) -> str:
    """As in SUFFIXES, in whatever case it is written; empty where it is none of them."""
    found = path.suffix.lower()
    return found if found in SUFFIXES else ""


def read(
    files: Mapping[str, Path], columns: str = "", class_column: str = "", like: Table | None = None
) -> Table:
    """The rows of these files, as one.

    An instruction that is the same in all rows beside an input is no part of the questions (the
    flashcards' "Answer this question truthfully"); else question and input are both in it.

    Args:
        files: by the name that messages give them.
        columns: "QUESTION,ANSWER", names of the two columns, where a file has those.
        class_column: a column whose texts are asked for as well.
        like: rows that these are held out from: whose shared instruction is left out here too.

    Raises:
        RowsError: a file cannot be read, or holds bad rows: all are counted, some named.
    """
    records = [(name, *r) for name, path in files.items() for r in _records(name, path)]
    names = dict.fromkeys(k for *_, r in records if isinstance(r, dict) for k in r)
    form = _form(list(names), columns, " and ".join(files)) if names else _alpaca
    kept: list[tuple[_Texts, str]] = []
    bad: list[tuple[str, str, str]] = []  # file, place, why
    for name, place, record in records:
        try:
            texts = _texts(record, form)
            of_class = _text(record, class_column.strip().casefold()) if class_column else ""
            if any(texts[:2]) and texts[2]:
                kept.append((texts, of_class))
        except _BadError as err:
            bad.append((name, place, str(err)))
    if bad:
        raise RowsError(_named(bad))
    shared = {instruction for (instruction, _, _), _ in kept}
    left_out = like.left_out if like else (shared.pop() if len(shared) == 1 else None)
    rows: dict[Row, str] = {}  # a dict keeps the order and drops repeats
    for (instruction, given, answer), of_class in kept:
        parts = [given] if given and instruction == left_out else [instruction, given]
        rows.setdefault(Row("\n".join(filter(None, parts)), answer), of_class)
    return Table(
        list(rows), list(rows.values()), len(records), len(records) - len(kept),
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


def _form(names: list[str], columns: str, called: str) -> Callable[[dict[str, Any]], _Texts]:
    """How to read a record with these columns. Raises RowsError: it cannot be told."""
    if columns:
        pair = [c.strip().casefold() for c in columns.split(",")]
        if len(pair) != 2 or not all(pair):
            raise RowsError(f"DATA_COLUMNS={columns}: two names are needed, QUESTION,ANSWER")
        if set(pair) <= set(names):  # else perhaps what prepare has made of such a file
            return lambda record: ("", _text(record, pair[0]), _text(record, pair[1]))
    if "output" in names and {"instruction", "input"} & set(names):
        return _alpaca
    if {"question", "answer"} <= set(names):
        return lambda r: (_text(r, "instruction"), _text(r, "question"), _text(r, "answer"))
    if "messages" in names:
        return _chat
    lacking = "instruction" if "output" in names else "output"
    raise RowsError(
        f"{called}: no column '{lacking}'; a file is an array of rows, or one row a line, with the "
        f"columns {FORMS}; or DATA_COLUMNS=QUESTION,ANSWER names two others",
        names,
    )


def _alpaca(record: dict[str, Any]) -> _Texts:
    return _text(record, "instruction"), _text(record, "input"), _text(record, "output")


def _chat(record: dict[str, Any]) -> _Texts:
    """One question and one answer, behind a system's turn or not."""
    turns = record.get("messages") or []
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise _BadError("no list of turns in column 'messages'")
    said = {str(turn.get("role")): _text(turn, "content") for turn in turns}
    roles = list(said) if len(said) == len(turns) else []
    if turns and roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise _BadError("'messages' is not one turn of the user and one of the assistant")
    return said.get("system", ""), said.get("user", ""), said.get("assistant", "")


def _texts(record: Any, form: Callable[[dict[str, Any]], _Texts]) -> _Texts:
    """What the row says; empty what is a placeholder. Raises _BadError."""
    if isinstance(record, _BadError):
        raise record
    if not isinstance(record, dict):
        raise _BadError("not an object of columns, as the rows of an array or of lines are")
    instruction, given, answer = map(str.strip, form(record))
    return (
        "" if instruction.casefold() in _NO_QUESTIONS else instruction,
        "" if given.casefold() in _NO_QUESTIONS else given,
        "" if answer.casefold() in _NO_ANSWERS else answer,
    )


def _text(record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if isinstance(value, bool):
        value = json.dumps(value)
    elif isinstance(value, list | dict | bytes):
        raise _BadError(f"no text in column '{column}'")
    text = "" if value is None else str(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can say it, and no tokenizer takes it
        raise _BadError("half a character (\\ud800 to \\udfff without its pair)") from None
    return text


def _records(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(place in the file, record) of each row; a _BadError in the place of one that is none."""
    kind = suffix(path)
    if not kind:
        raise RowsError(f"{name}: one of {', '.join(SUFFIXES)} is needed")
    if kind == ".parquet":
        found = _parquet(name, path)
    else:
        text = _decoded(name, path)
        array = text.lstrip().startswith("[")
        found = (
            _csv(text) if kind == ".csv" else (_array(name, text) if array else _lines(text, kind))
        )
    for place, record in found:
        named = isinstance(record, dict)
        yield place, {k.strip().casefold(): v for k, v in record.items()} if named else record


def _parquet(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq  # 0.2 s and 30 MB: only where the file needs it

    try:
        table = pq.read_table(path)
        # A float in parquet has no text: 5, not 5.0, as whole numbers beside nulls become floats.
        texts = [c.cast("string") if str(c.type) in _FLOATS else c for c in table.columns]
        columns = dict(zip(table.column_names, (c.to_pylist() for c in texts), strict=True))
    except (OSError, ValueError):  # its words may be the file's
        raise RowsError(f"{name}: not a readable parquet file") from None
    for i in range(table.num_rows):
        yield f"row {i + 1}", {c: values[i] for c, values in columns.items()}


def _decoded(name: str, path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise RowsError(f"{name}: cannot be read ({err.strerror})") from None
    coding = next((c for bom, c in _BOMS.items() if raw.startswith(bom)), "utf-8")
    if coding == "utf-8" and 0 in raw[:4]:  # UTF-16 or UTF-32 without a mark
        raise RowsError(f"{name}: a zero byte at its start, not UTF-8; {_RESAVE}")
    try:
        return raw.decode(coding)
    except UnicodeDecodeError as err:
        raise RowsError(
            f"{name}, line {raw.count(10, 0, err.start) + 1}, byte {err.start} "
            f"(0x{raw[err.start]:02x}): not {coding.removesuffix('-sig').upper()}; {_RESAVE}"
        ) from None


def _csv(text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error:
            yield f"line {start}", _BadError("not valid CSV")
            return
        if fields is None:
            return
        if not columns:
            columns = fields
        elif fields and len(fields) != len(columns):
            yield f"line {start}", _BadError(f"{len(fields)} fields, and {len(columns)} columns")
        elif fields:
            yield f"line {start}", dict(zip(columns, fields, strict=True))
        start = reader.line_num + 1


def _json(text: str) -> Any:
    """Numbers stay the text that they are. Raises ValueError, RecursionError."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _array(name: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        records = _json(text)
    except (ValueError, RecursionError) as err:  # also nesting too deep
        line = f", line {err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
        raise RowsError(f"{name}{line}: not valid JSON") from None
    return ((f"row {i}", record) for i, record in enumerate(records, 1))


def _lines(text: str, kind: str) -> Iterator[tuple[str, Any]]:
    if kind == ".json":  # perhaps one object over many lines
        try:
            yield "row 1", _json(text)
            return
        except (ValueError, RecursionError):
            pass
    # Not splitlines(): a text may hold U+2028, which is no line end in JSONL.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = _json(line)
            except (ValueError, RecursionError):
                record = _BadError("not valid JSON")
            yield f"line {number}", record
