"""How far a long step is: a bar in a terminal, elsewhere a line now and then. Both on stderr."""

import sys
import time
from typing import Any

from huggingface_hub.utils.tqdm import tqdm

EVERY_S = 10.0
BYTES = "huggingface_hub.snapshot_download"  # the hub's own name for the bar that counts all bytes
STEPS = "steps"
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left"


class Progress(tqdm):  # type: ignore[misc]
    """tqdm; of the hub's client's three bars only the one of the bytes."""

    def __init__(self, *args: Any, name: str = "", desc: str = "", **given: Any) -> None:
        self._bar, self._due = sys.stderr.isatty(), time.monotonic() + EVERY_S
        given |= {"leave": self._bar, "bar_format": None if self._bar else LINE}
        what = "download" if name == BYTES else f"prepare: {desc.lower()}"
        given |= {"desc": what, "disable": name not in (BYTES, STEPS)}
        super().__init__(*args, **given)  # type: ignore[no-untyped-call]

    def set_description(self, *_: object, **__: object) -> None:
        """It keeps its own."""

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """As tqdm's, where the bar is drawn."""
        if self._bar:
            return super().display(msg, pos)
        if msg is None and time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY_S
            print(self, file=sys.stderr, flush=True)
        return None


def of_steps(_: object, args: tuple[Any, ...], given: dict[str, Any]) -> Progress:
    """For Transformers' ``set_tqdm_hook``."""
    return Progress(*args, **given | {"name": STEPS})
