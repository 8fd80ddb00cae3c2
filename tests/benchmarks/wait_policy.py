"""What threads cost that spin while they wait for each other: OMP_WAIT_POLICY on a CPU host.

    python -m tests.benchmarks.wait_policy [--models DIR] [--repeat 3]

Eight training steps of the demo's shape (``training_step``, packed) in a process of their own,
with the policy left alone and with "passive": with the machine to itself, beside four busy loops,
and two such processes at once. Medians; the ratio of passive to left alone a setting, last.
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

POLICIES: dict[str, dict[str, str]] = {"left alone": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
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
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | POLICIES[policy]
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
    args = parser.parse_args()
    settings = {"alone": (1, 0), f"beside {LOOPS} busy loops": (1, LOOPS), "two at once": (2, 0)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps([json.loads(line) for line in BUNDLED.open()]))
        command = [
            sys.executable, "-m", "tests.benchmarks.training_step", "--data", str(data),
            "--models", str(args.models), "--steps", "8", "--batch-size", "4",
            "--model", SMALL, "--lever", "packed",
        ]  # fmt: skip

        def start(env: dict[str, str]) -> subprocess.Popen[str]:
            return subprocess.Popen(
                command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
            )

        print(f"{'':20} left alone s  passive s  ratio", flush=True)
        for setting, (at_once, loops) in settings.items():
            seen: dict[str, list[float]] = {policy: [] for policy in POLICIES}
            for _ in range(args.repeat):
                for policy in POLICIES:
                    seen[policy].append(seconds(start, policy, at_once, loops))
            alone, passive = (statistics.median(seen[policy]) for policy in POLICIES)
            print(f"{setting:20} {alone:12.1f} {passive:10.1f} {passive / alone:6.2f}", flush=True)


if __name__ == "__main__":
    main()
