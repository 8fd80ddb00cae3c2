"""Means, intervals and paired differences against values worked out by hand, and the plot."""

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from superlink.onehost.comparison import HEADS, difference, plot, rows, summed, table


def run(loss: float, mib: float = 2.0) -> dict[str, Any]:
    curve = [[0.0, 4.0], [mib / 2, loss + 0.5], [mib, loss]]
    return {"loss": loss, "accuracy": 0.25, "mib": mib, "seconds": 3.4, "curve": curve}


RESULTS = {
    "fedavg": {0: run(3.0), 1: run(3.2), 2: run(3.4)},
    "int4 & <half>": {0: run(3.1, 0.5), 1: run(3.4, 0.5), 2: run(3.7, 0.5)},
    "two of three": {2: run(3.4), 0: run(2.9)},
    "one": {1: run(3.0)},
    "none": {},
}


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        # Mean 0.2, sd 0.1; Student's t of 2 degrees 4.302653: 4.302653 * 0.1 / sqrt(3) = 0.248414.
        ([0.1, 0.2, 0.3], "+0.2000 [-0.0484, +0.4484]"),
        # Mean -0.05, sd sqrt(2) * 0.05, t of 1 degree 12.706205: half is 12.706205 * 0.05.
        ([-0.1, 0.0], "-0.0500 [-0.6853, +0.5853]"),
        ([-0.02], "-0.0200, no interval"),
        ([], ""),
    ],
)
def test_a_difference_has_the_interval_of_students_t(gaps: list[float], said: str) -> None:
    assert difference(gaps) == said


def test_lines_are_paired_seed_by_seed_with_the_first() -> None:
    assert summed(RESULTS) == [
        ("fedavg", "3.2000", "0.2000", "", "0.2500", "2.00", "3", "3"),
        (
            "int4 & <half>", "3.4000", "0.3000", difference([0.1, 0.2, 0.3]), "0.2500", "0.50", "3",
            "3",
        ),
        ("two of three", "3.1500", "0.3536", difference([0.0, -0.1]), "0.2500", "2.00", "3", "2"),
        ("one", "3.0000", "", "-0.2000, no interval", "0.2500", "2.00", "3", "1"),
    ]  # fmt: skip
    # Without the spread over seeds: that is common to both lines.
    assert difference([0.1, 0.2, 0.3]) in table(RESULTS)


def test_a_line_that_shares_no_seed_with_the_first_has_no_difference() -> None:
    (_, other) = summed({"a": {0: run(3.0)}, "b": {1: run(2.0)}})
    assert other[3] == ""
    (alone,) = summed({"a": {}, "b": {1: run(2.0)}})  # the first has failed: not b against b
    assert (alone[0], alone[3]) == ("b", "")


def test_rows_have_date_commit_and_machine() -> None:
    lines = rows(RESULTS, "abc1234").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == 2 + 4
    assert {len(row) for row in cells} == {3 + len(HEADS)}
    assert cells[2][1] == "abc1234"
    assert cells[2][3:5] == ["fedavg", "3.2000"]


def test_the_plot_is_a_file_of_its_own_with_a_curve_a_line() -> None:
    drawn = plot(RESULTS)
    svg = ET.fromstring(drawn)  # noqa: S314  (it is our own)
    names = {element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert names >= {"fedavg", "int4 & <half>", "two of three", "one"}
    assert "none" not in names
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}path"))) == 4
    assert "href" not in drawn
    assert "<script" not in drawn


def test_a_plot_of_one_result_is_drawn() -> None:
    ET.fromstring(plot({"a": {0: run(3.0)}}))  # noqa: S314
