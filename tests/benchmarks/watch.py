"""CPU seconds and memory of the processes that a benchmark has started, once a second."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import psutil

Side = Callable[[list[int]], str]


@dataclass(frozen=True)
class Seen:
    """One look.

    Attributes:
        at: time.time().
        cpu_s: by side, of the processes that live and the children that they have waited for.
        pss_bytes: by side; a page that n processes share counts 1/n in each.
    """

    at: float
    cpu_s: Mapping[str, float]
    pss_bytes: Mapping[str, int]


def look(side: Side, weighed: frozenset[str]) -> Seen:
    """All processes below this one, now.

    Args:
        side: names what a process belongs to, by its process id and those of its parents up to
            (not including) this process; empty: to nothing that counts.
        weighed: the sides whose memory is wanted: it costs some milliseconds a process.
    """
    cpu_s: Counter[str] = Counter()
    pss_bytes: Counter[str] = Counter()
    for process, line in _below_this_one():
        name = side(line)
        with suppress(psutil.NoSuchProcess):  # or ended meanwhile
            if name:
                times = process.cpu_times()
                cpu_s[name] += (
                    times.user + times.system + times.children_user + times.children_system
                )  # type: ignore[assignment]
            if name in weighed:
                pss_bytes[name] += process.memory_full_info().pss
    return Seen(time.time(), cpu_s, pss_bytes)


def _below_this_one() -> Iterator[tuple[psutil.Process, list[int]]]:
    found: dict[int, tuple[psutil.Process, int]] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[process.pid] = process, process.ppid()
    for pid, (process, _) in found.items():
        line = [pid]
        while (parent := found[line[-1]][1]) != os.getpid() and parent in found:
            line.append(parent)
        yield process, line


class Watch:
    """Looks once a second; use as a context manager."""

    def __init__(self, side: Side, weighed: frozenset[str]) -> None:
        self.seen: list[Seen] = []
        self._side, self._weighed = side, weighed
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            self.seen.append(look(self._side, self._weighed))

    def peak_bytes(self, side: str, begin: float = 0.0, end: float = float("inf")) -> int:
        """The most that this side held between two times."""
        return max((s.pss_bytes.get(side, 0) for s in self.seen if begin <= s.at <= end), default=0)

    def cpu_s(self, side: str, begin: float, end: float) -> float:
        """What this side computed between two times, to a second's accuracy."""
        inside = [s.cpu_s.get(side, 0.0) for s in self.seen if begin - 1 <= s.at <= end + 1]
        return max(inside) - min(inside) if inside else 0.0
