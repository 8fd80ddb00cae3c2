"""What a site's last coarse upload left out, kept until its next (error feedback).

Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847. Quantising loses a little
of every change, always the small ones; what is lost is added to the next change instead.
"""

import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from app.wire.adapter import Layout, Vector

# Runs at a site that have one, newest first: side by side, or resumed after another. A file holds
# two adapters in float32 at most.
RUNS_KEPT = 4


class Feedback:
    """One run's rests at one site: a file in the site's own folder, lost without harm.

    The one of the round before stays too: a round that is repeated, in this run or in one that
    resumes it, starts from the rest that it started from the first time.
    """

    def __init__(
        self, folder: Path, run: str, layout: Layout, privacy: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """``run`` as in ``Strategy.run``. Raises ValueError if it is no such name.

        ``privacy``: what the changes are clipped to, and their noise. A rest of a change that was
        less private is not added to one that is more so, whatever run a message names.
        """
        if not re.fullmatch(r"(\d+:\d+ )*\d+", run):
            raise ValueError(f"run {run!r} is no run id")
        *before, own = (part.partition(":") for part in run.split())
        self._folder, self._size = folder, layout.size
        self._key = layout.hash + (f"-{privacy[0]!r}-{privacy[1]!r}" if any(privacy) else "")
        self._path = self._of(own[0])
        self._before = [(self._of(run_id), int(last)) for run_id, _, last in reversed(before)]

    def _of(self, run_id: str) -> Path:
        return self._folder / f"feedback-{run_id}.safetensors"

    def read(self, server_round: int) -> Vector:
        """The rest [layout.size] before this round; zeros where there is none of this layout."""
        earlier = self._earlier(server_round)
        return earlier[max(earlier)] if earlier else np.zeros(self._size, np.float32)

    def _earlier(self, server_round: int) -> dict[int, Vector]:
        """By round: this run's or, while it has none, of the run that it goes on from."""
        for path, last in ((self._path, server_round - 1), *self._before):
            if found := self._stored(path, last):
                return found
        return {}

    def _stored(self, path: Path, last: int) -> dict[int, Vector]:
        try:
            stored = load(path.read_bytes())
        except (OSError, SafetensorError):
            return {}
        found = {}
        for name, rest in stored.items():
            key, _, number = name.rpartition(".")
            ours = key == self._key and number.isdecimal()
            whole = rest.shape == (self._size,) and rest.dtype == np.float32
            if ours and whole and int(number) <= last and np.isfinite(rest).all():
                found[int(number)] = rest
        return found

    def write(self, server_round: int, rest: Vector) -> None:
        """Keep what this round left out; of other runs only the RUNS_KEPT - 1 that wrote last.

        Raises:
            OSError: the folder cannot be written.
        """
        earlier = self._earlier(server_round)
        kept = {n: earlier[n] for n in [max(earlier)]} if earlier else {}
        named = {f"{self._key}.{n}": v for n, v in (kept | {server_round: rest}).items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_bytes(save(named))
        part.replace(self._path)
        self._forget()

    def _forget(self) -> None:
        found = {p: p.stat().st_mtime_ns for p in self._folder.glob("feedback-*.safetensors")}
        others = sorted(found.keys() - {self._path}, key=lambda p: found[p], reverse=True)
        # A SuperNode has one ClientApp at a time: another's .part was left by one that was killed.
        torn = self._folder.glob("feedback-*.part")
        for old in (*others[RUNS_KEPT - 1 :], *torn):
            old.unlink(missing_ok=True)
