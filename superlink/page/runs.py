"""The results folder, read only and without trust: a run's ServerApp has written what is in it.

What cannot be read is missing and named, never an error of the page.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from app.config import MIB
from superlink.run_files import MOST_BYTES, opened, parsed
from superlink.run_files import facts as facts_of
from superlink.run_files import read as read_file

Json = dict[str, Any]
T = TypeVar("T")
MOST_SECONDS = 1e8  # three years
_RUN_ID = re.compile(r"[0-9]{1,20}")  # as Flower numbers them
_FILES = ("run.json", "metrics.jsonl", "events.jsonl", "eval/report.json")


class UnknownRunError(LookupError):
    """There is no such run; the message is one line."""


@dataclass(frozen=True)
class Run:
    """What the files of a run hold, as far as they can be read.

    Attributes:
        facts: run.json. rounds: the lines of metrics.jsonl. events: those of events.jsonl.
        evaluation: eval/report.json; empty where there is none yet.
        unread: files, or lines of them, that cannot be read, and why.
    """

    run_id: str
    facts: Json = field(default_factory=dict)
    rounds: list[Json] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    evaluation: Json = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    @property
    def config(self) -> Json:
        return table(self.facts, "config")


def run_ids(results: Path) -> list[str]:
    """Every run's id, the newest first."""
    return [p.name for p in sorted(folders(results), key=_began, reverse=True)]


def folders(results: Path) -> list[Path]:
    """Every run's folder, in no order."""
    try:
        return [p for p in results.iterdir() if _RUN_ID.fullmatch(p.name) and _is_folder(p)]
    except OSError:
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()  # a link may lead anywhere


def _began(folder: Path) -> tuple[float, str]:
    """When its run began; where it has not said so yet, when the folder was made."""
    started = moment(facts_of(folder.parent, folder.name), "started")
    try:
        return started.timestamp() if started else folder.stat().st_mtime, folder.name
    except OSError:
        return 0.0, folder.name


def taken_over(results: Path) -> set[str]:
    """Ids of the runs that another one goes on from: what was cut off says "running" for ever."""
    runs = (facts_of(results, run_id) for run_id in run_ids(results))
    return {text(link, "run_id") for facts in runs for link in tables(facts, "resumed_from")}


def folder_of(results: Path, run_id: str) -> Path:
    """Raises UnknownRunError: it is no run's id, or there is no such run."""
    folder = results / run_id
    if not _RUN_ID.fullmatch(run_id) or not _is_folder(folder):
        raise UnknownRunError("no such run; the list of all runs is at /")
    return folder


def version(results: Path, run_id: str) -> str:
    """Changes with the run's files. Raises UnknownRunError."""
    folder = folder_of(results, run_id)
    return sha256(repr((run_id, [_seen(folder, n) for n in _FILES])).encode()).hexdigest()[:16]


def changed(folder: Path, *names: str) -> int:
    """When the newest of these files of a run, or of all that are shown, was written: ns, or 0."""
    return max(_seen(folder, name)[0] for name in names or _FILES)


def _seen(folder: Path, name: str) -> tuple[int, int]:
    """When the file was written, in ns, and its bytes."""
    *inner, last = name.split("/")
    try:
        with opened(folder, *inner) as handle:
            facts = os.lstat(last, dir_fd=handle)
        return facts.st_mtime_ns, facts.st_size
    except OSError:
        return 0, 0


def read_run(results: Path, run_id: str) -> Run:
    """All of a run. Raises UnknownRunError."""
    folder, unread = folder_of(results, run_id), list[str]()

    def read(name: str) -> bytes:
        data = read_file(folder, name)
        if data is None and os.path.lexists(folder / name):
            unread.append(f"{name} is behind a link, or no file of {MOST_BYTES // MIB} MiB at most")
        return data or b""

    def whole(name: str) -> Json:
        found = parsed(read(name) or b"{}")
        if isinstance(found, dict):
            return found
        unread.append(f"{name} is no JSON object")
        return {}

    def lines(name: str) -> list[Json]:
        data = read(name)
        complete = data[: data.rfind(b"\n") + 1]  # the last line may be on its way
        every = [parsed(line) for line in complete.split(b"\n") if line.strip()]
        good = [line for line in every if isinstance(line, dict)]
        if len(good) < len(every):
            unread.append(f"{name}: {len(every) - len(good)} of {len(every)} lines")
        return good

    run, metrics, events, report = _FILES
    return Run(run_id, whole(run), lines(metrics), lines(events), whole(report), unread)


def read_evaluation(results: Path, run_id: str) -> bytes:
    """The evaluation's own page. Raises UnknownRunError: there is none."""
    page = read_file(folder_of(results, run_id), "eval/report.html")
    if page is None:
        raise UnknownRunError("this run has no eval/report.html yet; docker compose run --rm eval")
    return page


def number(facts: Json, key: str) -> float | None:
    """The value as a finite number, if it is one."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= 1e18 else None  # nor NaN, which is not below anything


def whole(facts: Json, key: str) -> int | None:
    """The value as a count, or a round: a whole number from 0."""
    value = number(facts, key)
    return int(value) if value is not None and value >= 0 and value.is_integer() else None


def seconds(facts: Json, key: str) -> float | None:
    """The value as a duration: from 0, and so short that a moment later has a date too."""
    value = number(facts, key)
    return min(value, MOST_SECONDS) if value is not None and value >= 0 else None


def numbers(facts: Json, key: str) -> list[float]:
    """The list's numbers; empty where one of them is none, or it is no list."""
    return _each(facts, key, number)


def wholes(facts: Json, key: str) -> list[int]:
    """As ``numbers``, of counts."""
    return _each(facts, key, whole)


def _each(facts: Json, key: str, read: Callable[[Json, str], T | None]) -> list[T]:
    values = facts.get(key)
    found = [read({"": v}, "") for v in values] if isinstance(values, list) else []
    good = [v for v in found if v is not None]
    return good if len(good) == len(found) else []


def text(facts: Json, key: str) -> str:
    """The value if it is a text, as much of it as can be shown."""
    value = facts.get(key)
    return value[:4000] if isinstance(value, str) else ""


def texts(facts: Json, key: str) -> list[str]:
    values = facts.get(key)
    return [text({"": v}, "") for v in values] if isinstance(values, list) else []


def table(facts: Json, key: str) -> Json:
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def tables(facts: Json, key: str) -> list[Json]:
    values = facts.get(key)
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def moment(facts: Json, key: str) -> datetime | None:
    """The value as a point in time, with its zone."""
    try:
        found = datetime.fromisoformat(text(facts, key))
    except ValueError:
        return None
    return found if found.tzinfo and 1970 < found.year < 3000 else None
