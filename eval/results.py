"""The results folder, read only: which run, which round, what happened in it."""

import json
import time
from pathlib import Path
from typing import Any

from app.server.best import best_round
from app.server.checkpoint import newest, rounds, sha256
from eval import EvalError
from eval.model import Adapter


def newest_run(results: Path) -> Path:
    """The newest run that has a complete adapter.

    Raises:
        EvalError: there is none yet.
    """
    if run := newest(results):
        return run
    raise EvalError(
        f"no complete adapter in {results} yet; wait with --wait MINUTES, or give --peft-path"
    )


def choose_run(results: Path, run: str | None, wait_s: float) -> Path:
    """The folder of the named run, or of the newest, once it has a complete adapter.

    Raises:
        EvalError: no such run, or none has an adapter after ``wait_s``.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if run in (None, "latest"):  # a link, where the file system has links
                return newest_run(results)
            if rounds(results / run):
                return (results / run).resolve()
            there = ", ".join(sorted(p.parent.name for p in results.glob("*/run.json"))) or "none"
            raise EvalError(f"--run {run}: no complete adapter in {results / run}; runs: {there}")
        except EvalError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(min(5, max(0.1, deadline - time.monotonic())))


def round_number(run: Path, asked: str | None) -> int | None:
    """A round's number; None: the last, as ``adapters`` takes it.

    Args:
        asked: best (of the lowest held-out loss at the sites), last, or a number.

    Raises:
        EvalError: best is asked for, and no round has a held-out loss.
    """
    if asked != "best":
        return None if asked in (None, "last") else int(asked)
    if best := best_round(metrics(run)):
        return int(best["round"])
    raise EvalError(
        f"--round best: no round of run {run.name} has a held-out loss (the run config's "
        "strategy.fraction-evaluate is 0, or no site answered); give --round last or a number"
    )


def adapters(run: Path, number: int | None, every: bool) -> list[Adapter]:
    """The run's checkpoints that are asked for: one round, all of them, or the last.

    Raises:
        EvalError: that round is not there, or its weights are not those of its manifest.
    """
    there = rounds(run)
    if number is not None and number not in there:
        known = ", ".join(map(str, there))
        raise EvalError(f"--round {number}: run {run.name} has complete rounds {known}")
    chosen = list(there) if every else [number if number is not None else max(there)]
    found = []
    for n in chosen:
        try:
            manifest = json.loads((there[n] / "round.json").read_text())
            fingerprint, expected = manifest["base_model_fingerprint"], manifest["sha256"]
        except (ValueError, KeyError, TypeError):
            raise EvalError(f"{there[n] / 'round.json'} is not what the run wrote") from None
        adapter = Adapter(there[n], there[n].name, n, fingerprint)
        if not adapter.weights.is_file() or sha256(adapter.folder) != expected:
            raise EvalError(f"{adapter.weights} is not what the run wrote (sha256 differs)")
        found.append(adapter)
    return found


def state(run: Path) -> str:
    """How far the run is, in words: "running, 3 of 10 rounds"."""
    try:
        facts = json.loads((run / "run.json").read_text())
        total, status = facts["config"]["num-server-rounds"], facts["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "state unknown"
    return f"{status}, {max(rounds(run), default=0)} of {total} rounds"


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, a round each; a line being written is left out."""
    path, lines = run / "metrics.jsonl", []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
