"""Write a run's curves as event files of TensorBoard, for whoever looks at everything there.

    python -m superlink.tensorboard results/18155706404137891248     into its folder tensorboard/
    tensorboard --logdir results

Both need ``pip install 'fedllm-medical[tensorboard]'``. Steps are rounds; 0 is the initial adapter.
What was there of it is replaced.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from superlink.page import drawings
from superlink.page.runs import Run, UnknownRunError, moment, numbers, read_run, whole, wholes

# By site, in the order of a line's partitions.
_OF_SITES = {"loss of site": "train_site_losses", "weight": "shares", "alpha": "alphas"}
Point = tuple[str, float, int, float | None]


def points(run: Run) -> Iterator[Point]:
    """Name, value, round, and when that was complete (seconds of the epoch), if it was told."""
    told = {whole(e, "round"): moment(e, "time") for e in run.events if e.get("event") == "round"}
    at = {number: time.timestamp() for number, time in told.items() if time}
    for name, curve in (
        ("loss/training", drawings.column(run, "train_loss")),
        ("loss/held out", drawings.held_out(run)),
        ("MiB sent", drawings.sent(run)),
    ):
        for server_round, value in curve:
            yield name, value, int(server_round), at.get(int(server_round))
    for line in run.rounds:
        sites, of = wholes(line, "partitions"), whole(line, "round")
        for name, key in _OF_SITES.items():
            # Without a round, or a value for each site, the line is not the ServerApp's.
            if of is not None and len(values := numbers(line, key)) == len(sites):
                for site, value in zip(sites, values, strict=True):
                    yield f"{name}/site-{site:02d}", value, of, at.get(of)


def write(folder: Path) -> Path:
    """The event files of the run in this folder; returns theirs.

    Raises:
        SystemExit: there is no such run, or nothing of it; TensorBoard is not installed.
        OSError: they cannot be written.
    """
    try:
        from tensorboard.summary import Writer
    except ImportError:
        install = "pip install 'fedllm-medical[tensorboard]'"
        raise SystemExit(f"tensorboard: ERROR: it is not installed: {install}") from None
    try:
        run = read_run(folder.parent, folder.name)
    except UnknownRunError:
        raise SystemExit(
            f"tensorboard: ERROR: {folder} is no run's folder; give one, results/<run-id>"
        ) from None
    for unread in run.unread:
        print(f"tensorboard: not readable, left out: {unread}", file=sys.stderr)
    if not (every := list(points(run))):
        raise SystemExit(
            f"tensorboard: ERROR: {folder / 'metrics.jsonl'} holds no round yet; try again later"
        )
    target = folder / "tensorboard"
    if target.exists():
        shutil.rmtree(target)
    writer = Writer(str(target))
    for name, value, server_round, at in every:
        writer.add_scalar(name, value, server_round, wall_time=at)
    writer.close()
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="superlink.tensorboard", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", type=Path, help="a run's folder, results/<run-id>")
    try:
        print(write(parser.parse_args().run.resolve()))
    except OSError as err:
        raise SystemExit(f"tensorboard: ERROR: {err.filename}: {err.strerror}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
