"""What a site's last coarse upload left out, kept until its next (error feedback).

Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847. Quantising loses a little
of every change, always the small ones; what is lost is added to the next change instead.

A site sends Q(change + rest), and what this leaves out is its new rest. It is in step with the
server if its next upload starts from the rest behind the last of its uploads that the adapter which
it gets then is made of. One that was lost, late or refused, or whose round was repeated or cut off,
is in no adapter: the rest that it started from is still the right one. Only the server knows, so
its orders name the upload that they ask for and the last one that was taken. Where the rest behind
that is not here any more, the site starts anew, from zeros, and its log says so.
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
    """The rests before and after one upload, in the file of its run in the site's own folder.

    Attributes:
        before: the rest [layout.size] that the upload starts from, which is the one behind
            ``taken``: zeros where nothing was taken yet; None where it is not here.
    """

    def __init__(
        self,
        folder: Path,
        upload: str,
        taken: str | None,
        layout: Layout,
        privacy: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """``upload``, ``taken``: names as in ``app.server.orders``.

        ``privacy``: what the changes are clipped to, and their noise. A rest of a change that was
        less private is not added to one that is more so, whatever upload a message names.

        Raises:
            ValueError: one of them is no such name.
        """
        for name in (upload,) if taken is None else (upload, taken):
            if not re.fullmatch(r"([0-9]{1,20}:){2}[0-9]{1,20}", name):
                raise ValueError(f"{name!r} is no name of an upload")
        self._folder, self._size = folder, layout.size
        self._upload, self._taken = upload, taken
        self._key = layout.hash + (f"-{privacy[0]!r}-{privacy[1]!r}" if any(privacy) else "")
        zeros = np.zeros(layout.size, np.float32)
        self.before = zeros if taken is None else self._rest(taken)

    def _path(self, upload: str) -> Path:
        return self._folder / f"feedback-{upload.partition(':')[0]}.safetensors"

    def _rest(self, taken: str) -> Vector | None:
        # A run that goes on after another has taken the rest over, since the other may go on too.
        for path in (self._path(self._upload), self._path(taken)):
            try:
                stored: dict[str, Vector] = load(path.read_bytes())
            except (OSError, SafetensorError):
                continue
            rest = stored.get(f"{self._key}.{taken}")
            if rest is None or rest.shape != (self._size,) or rest.dtype != np.float32:
                continue
            if np.isfinite(rest).all():
                return rest
        return None

    def write(self, rest: Vector) -> None:
        """Keep what the upload leaves out and, since it may not be taken, what it started from.

        Of other runs only the RUNS_KEPT - 1 that wrote last are kept.

        Raises:
            OSError: the folder cannot be written.
        """
        named = {f"{self._key}.{self._upload}": rest}
        if self._taken is not None and self.before is not None:
            named[f"{self._key}.{self._taken}"] = self.before
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self._upload)
        part = path.with_suffix(".part")
        part.write_bytes(save(named))
        part.replace(path)
        self._forget(path)

    def _forget(self, own: Path) -> None:
        found = {p: p.stat().st_mtime_ns for p in self._folder.glob("feedback-*.safetensors")}
        others = sorted(found.keys() - {own}, key=lambda p: found[p], reverse=True)
        # A SuperNode has one ClientApp at a time: another's .part was left by one that was killed.
        torn = self._folder.glob("feedback-*.part")
        for old in (*others[RUNS_KEPT - 1 :], *torn):
            old.unlink(missing_ok=True)
