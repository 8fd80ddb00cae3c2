"""Files of benchmark rows, in the layouts that people hold: which file, and its rows."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.site.row_files import RowsError, check_head, decoded
from eval import EvalError

Row = Mapping[str, Any]

KINDS = (".json", ".jsonl", ".parquet")
TRUTH = "test_ground_truth.json"
_ALSO = {"pubmedqa": "|pqal"}  # its authors' ori_pqal.json
# Names of columns, so that an object with one of them is a row, or a column is under each name.
_OF_A_ROW = ("question", "prompt", "gold", "data")


def find(data_dir: Path, dataset: str) -> Path:
    """The one file of the folder whose name has the set's name as a word.

    Raises:
        EvalError: no folder, no file, or more than one.
    """
    if not data_dir.is_dir():
        raise EvalError(f"--data-dir: no folder {data_dir}")
    names = re.escape(dataset) + _ALSO.get(dataset, "")
    word = re.compile(rf"(?<![a-z0-9])({names})(?![a-z0-9])", re.IGNORECASE)
    files = [p for p in sorted(data_dir.iterdir()) if p.suffix.lower() in KINDS]
    found = [p for p in files if word.search(p.stem)]
    if len(found) == 1:
        return found[0]
    said = " and ".join(p.name for p in found) or f"no {dataset}.jsonl, .json or .parquet"
    raise EvalError(f"--data-dir {data_dir}: {said}; one file is needed for {dataset}")


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Every row with its place ("line 3", "row 3").

    A file is parquet, JSONL, or JSON: an array of rows, an object around one, rows by a key
    (which a row then has as ``pmid``), or columns as pandas writes them.

    Raises:
        EvalError: the file cannot be read, or a line is no JSON object.
    """
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise EvalError(f"cannot read {path}: {err.strerror}") from None
    try:
        check_head(str(path), raw)
        parquet = path.suffix.lower() == ".parquet"
        values = _parquet(path, raw) if parquet else _json(path, _text(path, raw))
    except RowsError as err:
        raise EvalError(str(err)) from None
    for place, value in values:
        if not isinstance(value, dict):
            raise EvalError(f"{path}, {place}: not a JSON object")
        yield place, value


def _text(path: Path, raw: bytes) -> str:
    return decoded(str(path), raw).replace("\r\n", "\n").replace("\r", "\n")


def _parquet(path: Path, raw: bytes) -> list[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        raise EvalError(f"{path} is no parquet file of UTF-8 texts") from None
    return _numbered(rows)


def _numbered(rows: list[Any]) -> list[tuple[str, Any]]:
    return [(f"row {n}", row) for n, row in enumerate(rows, 1)]


def _json(path: Path, text: str) -> list[tuple[str, Any]]:
    """The rows of a text, whatever the file's suffix says."""
    # Not splitlines(): a text may hold U+2028, which is no line end in JSONL.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    values = [(f"line {n}", _value(line)) for n, line in lines]
    if len(values) > 1 and values[0][1] and not text.lstrip().startswith("["):
        if broken := next((place for place, value in values if not value), None):
            raise EvalError(f"{path}, {broken}: not JSON")
        return [(place, value[0]) for place, value in values if value]
    try:
        whole = json.loads(text) if lines else []
    except (ValueError, RecursionError) as err:
        line = getattr(err, "lineno", 1)
        if any(value and isinstance(value[0], dict) for _, value in values):  # so it is lines
            line = lines[0][0]
        raise EvalError(f"{path}, line {line}: not JSON") from None
    if isinstance(whole, list):
        return _numbered(whole)
    around = _around(path, whole) if isinstance(whole, dict) else None
    return [(f"line {lines[0][0]}", whole)] if around is None else _numbered(around)


def _value(line: str) -> tuple[Any] | None:
    """What the line says, or None where it is not JSON."""
    try:
        return (json.loads(line),)
    except (ValueError, RecursionError):
        return None


def _around(path: Path, whole: dict[str, Any]) -> list[Any] | None:
    """The rows in an object of many; None where it is a row itself.

    Raises:
        EvalError: it has more than one array of rows, or columns of other lengths.
    """
    named = {name.casefold(): value for name, value in whole.items()}
    columns = all(isinstance(value, list | dict) for value in named.values())
    if columns and named.keys() & {"question", "prompt"}:
        keys = [list(c) if isinstance(c, dict) else list(range(len(c))) for c in whole.values()]
        if any(k != keys[0] for k in keys):
            raise EvalError(f"{path}: its columns are not of one length; one row a line is wanted")
        return [{name: column[key] for name, column in whole.items()} for key in keys[0]]
    arrays = {n: v for n, v in whole.items() if isinstance(v, list) and _are_rows(v)}
    if len(arrays) > 1 and not named.keys() & {"question", "prompt"}:
        raise EvalError(
            f"{path}: which of {', '.join(map(repr, arrays))}? One array of rows is wanted"
        )
    if named.keys() & set(_OF_A_ROW) and not (len(arrays) == 1 and "data" in arrays):
        return None
    if arrays:
        return next(iter(arrays.values()))
    if whole and _are_rows(list(whole.values())):
        return [{"pmid": key} | row for key, row in whole.items()]
    return None


def _are_rows(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def authors_test_set(data_dir: Path, rows: list[tuple[str, Row]]) -> list[tuple[str, Row]] | None:
    """Of PubMedQA's 1,000 labelled abstracts the 500 that its authors test on.

    They are named in their ``test_ground_truth.json``; None where it does not lie in the folder,
    or the rows have no PMID.

    Raises:
        EvalError: it cannot be read, names an abstract that is not among the rows, or answers one
            otherwise.
    """
    path = data_dir / TRUTH
    of_pmid = {str(r.get("pmid") or r.get("pubid")): n for n, (_, r) in enumerate(rows)}
    if not path.is_file() or not any(pmid.isdigit() for pmid in of_pmid):
        return None
    truth = dict(next(iter(read_rows(path)), ("", {}))[1])
    if missing := [pmid for pmid in truth if pmid not in of_pmid]:
        raise EvalError(f"{path}: {len(missing)} of its {len(truth)} are not in the file beside it")
    answers = {of_pmid[pmid]: answer for pmid, answer in truth.items()}
    for number, answer in answers.items():
        place, row = rows[number]
        if str(row.get("final_decision")).casefold() != str(answer).casefold():
            raise EvalError(f"{path}: another answer than the file beside it has in {place}")
    return [rows[number] for number in sorted(answers)]
