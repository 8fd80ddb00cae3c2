"""This site's question/answer rows, from its own folder.

Messages about a data file carry its name, line numbers and counts, never its text.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
COLUMNS = ("instruction", "input", "output")
SUFFIXES = (".jsonl", ".json", ".parquet")


class SiteError(Exception):
    """Something at this site that stops it from taking part; safe to send to the server."""


@dataclass(frozen=True)
class Row:
    """One question and its answer."""

    question: str
    answer: str


def data_file(site_dir: Path, part: str) -> Path | None:
    """The file ``data/<part>.{jsonl,json,parquet}`` of this site, or None.

    Raises:
        SiteError: there are several.
    """
    found = [p for s in SUFFIXES if (p := site_dir / "data" / f"{part}{s}").is_file()]
    if len(found) > 1:
        names = " and ".join(p.name for p in found)
        raise SiteError(f"data/: {names} are both there; keep one")
    return found[0] if found else None


def load(site_dir: Path, part: str) -> list[Row]:
    """Rows of ``data/train.*`` or ``data/holdout.*``; empty answers and repeats are left out.

    Of the held-out rows also those whose question the site trains on: that would be scored as
    known by heart. A site without a holdout file gets an empty list; it then takes no part in
    evaluation.

    Raises:
        SiteError: no training file, a bad line (numbered from 1), or no usable row.
    """
    path = data_file(site_dir, part)
    if path is None:
        if part == "train":
            raise SiteError(
                "data/: no train.jsonl, train.json or train.parquet; put the site's "
                "question/answer file there or run supernode.prepare"
            )
        return []
    rows = _rows(path)
    if not rows and part == "train":
        raise SiteError(f"data/{path.name}: no row with a question and an answer")
    trained_on = data_file(site_dir, "train") if rows and part == "holdout" else None
    if trained_on:
        known = {row.question for row in _rows(trained_on)}
        all_rows, rows = rows, [row for row in rows if row.question not in known]
        if both := len(all_rows) - len(rows):
            logger.warning(
                "data/%s: %d of %d rows ask what data/%s asks too; they are not scored as held-out",
                path.name, both, len(all_rows), trained_on.name,
            )  # fmt: skip
    return rows


def _rows(path: Path) -> list[Row]:
    rows: dict[Row, None] = {}  # a dict keeps the order and drops repeats
    for where, record in _records(path):
        for column in COLUMNS:
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                raise SiteError(
                    f"data/{path.name}, {where}: no text in column '{column}' "
                    f"(each row needs {', '.join(COLUMNS)})"
                )
        # The flashcards keep the question in `input`; Alpaca rows may have an instruction only.
        question = record["input"].strip() or record["instruction"].strip()
        answer = record["output"].strip()
        try:
            (question + answer).encode()
        except UnicodeEncodeError:  # JSON can say it, and no tokenizer takes it
            raise SiteError(
                f"data/{path.name}, {where}: half a character (\\ud800 to \\udfff without its pair)"
            ) from None
        if question and answer:
            rows[Row(question, answer)] = None
    return list(rows)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place in the file, parsed record) of each row."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq  # 0.2 s and 30 MB: only where the file needs it

        try:
            records = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as err:
            raise SiteError(f"data/{path.name}: not a readable parquet file") from err
        yield from ((f"row {i}", r) for i, r in enumerate(records, 1))
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise SiteError(f"data/{path.name}: cannot be read ({err.strerror})") from None
    except UnicodeDecodeError as err:
        raise SiteError(f"data/{path.name}: not UTF-8 (byte {err.start})") from None
    if path.suffix == ".json":
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as err:  # also a number too long, nesting too deep
            line = f", line {err.lineno}" if isinstance(err, json.JSONDecodeError) else ""
            raise SiteError(f"data/{path.name}{line}: not valid JSON") from None
        if not isinstance(records, list):
            raise SiteError(f"data/{path.name}: not a JSON array of rows")
        yield from ((f"row {i}", r) for i, r in enumerate(records, 1))
        return
    # Not splitlines(): a text may hold U+2028, which is no line end in JSONL.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError):
                raise SiteError(f"data/{path.name}, line {number}: not valid JSON") from None
