"""What a site says, made fit to keep and to show: it may write what it likes, and as much.

Every text of a site passes here before it reaches a log, run.json or a comparison.
"""

import json
import re
from typing import Self

from app.wire import failure

LINE = 500  # characters of a text that is shown
ENTRIES, ENTRY = 32, 100  # of a table such as the versions; characters of a key or a value
LAYERS, LAYERS_TEXT = 50_000, 2**22  # linear layers of a model; characters that name them
_LAYER_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")


class UnfitError(ValueError):
    """A site's answer is none; the message is ours, without a word of the site's."""


def one_line(text: str, most: int = LINE) -> str:
    """At most so many printable characters on one line: no line ends, no escape codes."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * most])
    return " ".join(shown.split())[:most]


class Reason(str):
    """Why a site has failed, on one line.

    Attributes:
        lines: the last of its log, as it has sent them with that; none where its policy keeps them.
    """

    lines: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> Self:
        """``text``: of ``failure.joined``, or whatever a site has put in its place."""
        why, lines = failure.parted(text)
        made = cls(one_line(why))
        made.lines = tuple(filter(None, (one_line(line, failure.LINE) for line in lines)))
        return made


def count(value: object, what: str) -> int:
    """A whole number from 0 to below 10^9. Raises UnfitError."""
    if type(value) is not int or not 0 <= value < 10**9:
        raise UnfitError(f"{what} is no whole number from 0 to below 10^9")
    return value


def table(text: object, what: str) -> dict[str, str]:
    """A small JSON object of texts. Raises UnfitError, and json's own errors."""
    parsed = json_object(text, what, 2 * ENTRIES * ENTRY, ENTRIES)
    return {one_line(key, ENTRY): one_line(str(value), ENTRY) for key, value in parsed.items()}


def linear_layers(text: object) -> dict[str, list[int]]:
    """Layer name -> [out, in], in the site's order. Raises UnfitError, and json's own errors."""
    layers = {}
    for name, shape in json_object(text, "linear-layers", LAYERS_TEXT, LAYERS).items():
        if not _LAYER_NAME.fullmatch(name) or not isinstance(shape, list) or len(shape) != 2:
            raise UnfitError("linear-layers are not names of modules with two sizes each")
        layers[name] = [count(size, "a size in linear-layers") for size in shape]
    return layers


def json_object(text: object, what: str, most: int, entries: int) -> dict[str, object]:
    """A JSON object of at most so many characters and entries. Raises as above."""
    if not isinstance(text, str):
        raise UnfitError(f"{what} is no text")
    if len(text) > most:
        raise UnfitError(f"{what} has {len(text)} characters, at most {most} are taken")
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise UnfitError(f"{what} is no JSON object")
    if len(parsed) > entries:
        raise UnfitError(f"{what} has {len(parsed)} entries, at most {entries} are taken")
    return parsed
