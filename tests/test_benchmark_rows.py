"""The row that a benchmark leaves in docs/benchmarks.md."""

import re

import pytest

from tests.benchmarks.__main__ import HEAD, PAGE, insert, row

OUTPUT = "warming up\nthis | that   1.0 s\nratio, 2 asked: 2.46\nratio, 4 asked: 3.1\n"


def test_a_row_has_date_commit_machine_command_and_every_ratio() -> None:
    cells = [cell.strip() for cell in row("python -m x --steps 2", OUTPUT).strip("|\n").split("|")]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", cells[0])
    assert re.fullmatch(r"[0-9a-f]{7,}(, changed)?", cells[1])
    assert cells[2]
    assert cells[3:] == ["`python -m x --steps 2`", "ratio, 2 asked: 2.46; ratio, 4 asked: 3.1"]


def test_without_a_ratio_the_last_line_is_the_figure_and_without_a_line_there_is_no_row() -> None:
    assert row("x", "a\nb | c\n\n").endswith("| b / c |\n")
    with pytest.raises(IndexError):
        row("x", "\n")


def test_the_newest_row_stands_on_top_and_nothing_else_changes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(HEAD) == 1  # the table of docs/benchmarks.md
    once = insert(page, "| 1 |\n")
    twice = insert(once, "| 2 |\n")
    assert twice.replace("| 2 |\n", "", 1) == once
    assert once.replace("| 1 |\n", "", 1) == page
    assert HEAD + "| 2 |\n| 1 |\n" in twice
