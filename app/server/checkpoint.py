"""The results folder: one folder a run, one PEFT folder a round, each complete or invisible.

results/<run-id>/run.json, metrics.jsonl, peft_<round>/{adapter_model.safetensors,
adapter_config.json, round.json}, eval/ (written by the evaluation), best -> the round of the lowest
held-out loss; results/latest -> the newest run with an adapter
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.config import MIB, RunConfig
from app.wire.adapter import Layout, Vector, save_peft

logger = logging.getLogger("app")
# What no other way around helps with; anything else a file system may say of what it lacks.
_REAL = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


class ResultsError(Exception):
    """The results folder cannot take this run; the message says what to do."""


class RunFolder:
    """The results of one run; the only writer in it."""

    def __init__(self, results: Path, run_id: int) -> None:
        """Make the folder and try in it, small, all that a round will do.

        Raises:
            ResultsError: it cannot be written.
        """
        self.results, self._told = results, False
        self.path = results / str(run_id)
        self.lines: list[dict[str, Any]] = []  # of metrics.jsonl
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _probe(self.path)
            # The evaluation container runs as another user of this group: it can write here
            # and nowhere else in the results.
            (self.path / "eval").mkdir(exist_ok=True)
            try:
                (self.path / "eval").chmod(0o2775)
            except OSError as err:  # some network file systems know no modes
                if err.errno in _REAL:
                    raise
        except OSError as err:
            raise ResultsError(
                f"cannot write results to {self.path}: {err.strerror}; "
                "check RESULTS_DIR, its owner and the disk"
            ) from None

    @contextmanager
    def writing(self, name: str = "") -> Iterator[None]:
        """Raises ResultsError in an OSError's place: ``name`` of this folder cannot be written."""
        try:
            yield
        except OSError as err:
            raise ResultsError(
                f"cannot write {self.path / name}: {err.strerror}; the checkpoints before it are "
                "intact"
            ) from None

    def reserve(self, checkpoints: int, adapter_bytes: int) -> None:
        """Refuse to start a run whose checkpoints do not fit on the disk.

        Raises:
            ResultsError: too little room.
        """
        total, _, free = shutil.disk_usage(self.path)
        needed = checkpoints * adapter_bytes
        if total and free < needed:  # some mounts say 0 bytes of 0
            raise ResultsError(
                f"{checkpoints} checkpoints need {needed / MIB:.0f} MiB in {self.path}, "
                f"{free / MIB:.0f} MiB are free; make room or set RESULTS_DIR to another disk"
            )

    def write_run(self, facts: dict[str, Any]) -> None:
        """Replace run.json. Raises ResultsError if it cannot be written."""
        self._replace("run.json", json.dumps(facts, indent=2) + "\n")

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace metrics.jsonl, a line a round. Raises ResultsError if it cannot be written."""
        self._replace("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self.lines = list(lines)

    def _replace(self, name: str, text: str) -> None:
        with self.writing(name):
            part = self.path / f".{name}"
            part.write_text(text)
            _fsync(part)
            _replace_file(part, self.path / name)

    def add_metrics(self, line: dict[str, Any]) -> None:
        """Append one round to metrics.jsonl. Raises ResultsError if it cannot be written."""
        with self.writing("metrics.jsonl"):
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            _fsync(self.path / "metrics.jsonl")
        self.lines.append(line)

    def save_round(
        self,
        server_round: int,
        layout: Layout,
        vector: Vector,
        config: RunConfig,
        facts: dict[str, Any],
    ) -> Path:
        """Write peft_<round> and point ``latest`` at this run.

        The folder gets its name only when every byte is on the disk: a reader never sees half
        a checkpoint, and a full disk leaves the last one as it was.

        Raises:
            ResultsError: the disk is full or cannot be written.
        """
        target = self.path / f"peft_{server_round}"
        part = self.path / f".peft_{server_round}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            save_peft(part, layout, vector, config)
            manifest = {
                "round": server_round,
                "layout": layout.hash,
                "sha256": sha256(part),
                **facts,
            }
            (part / "round.json").write_text(json.dumps(manifest, indent=2) + "\n")
            for file in (*part.iterdir(), part):
                _fsync(file)
            # An old one goes as a whole: without its manifest it is invisible.
            (target / "round.json").unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            _rename_folder(part, target)
            _fsync(self.path)
            self.point_latest_here()
        except OSError as err:
            shutil.rmtree(part, ignore_errors=True)
            raise ResultsError(
                f"round {server_round}: cannot write {target}: {err.strerror}; "
                "the checkpoints before it are intact"
            ) from None
        return target

    def point_latest_here(self) -> None:
        """Make ``latest`` name this run, where the file system has links; readers do without.

        Raises:
            OSError: the disk is full, or fails.
        """
        self._point(self.results / "latest", self.path.name)

    def point_best(self, server_round: int) -> None:
        """Make ``best`` name this round, as ``latest`` its run. Raises ResultsError."""
        with self.writing("best"):
            self._point(self.path / "best", f"peft_{server_round}")

    def _point(self, link: Path, name: str) -> None:
        """``link`` leads to what has this name beside it, at every moment. Raises OSError."""
        part = link.with_name(f".{link.name}-{self.path.name}")
        try:
            part.unlink(missing_ok=True)
            part.symlink_to(name)  # relative: holds wherever the volume is mounted
            if link.exists() and not link.is_symlink():
                raise FileExistsError(errno.EEXIST, "it is there, and no link", str(link))
            part.replace(link)
        except OSError as err:
            part.unlink(missing_ok=True)
            if err.errno in _REAL:
                raise
            if not self._told:
                logger.warning("[results] no link %s to %s: %s", link, name, err.strerror)
            self._told = True


def _probe(folder: Path) -> None:
    """Raises OSError: a round could not be written here, though its file system may lack a lot."""
    part, whole = folder / ".probe.part", folder / ".probe"
    try:
        for left in (part, whole):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir()
        old, new = part / "old", part / "new"
        for file in (old, new):
            file.write_bytes(b"\0" * 4096)
            with file.open("ab") as more:
                more.write(b"\0")
            _fsync(file)
        _replace_file(new, old)
        _fsync(part)
        _rename_folder(part, whole)
    finally:
        for left in (part, whole):
            shutil.rmtree(left, ignore_errors=True)


def _replace_file(part: Path, target: Path) -> None:
    try:
        part.replace(target)
    except FileExistsError:  # some file systems rename to new names only
        target.unlink()
        part.replace(target)


def _rename_folder(part: Path, target: Path) -> None:
    """To a new name. Some file systems rename files only: then its manifest comes last."""
    try:
        part.replace(target)
    except OSError as err:
        if err.errno in _REAL:
            raise
        target.mkdir()
        for file in sorted(part.iterdir(), key=lambda file: file.name == "round.json"):
            file.replace(target / file.name)
        part.rmdir()
        _fsync(target)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:  # some file systems cannot sync a folder, or anything
        if err.errno in _REAL:
            raise
    finally:
        os.close(handle)


def sha256(checkpoint: Path) -> str:
    """Of a checkpoint's weights. Raises OSError."""
    with (checkpoint / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rounds(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run folder, by round, in order."""
    names = {p.parent.name.removeprefix("peft_"): p.parent for p in run.glob("peft_*/round.json")}
    return dict(sorted((int(n), folder) for n, folder in names.items() if n.isdecimal()))


def newest(results: Path) -> Path | None:
    """The run that ``latest`` names, or, without that link, whose checkpoint is the newest."""
    latest = results / "latest"
    if latest.is_symlink() and rounds(latest):
        return latest.resolve()
    runs = [p for p in results.glob("*/") if p.name != "latest" or latest.is_symlink()]
    complete = [r[max(r)] for p in runs if (r := rounds(p))]
    by_age = max(complete, key=lambda f: (f / "round.json").stat().st_mtime, default=None)
    return by_age and by_age.parent
