"""What a comparison found: means, spreads and paired differences, as table, rows and plot."""

import math
import os
import re
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from eval.charts import Point, dot, label, stroke, ticks

Results = dict[str, dict[int, dict[str, Any]]]  # line -> seed -> what Federation.run returned
HEADS = ("line", "held-out loss", "sd", "to the first, 95 %", "token accuracy", "MiB", "s", "seeds")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#777777")
MEANS = ("loss", "accuracy", "mib", "seconds")


def difference(gaps: Sequence[float]) -> str:
    """Their mean with its 95 % interval by Student's t, as text; of one value there is none."""
    if not gaps:
        return ""
    mean = statistics.mean(gaps)
    if len(gaps) == 1:
        return f"{mean:+.4f}, no interval"
    half = float(stdtrit(len(gaps) - 1, 0.975)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def summed(results: Results) -> list[tuple[str, ...]]:
    """Cells under HEADS of each line that has a seed. Differences are to the first line's losses,

    seed by seed, over those seeds that both have.
    """
    first = next(iter(results.values()), {})
    lines: list[tuple[str, ...]] = []
    for name, runs in results.items():
        if not runs:
            continue
        gaps = [run["loss"] - first[seed]["loss"] for seed, run in runs.items() if seed in first]
        mean = {key: statistics.mean(run[key] for run in runs.values()) for key in MEANS}
        lines.append(
            (
                name,
                f"{mean['loss']:.4f}",
                f"{_sd(runs):.4f}" if len(runs) > 1 else "",
                "" if runs is first else difference(gaps),
                f"{mean['accuracy']:.4f}",
                f"{mean['mib']:.2f}",
                f"{mean['seconds']:.0f}",
                str(len(runs)),
            )
        )
    return lines


def _sd(runs: dict[int, dict[str, Any]]) -> float:
    losses = [run["loss"] for run in runs.values()]
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def table(results: Results) -> str:
    rows = [HEADS, *summed(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def rows(results: Results, commits: str) -> str:
    """The same as a table of Markdown, each row with date, commit and machine."""
    where = str(date.today()), commits, machine()
    lines = [("date", "commit", "machine", *HEADS), ("---",) * (3 + len(HEADS))]
    lines += [(*where, *cells) for cells in summed(results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def machine() -> str:
    """The GPU's name, or the number of cores."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        return re.sub(r"GPU 0: | \(UUID.*", "", listed.stdout.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"{os.cpu_count()} cores"


def commit(checkout: Path) -> str:
    """The short hash, marked where files were changed since; "unknown" without git."""
    git = ["git", "-C", str(checkout), "describe", "--always", "--dirty=, changed", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def plot(results: Results) -> str:
    """Held-out loss over MiB sent as an SVG file of its own: means, and the last loss's sd."""
    curves: dict[str, list[Point]] = {
        name: [
            (statistics.mean(x for x, _ in points), statistics.mean(y for _, y in points))
            for points in zip(*(run["curve"] for run in runs.values()), strict=True)
        ]
        for name, runs in results.items()
        if runs
    }
    lowest = min(curve[-1][1] - _sd(results[name]) for name, curve in curves.items())
    ys = ticks(lowest, max(y for curve in curves.values() for _, y in curve))
    xs = ticks(0, max(curve[-1][0] for curve in curves.values()))

    def place(x: float, y: float) -> Point:
        return 60 + 440 * x / xs[-1], 320 - 300 * (y - ys[0]) / (ys[-1] - ys[0])

    drawn = label(280, 354, "MiB of adapters sent in training", "mid")
    for y in ys:
        drawn += stroke(*place(0, y), *place(xs[-1], y), "axis")
        drawn += label(54, place(0, y)[1] + 4, f"{y:.6g}", "end")
    for x in xs:
        drawn += label(place(x, 0)[0], 336, f"{x:.6g}", "mid")
    style = ""
    for number, (name, curve) in enumerate(curves.items()):
        css, (x, y), sd = f"c{number}", curve[-1], _sd(results[name])
        colour, dashes = COLOURS[number % len(COLOURS)], 4 * (number // len(COLOURS))
        style += f".{css}{{stroke:{colour};fill:{colour};stroke-dasharray:{dashes or 'none'}}}"
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in (place(*point) for point in curve))
        drawn += f'<path d="M{path}" class="{css}" style="fill:none"/>'
        drawn += stroke(*place(x, y - sd), *place(x, y + sd), css)
        drawn += "".join(dot(*place(*point), css) for point in curve)
        drawn += dot(520, 24 + 18 * number, css, 4) + label(532, 28 + 18 * number, name)
    height = max(360, 36 + 18 * len(curves))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" role="img" '
        'aria-label="held-out loss over MiB sent"><style>'
        "svg{background:#fff;color:#222}"
        "@media(prefers-color-scheme:dark){svg{background:#181818;color:#ddd}}"
        "text{font:12px sans-serif;fill:currentColor}.mid{text-anchor:middle}.end{text-anchor:end}"
        f".axis{{stroke:#8886}}path,line{{stroke-width:1.6}}{style}</style>{drawn}</svg>\n"
    )
