"""Records out of the files that programs write: JSON, lines of it, CSV, parquet.

What a record says is for ``app.site.rows``. No type is guessed: null and missing are empty, a
number is the text that stands in the file. Messages carry a file's name, line numbers and counts,
never its text. Imports nothing of ours, neither torch nor datasets, as ``app.site.rows`` says.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_FLOATS = "halffloat", "float", "double"
_RESAVE = "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8)"
_WEB_PAGE = "a web page, not the file; download it again, logged in if it asks for that"
_NO_ROWS = {  # what a file begins with, in small letters -> what it is
    b"version https://git-lfs": "a Git LFS pointer, not the file; run git lfs pull there",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"pk\x03\x04": "a zip archive or an Excel file; unpack it, or save the table as text",
    b"\x1f\x8b": "compressed with gzip; unpack it",
}
TWICE = object()  # the value of a column that a record has twice


class RowsError(Exception):
    """The file cannot be read as rows; one line without a word of its text.

    ``columns``: that it has, where it lacks one. Their names may be somebody's text as well.
    """

    def __init__(self, message: str, columns: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.columns = list(columns)


class BadRowError(Exception):
    """Why a row cannot be taken."""


def suffix(path: Path) -> str:
    """As in SUFFIXES, in whatever case it is written; empty where it is none of them."""
    found = path.suffix.lower()
    return found if found in SUFFIXES else ""


def records(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(place in the file, record) of each row; a BadRowError in the place of one that is none.

    The names of a record's columns are in small letters. Raises RowsError.
    """
    kind = suffix(path)
    if not kind:
        raise RowsError(f"{name}: one of {', '.join(SUFFIXES)} is needed")
    if kind == ".parquet":
        found = _parquet(name, path)
    else:
        text = decoded(name, _raw(name, path))
        array = text.lstrip().startswith("[")
        found = (
            _csv(text) if kind == ".csv" else (_array(name, text) if array else _lines(text, kind))
        )
    yield from found


def _record(columns: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in columns:
        key = name.strip().casefold()
        found[key] = TWICE if key in found else value
    return found


def _raw(name: str, path: Path, size: int = -1) -> bytes:
    """The file's bytes, or the first of them. Raises RowsError: it is none with rows in it."""
    try:
        with path.open("rb") as file:
            raw = file.read(size)
    except OSError as err:
        raise RowsError(f"{name}: cannot be read ({err.strerror})") from None
    check_head(name, raw)
    return raw


def check_head(name: str, raw: bytes) -> None:
    """Raises RowsError: by how it begins, the file is one that holds no rows."""
    head = raw[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for start, what in _NO_ROWS.items():
        if head.startswith(start):
            raise RowsError(f"{name}: {what}")


def _parquet(name: str, path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet as pq  # 0.2 s and 30 MB: only where the file needs it

    _raw(name, path, 64)
    try:
        table = pq.read_table(path)
        # A float in parquet has no text: 5, not 5.0, as whole numbers beside nulls become floats.
        texts = [c.cast("string") if str(c.type) in _FLOATS else c for c in table.columns]
        columns = [(c, t.to_pylist()) for c, t in zip(table.column_names, texts, strict=True)]
    except (OSError, ValueError, pyarrow.ArrowException):  # its words may be the file's
        raise RowsError(f"{name}: not a readable parquet file") from None
    for i in range(table.num_rows):
        yield f"row {i + 1}", _record((c, values[i]) for c, values in columns)


def decoded(name: str, raw: bytes) -> str:
    """In UTF-8, 16 or 32. Raises RowsError: it is not, with line and byte."""
    # By its mark, or by where the first characters have zeros. Not utf-8-sig, which would count the
    # bytes of a mistake from behind the mark.
    coding = json.detect_encoding(raw).removesuffix("-sig")
    try:
        return raw.decode(coding).lstrip("\ufeff")
    except UnicodeDecodeError as err:
        raise RowsError(
            f"{name}, line {raw.count(10, 0, err.start) + 1}, byte {err.start} "
            f"(0x{raw[err.start]:02x}): not {coding.upper()}; {_RESAVE}"
        ) from None


def _csv(text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    header = next(iter(text.lstrip("\r\n").splitlines()), "")
    told = re.fullmatch('"?sep=(.)"?[,;\t]*', header, re.IGNORECASE)  # Excel's own first line
    delimiter = told[1] if told else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error:
            yield f"line {start}", BadRowError("not valid CSV")
            return
        if fields is None:
            return
        if told and fields:
            told = None
        elif not columns:
            columns = fields
        elif fields and len(fields) != len(columns) and "".join(fields).strip():
            yield f"line {start}", BadRowError(f"{len(fields)} fields, and {len(columns)} columns")
        elif len(fields) == len(columns):
            yield f"line {start}", _record(zip(columns, fields, strict=True))
        start = reader.line_num + 1


def _json(text: str) -> Any:
    """Numbers stay the text that they are. Raises ValueError, RecursionError."""
    return json.loads(
        text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_record
    )


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
    for number, line in enumerate(re.split("\r\n?|\n", text), 1):
        line = line.strip().removeprefix("\ufeff")  # files with marks, joined
        if line:
            try:
                record = _json(line)
            except (ValueError, RecursionError):
                record = BadRowError("not valid JSON")
            yield f"line {number}", record
