"""Run a benchmark and write its last lines into docs/benchmarks.md, as a row with date and commit.

    python -m tests.benchmarks training_step --data FILE

Its output passes through; what it prints about ratios, or else its last line, is the figure.
"""

import subprocess
import sys
from datetime import date
from pathlib import Path

from superlink.onehost.comparison import commit, machine
from tests.samples import REPOSITORY

PAGE = REPOSITORY / "docs" / "benchmarks.md"
HEAD = "| date | commit | machine | command | figure |\n|---|---|---|---|---|\n"


def row(command: str, output: str) -> str:
    """Raises IndexError: the script has printed nothing."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    figure = "; ".join([x for x in lines if x.startswith("ratio")] or lines[-1:]).replace("|", "/")
    if not figure:
        raise IndexError(command)
    return f"| {date.today()} | {commit(REPOSITORY)} | {machine()} | `{command}` | {figure} |\n"


def insert(page: str, new: str) -> str:
    """The page with the row on top of that table."""
    before, head, after = page.partition(HEAD)
    if not head:
        raise SystemExit(f"{PAGE}: no table with the head\n{HEAD}")
    return before + head + new + after


def main() -> int:
    if len(sys.argv) < 2 or not Path(__file__).with_name(f"{sys.argv[1]}.py").is_file():
        print(__doc__, file=sys.stderr)
        return 2
    words = ["python", "-m", f"tests.benchmarks.{sys.argv[1]}", *sys.argv[2:]]
    # No folder of whoever ran it.
    shown = " ".join(Path(w).name if Path(w).is_absolute() else w for w in words)
    output = ""
    with subprocess.Popen(
        [sys.executable, *words[1:]], stdout=subprocess.PIPE, text=True
    ) as script:
        for line in script.stdout or ():
            print(line, end="", flush=True)
            output += line
    if script.returncode == 0:
        PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), row(shown, output)), "utf-8")
    return script.returncode


if __name__ == "__main__":
    sys.exit(main())
