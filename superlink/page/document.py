"""Whole pages: one run, served or as a file of its own, and the list of all runs."""

import os
from contextlib import suppress
from functools import lru_cache
from html import escape
from pathlib import Path
from time import time

from superlink.page import sections
from superlink.page.runs import Run, changed, folder_of, read_run, run_ids, taken_over, version
from superlink.page.state import state_of
from superlink.run_files import opened

ASSETS = Path(__file__).parent / "assets"
REPORT = "report.html"  # in a run's folder
MOST_RUNS = 100  # that the list shows
# The file runs nothing and loads nothing, so it can be mailed, archived and opened anywhere.
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'\">"
)
_LINKS = '<link rel="stylesheet" href="/page.css"><script src="/page.js" defer></script>'
_TOP = '<nav><a href="/">All runs</a>{}</nav><p id="away" class="warn" hidden></p>'


def _page(title: str, head: str, top: str, main: str) -> str:
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">{head}'
        f"<title>{escape(title)}</title></head><body>{top}<main>\n{main}</main></body></html>\n"
    )
    return page.encode("utf-8", "replace").decode()  # JSON can say half a character


def served(results: Path, run_id: str, other_id: str = "") -> str:
    """The page of a run, on top of another one's where that is given.

    Raises:
        UnknownRunError: one of them is none.
    """
    run, other = read_run(results, run_id), read_run(results, other_id) if other_id else None
    known = [known for known in run_ids(results)[:MOST_RUNS] if known != run_id]
    options = "".join(f'<option value="{r}">{r}</option>' for r in known)
    top = f'<a href="/runs/{run_id}/report.html" download="run-{run_id}.html">As a file</a>'
    if known:
        top += (
            f'<form action="/runs/{run_id}"><label>Beside run <select name="beside">{options}'
            "</select></label> <button>Show</button></form>"
        )
    main = _main(results, run, f"/runs/{run_id}/evaluation", other)
    return _page(f"Run {run_id}", _LINKS, _TOP.format(top), main)


def _main(results: Path, run: Run, evaluation: str, other: Run | None = None) -> str:
    over = taken_over(results)
    state = state_of(run, taken_over=run.run_id in over)
    parts = [sections.head(run, state)]
    if other:
        parts.append(
            sections.beside(run, state, other, state_of(other, taken_over=other.run_id in over))
        )
    parts += [
        sections.curves(run, state),
        sections.sites(state),
        sections.evaluation(run, evaluation),
        sections.events(run),
        sections.settings(run),
    ]
    return "".join(parts)


def listed(results: Path) -> str:
    """The list of all runs, the newest first."""
    ids = run_ids(results)
    minute = int(time() // 60)  # a run that says nothing any more is silent one day
    over = taken_over(results)

    def row(run_id: str) -> str:
        try:
            return _row(results, run_id, version(results, run_id), minute, run_id in over)
        except Exception as err:  # its words may be the run's
            return sections.row_of_none(run_id, type(err).__name__)

    rows = "".join(map(row, ids[:MOST_RUNS]))
    head_row = "".join(f"<th>{n}</th>" for n in sections.OF_A_RUN)
    table = (
        f'<div class="scroll"><table class="wide stack"><thead><tr>{head_row}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    none = '<p class="now"><span class="chip">waiting</span> <b>No run has begun yet.</b></p>'
    more = f'<p class="soft">{len(ids) - MOST_RUNS} older ones are in the results folder.</p>'
    body = (table if rows else none) + (more if len(ids) > MOST_RUNS else "")
    main = sections.section("runs", "", f"<h1>Federated fine-tuning: all runs</h1>{body}")
    return _page("All runs", _LINKS, _TOP.format(""), main)


@lru_cache(maxsize=2 * MOST_RUNS)
def _row(results: Path, run_id: str, _version: str, _minute: int, over: bool) -> str:
    """Made anew only when the run's files have changed: of a hundred runs one is at work."""
    run = read_run(results, run_id)
    return sections.row_of(run, state_of(run, taken_over=over))


def standalone(results: Path, run_id: str) -> str:
    """The page of a run as one file. Raises UnknownRunError."""
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    main = _main(results, read_run(results, run_id), "eval/report.html")
    return _page(f"Run {run_id}", f"{_POLICY}<style>{style}</style>", "", main)


def write_standalone(results: Path, run_id: str) -> Path:
    """Write report.html into the run's folder; returns its path. Whole, or as it was before.

    It is as old as the newest of the files that it shows.

    Raises:
        UnknownRunError: there is no such run.
        OSError: the folder cannot be written.
    """
    folder = folder_of(results, run_id)
    shown_ns, page = changed(folder), standalone(results, run_id)
    part = f".{REPORT}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW  # over no link, whoever made it
    with opened(folder) as at:
        with suppress(FileNotFoundError):
            os.unlink(part, dir_fd=at)
        with os.fdopen(os.open(part, flags, 0o644, dir_fd=at), "w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.utime(file.fileno(), ns=(shown_ns, shown_ns))
        os.rename(part, REPORT, src_dir_fd=at, dst_dir_fd=at)
    return folder / REPORT
