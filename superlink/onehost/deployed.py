"""The same sites as a real federation: SuperLink and SuperNodes are processes of this machine.

A run is submitted as any other, and its figures are read from the files that it leaves. What a
line learns is what it learns in one process (superlink/onehost/rounds.py): the rows, the seeds and
the code of both ends are the same.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.config import MIB, RunConfig
from app.server.strategy import RoundError
from app.site.base_model import BaseModel
from superlink import run_files
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.onehost.rounds import Federation
from superlink.submit import submit


class DeployedFederation(Federation):
    """The sites of a data set, each with a SuperNode of its own."""

    deployed = True

    def __init__(
        self, work: Path, source: Path, sites: int, held_out_rows: int, base: BaseModel
    ) -> None:
        """As in one process, and no process is started yet."""
        self._local = LocalFederation(work, work / "models", work / "results", sites)
        super().__init__(self._local.federation, source, sites, held_out_rows, base)

    @contextmanager
    def sites(self) -> Iterator[None]:
        """Within this block the federation is up; no process of it is left behind.

        Raises:
            ControlError, ProvisionError: it cannot be started.
        """
        local = self._local
        local.models.mkdir()  # this base model alone: each site reads all that are there
        (local.models / self.base.folder.name).symlink_to(self.base.folder.resolve())
        with local:
            local.provision()
            self._control = local.start()
            yield

    def run(self, config: RunConfig, every_round: bool, folder: Path) -> dict[str, Any]:
        """Submit a run of this config, and what it scored; of its results the last adapter is kept.

        Raises:
            RoundError: it fails, or not every site gives a score.
            ControlError: it could not be started or followed.
        """
        local, file = self._local, self._local.work / "line.toml"
        pairs = (f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in config.flat().items())
        file.write_text("".join(pairs), encoding="utf-8")
        control, check = self._control, local.check_enough_run
        failed = submit(REPOSITORY, [str(file)], control, local.public, check)
        newest = control.runs()[0]  # nobody else submits here
        run = local.results, str(newest.run_id)
        facts, lines = run_files.facts(*run), run_files.lines(*run)
        last = Path(*run) / f"peft_{config.num_server_rounds}"
        if last.is_dir():
            shutil.copytree(last, folder, dirs_exist_ok=True)
        for left in local.results.glob("*"):  # many lines' checkpoints could fill the disk
            shutil.rmtree(left, ignore_errors=True)
        if failed:
            raise RoundError(facts.get("error") or newest.state.details)
        return recorded(lines, config.num_server_rounds, every_round)


def recorded(lines: Sequence[Mapping[str, Any]], rounds: int, every_round: bool) -> dict[str, Any]:
    """What ``Federation.run`` returns, of the metrics.jsonl of a run of so many rounds.

    Args:
        lines: with strategy.fraction-evaluate = 1: all sites score after each round.
        every_round: False leaves the scores between the first and the last out.

    Raises:
        RoundError: a round's line is missing, or lacks the score of a site.
    """
    if [line["round"] for line in lines] != [*range(1, rounds + 1)]:
        raise RoundError(f"its metrics.jsonl has {len(lines)} of {rounds} rounds")
    for line in lines:
        if "eval_loss" not in line or line["eval_rejected"]:
            reasons = line.get("eval_rejected") or "no held-out loss"
            raise RoundError(f"after round {line['round']} not every site gives a score: {reasons}")
    if "eval_loss_before" not in lines[0]:  # it is there where the same sites gave both
        raise RoundError("after round 0 not every site gives a score: see the run's log above")
    curve, sent = [[0.0, lines[0]["eval_loss_before"]]], 0
    for line in lines:
        sent += line["bytes_down"] + line["bytes_up"]
        if every_round or line["round"] == rounds:
            curve.append([sent / MIB, line["eval_loss"]])
    return {
        "loss": lines[-1]["eval_loss"],
        "accuracy": lines[-1]["eval_token_accuracy"],
        "mib": curve[-1][0],
        "seconds": sum(line["seconds"] for line in lines),
        "sites": [line["partitions"] for line in lines],
        "rejected": sum(len(line["rejected"]) for line in lines),
        "curve": curve,
    }
