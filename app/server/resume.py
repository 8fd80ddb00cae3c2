"""Going on where an earlier run ended: with its last complete round, in a run folder of its own.

Sampling, learning rate, data order and initial adapter are functions of seed and round, so what
follows is what the earlier run would have done, bit for bit on a CPU.
"""

import json
import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from app.config import MIB, ConfigError, RunConfig
from app.server.checkpoint import RunFolder, rounds, sha256
from app.wire.adapter import Layout, Vector

logger = logging.getLogger(__name__)
# Of another value of these the earlier rounds would have been others altogether.
_SAME = ("seed", "model.")


@dataclass(frozen=True)
class Earlier:
    """What the run that is continued left behind, complete up to ``server_round``."""

    chain: list[dict[str, Any]]  # run ids, oldest first, and the round that each ended with
    server_round: int
    checkpoint: Path
    lines: list[dict[str, Any]]  # of metrics.jsonl, one a round

    def adapter(self, layout: Layout, fingerprint: str) -> Vector:
        """The adapter [layout.size] of its last round.

        Raises:
            ConfigError: it is of another layout or base model, or not what the run wrote.
        """
        manifest = json.loads((self.checkpoint / "round.json").read_text())
        for what, now in (("layout", layout.hash), ("base_model_fingerprint", fingerprint)):
            if manifest[what] != now:
                raise ConfigError(
                    f"run config: resume: {self.checkpoint} has {what} {manifest[what]}, the "
                    f"sites now {now}; prepare the same base model, or start a new run"
                )
        try:
            arrays = load((self.checkpoint / "adapter_model.safetensors").read_bytes())
            return np.ascontiguousarray(layout.join(arrays))
        except (OSError, SafetensorError, ValueError) as err:
            raise ConfigError(f"run config: resume: {self.checkpoint}: {err}") from None


def find_earlier(results: Path, config: RunConfig) -> Earlier | None:
    """The run to go on from, by the key resume: the first of its ids with a complete round.

    Returns:
        None where nothing is to be continued.

    Raises:
        ConfigError: there is no such run, or it cannot be continued with this config.
    """
    if not config.resume:
        return None
    for name in config.resume.split(","):
        if name == "0":
            return None
        run = (results / name).resolve()
        complete = _complete(run)
        if complete:
            return _check(run, complete, config)
    there = sorted(p.parent.name for p in results.glob("*/run.json") if _complete(p.parent))
    raise ConfigError(
        f"run config: resume = {config.resume!r}: no complete round in {results}; runs that have "
        f"one: {', '.join(there) or 'none'}"
    )


def bytes_before(results: Path, config: RunConfig, earlier: Earlier | None) -> int:
    """Adapter bytes that the runs named in the key resume have sent, also in cut-off rounds.

    Each of them counted on from the one before, so the largest holds all; 0 where none is named.
    """
    sent = [round(earlier.lines[-1]["mb_sent"] * MIB) if earlier else 0]
    for name in filter(None, config.resume.split(",")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # as little as a kill left of it
            sent.append(int(json.loads((results / name / "run.json").read_text())["bytes_sent"]))
    return max(sent)


def _complete(run: Path) -> list[dict[str, Any]]:
    """The lines of rounds 1, 2, … as far as each has its line and its undamaged checkpoint."""
    path, checkpoints = run / "metrics.jsonl", rounds(run)
    lines: list[dict[str, Any]] = []
    if not (run / "run.json").is_file():
        return lines
    for text in path.read_text().splitlines() if path.is_file() else []:
        number = len(lines) + 1
        try:
            line = json.loads(text)
        except ValueError:
            break  # cut off in the middle of it
        if line["round"] != number or number not in checkpoints:
            break
        lines.append(line)
    while lines and not _undamaged(checkpoints[len(lines)]):
        logger.warning("[resume] %s is damaged", checkpoints[len(lines)])
        lines.pop()
    return lines


def _undamaged(checkpoint: Path) -> bool:
    try:
        expected = json.loads((checkpoint / "round.json").read_text())["sha256"]
        return bool(sha256(checkpoint) == expected)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check(run: Path, lines: list[dict[str, Any]], config: RunConfig) -> Earlier:
    facts = json.loads((run / "run.json").read_text())
    now, last = config.flat(), len(lines)
    # Before there was a choice, all runs had this prompt.
    for key, old in ({"model.prompt": "alpaca"} | facts["config"]).items():
        if key == "resume" or now.get(key) == old:
            continue
        if key.startswith(_SAME):
            raise ConfigError(
                f"run config: resume: {key} = {now.get(key)!r}, but run {run.name} has {old!r}; "
                "set it to that, or start a new run"
            )
        logger.warning("[resume] %s = %r, in run %s %r", key, now.get(key), run.name, old)
    if last > config.num_server_rounds:
        raise ConfigError(
            f"run config: resume: run {run.name} has {last} rounds, num-server-rounds = "
            f"{config.num_server_rounds}"
        )
    chain = [*facts.get("resumed_from", []), {"run_id": run.name, "last_round": last}]
    return Earlier(chain, last, rounds(run)[last], lines)


def adopt(folder: RunFolder, earlier: Earlier) -> None:
    """Give the new run's folder the rounds of the earlier one: links, where the disk has them.

    In an order in which no interruption loses a round: without its lines the new run has no round
    that could be resumed, and ``latest`` names it only when it has them all.

    Raises:
        ResultsError: the folder cannot be written.
    """
    with folder.writing():
        for number, checkpoint in rounds(earlier.checkpoint.parent).items():
            if number <= earlier.server_round:
                part = folder.path / f".peft_{number}.part"
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(checkpoint, part, copy_function=_link)
                part.replace(folder.path / checkpoint.name)
        folder.write_metrics(earlier.lines)
        folder.point_latest_here()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
