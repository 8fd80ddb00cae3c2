"""What a site's last coarse upload left out, kept until its next (error feedback).

Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847. Quantising loses a little
of every change, always the small ones; what is lost is added to the next change instead.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from app.adapter import Layout, Vector


class Feedback:
    """One run's rest at one site: a file in the site's own folder, lost without harm."""

    def __init__(self, folder: Path, run_id: int, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._path = folder / f"feedback-{run_id}.safetensors"

    def read(self) -> Vector:
        """The rest [layout.size]; zeros where there is none, or none of this layout."""
        zeros = np.zeros(self._layout.size, np.float32)
        try:
            rest = load(self._path.read_bytes())[self._layout.hash]
        except (OSError, SafetensorError, KeyError):
            return zeros
        usable = rest.shape == zeros.shape and rest.dtype == zeros.dtype
        return rest if usable and np.isfinite(rest).all() else zeros

    def write(self, rest: Vector) -> None:
        """Replace the rest, and forget those of other runs.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_bytes(save({self._layout.hash: rest}))
        part.replace(self._path)
        for old in self._folder.glob("feedback-*"):
            if old != self._path:
                old.unlink(missing_ok=True)
