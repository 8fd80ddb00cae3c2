"""What threads cost that spin while they wait for each other: OMP_WAIT_POLICY on a CPU host.

    python -m tests.benchmarks.wait_policy [--models DIR] [--repeat 3] [--steps 2]

Training steps of the demo's shape (``training_step``, packed) in a process of their own, with the
policy left alone (GNU's OpenMP spins for milliseconds), spinning for microseconds, and "passive"
(not at all): with the machine to itself, beside four busy loops, and two such processes at once.
Medians; what each policy takes of the seconds of the one left alone, last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from supernode.partitions import BUNDLED
from tests.benchmarks.training_step import SMALL
from tests.samples import REPOSITORY

POLICIES: dict[str, dict[str, str]] = {
    "left alone": {},
    "short": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
LOOPS = 4


@contextmanager
def busy(loops: int) -> Iterator[None]:
    with ExitStack() as running:
        for _ in range(loops):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            running.callback(loop.wait)
            running.callback(loop.kill)
        yield


def seconds(start: Callable[[dict[str, str]], subprocess.Popen[str]], policy: str, at_once: int,
            loops: int) -> float:  # fmt: skip
    """Of the training steps; of the slowest where several run at once."""
    ours = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    env = {k: v for k, v in os.environ.items() if k not in ours} | POLICIES[policy]
    with busy(loops):
        processes = [start(env) for _ in range(at_once)]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a training failed, see above")
    return max(float(json.loads(text.splitlines()[-1])["seconds"]) for text in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    settings = {"alone": (1, 0), f"beside {LOOPS} busy loops": (1, LOOPS), "two at once": (2, 0)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps([json.loads(line) for line in BUNDLED.open()]))
        command = [
            sys.executable, "-m", "tests.benchmarks.training_step", "--data", str(data),
            "--models", str(args.models), "--steps", str(args.steps), "--batch-size", "4",
            "--model", SMALL, "--lever", "packed",
        ]  # fmt: skip

        def start(env: dict[str, str]) -> subprocess.Popen[str]:
            return subprocess.Popen(
                command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
            )

        print(f"{'':20} " + "".join(f"{policy:>14}" for policy in POLICIES), flush=True)
        for setting, (at_once, loops) in settings.items():
            seen: dict[str, list[float]] = {policy: [] for policy in POLICIES}
            for _ in range(args.repeat):
                for policy in POLICIES:
                    seen[policy].append(seconds(start, policy, at_once, loops))
            medians = [statistics.median(each) for each in seen.values()]
            cells = (f"{m:6.1f} s {m / medians[0]:5.2f}" for m in medians)
            print(f"{setting:20} " + "".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
