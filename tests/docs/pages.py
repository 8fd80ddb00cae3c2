"""A page as its readers and a machine see it: code, commands, links, headings."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.samples import REPOSITORY

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One Markdown file; ``text`` may be another than what stands on the disk."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> "Page":
        return cls(path, path.read_text(encoding="utf-8"))

    @cached_property
    def prose(self) -> str:
        """Everything but the fenced blocks."""
        return _FENCE.sub("", self.text)

    @cached_property
    def spans(self) -> list[str]:
        """Code between backticks, line ends as spaces."""
        return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def commands(self) -> list[tuple[str, str]]:
        """Each line of the ``sh`` blocks: what is run, and the comment behind it."""
        lines = [
            line
            for language, block in _FENCE.findall(self.text)
            if language == "sh"
            for line in block.splitlines()
            if line.strip() and not line.startswith("#")
        ]
        parts = [re.split(r"\s+# ", line, maxsplit=1) for line in lines]
        return [(p[0].strip(), p[1] if len(p) > 1 else "") for p in parts]

    @cached_property
    def code(self) -> list[str]:
        """All spans, commands and lines of fenced blocks."""
        blocks = [
            line
            for language, block in _FENCE.findall(self.text)
            if language != "sh"
            for line in block.splitlines()
        ]
        return [*self.spans, *(command for command, _ in self.commands), *blocks]

    @cached_property
    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
        return {title.replace(" ", "-") for title in plain}

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose) + re.findall(r'src="([^"]+)"', self.prose)


def all_pages() -> list[Page]:
    top = (REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))
    return [Page.read(path) for path in (*top, *sorted((REPOSITORY / "docs").glob("*.md")))]
