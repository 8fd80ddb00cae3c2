"""requirements.lock, read: what `make lock` wrote, one entry a package and environment."""

import re
from dataclasses import dataclass

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.samples import REPOSITORY

LOCK = REPOSITORY / "requirements.lock"
PROJECT = "fedllm-medical (pyproject.toml)"


@dataclass(frozen=True)
class Entry:
    """``name==version ; marker``, and below it the names of whoever asks for it."""

    name: str
    version: str
    marker: Marker | None
    via: tuple[str, ...]

    @property
    def is_for_here(self) -> bool:
        return self.marker is None or self.marker.evaluate()

    def satisfies(self, specifier: SpecifierSet) -> bool:
        return specifier.contains(self.version, prereleases=True)


def read(text: str) -> list[Entry]:
    """All entries.

    Raises:
        ValueError: a line is something else than an exact version: an option, a hash, an address,
            or one build only (torch 2.13.0+cpu).
    """
    entries: list[Entry] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"    # via(?: (\S.*))?|    #   (\S.*)", line):
            asker = match[1] or match[2]
            if asker:
                last = entries.pop()
                entries.append(Entry(last.name, last.version, last.marker, (*last.via, asker)))
        elif line and not line.startswith("#"):
            entries.append(_entry(line))
    return entries


def _entry(line: str) -> Entry:
    requirement = Requirement(line)
    exact = re.fullmatch(r"==([\w.]+)", str(requirement.specifier))
    if not exact or requirement.url or requirement.extras:
        raise ValueError(f"requirements.lock: {line!r} is no name with an exact version")
    return Entry(canonicalize_name(requirement.name), exact[1], requirement.marker, ())


def locked_here() -> dict[str, str]:
    """Name -> version, as far as the entry is for this kind of machine and Python."""
    entries = read(LOCK.read_text(encoding="utf-8"))
    return {e.name: e.version for e in entries if e.is_for_here}
