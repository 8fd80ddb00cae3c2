"""The file of a comparison's results, a JSON line each, and which of them still count."""

import json
from pathlib import Path
from typing import Any

Key = tuple[str, int]  # line and seed


class CompareError(Exception):
    """A comparison that cannot be made; the message is one line for the user."""


def known(path: Path) -> list[dict[str, Any]]:
    """The results so far. A last line that was cut off is taken away: it is run again.

    Raises:
        CompareError: a line is not what a comparison writes.
    """
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        path.write_bytes(content)
    found = []
    for number, text in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(text)
            record["line"], record["seed"], record["loss"], record["made_of"].items()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CompareError(f"{path}, line {number}: not what compare writes; move it") from None
        found.append(record)
    return found


def fitting(
    records: list[dict[str, Any]], wanted: dict[Key, dict[str, Any]]
) -> tuple[dict[Key, dict[str, Any]], dict[str, list[str]]]:
    """The results that are wanted, made of the very same, by (line, seed); and why others are not.

    Returns:
        Those, and reason -> the results that it is true of, in words.
    """
    found: dict[Key, dict[str, Any]] = {}
    others: dict[str, list[str]] = {}
    for record in records:
        key = record["line"], record["seed"]
        now, then = wanted.get(key), record["made_of"]
        if now == then:
            found.setdefault(key, record)
            continue
        why = "no line or seed of the file any more"
        if now is not None:
            keys = [k for k in now.keys() | then.keys() if now.get(k) != then.get(k)]
            told = [k if " of the " in k or k == "versions" else f"{k} = {json.dumps(then.get(k))} "
                    f"then, {json.dumps(now.get(k))} now" for k in sorted(keys)]  # fmt: skip
            why = f"made of something else: {'; '.join(told)}"
        others.setdefault(why, []).append(f"{key[0]}, seed {key[1]}")
    return found, others
