"""Calls of the Fleet API that are refused for their words, whoever makes them.

Flower 1.36 writes texts of a call into the SuperLink's log as they came, of any length, with their
line ends and escape codes: a site, and in one case anybody, could put into it what looks like the
SuperLink's own line about another.
"""

import re
from typing import Any

from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

_is_hash = re.compile(r"[0-9a-f]{64}").fullmatch


class RefusedError(Exception):
    """Why a call is refused: one line, for the SuperLink's log and for the caller."""


def check_words(name: str, request: Any) -> None:
    """What should be a hash is one. Raises RefusedError."""
    if name == "RegisterNode":  # off in any case, and its key may be megabytes of a stranger's
        raise RefusedError("superlink.register registers nodes, nobody else")
    texts = [getattr(request, field, "0" * 64) for field in ("hash_str", "object_id")]
    for tree in getattr(request, "message_object_trees", ()):
        texts += [part.object_id for part in iterate_object_tree(tree)]
    if not all(map(_is_hash, texts)):
        raise RefusedError("what should be a SHA-256 is none")
