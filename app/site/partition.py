"""This site's question/answer rows, from its own folder.

Messages about a data file carry its name, line numbers and counts, never its text.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from app.site.last_lines import travels
from app.site.row_files import RowsError, suffix
from app.site.rows import Row as Row
from app.site.rows import Table, read

logger = logging.getLogger(__name__)


class SiteError(Exception):
    """Something at this site that stops it from taking part; safe to send to the server."""


@dataclass(frozen=True)
class Part:
    """The usable rows of a data file, and how many it has besides."""

    name: str  # as messages call the file; empty where there is none
    rows: list[Row]
    read: int = 0
    empty: int = 0  # without a question or an answer
    repeated: int = 0
    known: int = 0  # held-out rows whose question is trained on
    columns: tuple[str, ...] = ()  # of the file; their names may be somebody's text

    def counts(self) -> dict[str, int]:
        names = "read", "empty", "repeated", "known"
        return {name: getattr(self, name) for name in names}


def data_file(site_dir: Path, part: str) -> Path | None:
    """The file ``data/<part>.{jsonl,json,csv,parquet}`` of this site, or None.

    Raises:
        SiteError: there are several.
    """
    near = [p for p in (site_dir / "data").glob("*") if p.name.lower().startswith(f"{part}.")]
    found = sorted(p for p in near if p.stem == part and suffix(p) and p.is_file())
    if len(found) > 1:
        names = " and ".join(p.name for p in found)
        raise SiteError(f"data/: {names} are both there; keep one")
    if near and not found:  # to the site's own log: such a name may be somebody's
        logger.warning(
            "data/: %s not read; the name is %s.jsonl, .json, .csv or .parquet, in small letters",
            " and ".join(sorted(p.name for p in near)), part,
        )  # fmt: skip
    return found[0] if found else None


def load(site_dir: Path, part: str, columns: str = "") -> list[Row]:
    """The rows of ``part_of``."""
    return part_of(site_dir, part, columns).rows


def part_of(site_dir: Path, part: str, columns: str = "") -> Part:
    """``data/train.*`` or ``data/holdout.*``; empty rows and repeats are left out.

    Of the held-out rows also those whose question the site trains on: that would be scored as
    known by heart. A site without a holdout file has none; it then takes no part in evaluation.

    Args:
        columns: DATA_COLUMNS, as ``app.site.rows`` takes them.

    Raises:
        SiteError: no training file, bad lines (numbered from 1), or no usable row.
    """
    trained_on = data_file(site_dir, "train")
    if part == "train" and not trained_on:
        raise SiteError(
            "data/: no train.jsonl, train.json, train.csv or train.parquet; put the site's "
            "question/answer file there or run supernode.prepare"
        )
    train = _table(trained_on, columns) if trained_on else None
    if part == "train" and train:
        table, path, rows = train, trained_on, train.rows
        if not rows:
            raise SiteError(f"{_name(path)}: no row with a question and an answer")
        if train.left_out:
            logger.info(
                "%s: the instruction of all rows is no part of the questions", _name(path),
                extra=travels(),
            )  # fmt: skip
    else:
        path = data_file(site_dir, part)
        if not path:
            return Part("", [])
        table = _table(path, columns, train)
        asked = {row.question for row in train.rows} if train else set()
        rows = [row for row in table.rows if row.question not in asked]
    known = len(table.rows) - len(rows)
    if known:
        logger.warning(
            "%s: %d of %d rows ask what %s asks too; they are not scored as held-out",
            _name(path), known, len(table.rows), _name(trained_on), extra=travels(),
        )  # fmt: skip
    return Part(
        _name(path), rows, table.read, table.empty, table.repeated, known, tuple(table.columns)
    )


def _name(path: Path | None) -> str:
    return f"data/{path.name}" if path else ""


def _table(path: Path, columns: str, like: Table | None = None) -> Table:
    try:
        table = read({_name(path): path}, columns, like=like, at_site=True)
    except RowsError as err:
        raise SiteError(str(err)) from None
    return table
