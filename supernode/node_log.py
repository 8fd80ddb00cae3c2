"""A site's log: what gets into it, and what its SuperNode's entrypoint reads in it.

What libraries warn of is for who writes code, and is left out unless these variables are set.

Read is what Flower says while it joins, and nothing that others say in it.
Later the log also holds what a run's code prints and texts that a run chooses: they are passed on
without what could steer a terminal, and mean nothing here.
"""

import logging
import os
import re
import warnings

QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
# Escape sequences whole, then what is left of control characters (not tab and newline), and the
# characters that break a line or turn its direction.
_NO_TEXT = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)
_SAYS_NOTHING = re.compile(r"(INFO *: *)?\n?")
_JOINED = re.compile(r"INFO\b.*: +SuperNode ID: \d+\n?")
_NOT_JOINED = re.compile(r"ERROR\b.*: +<_InactiveRpcError of RPC that terminated with:\n?")
_REASON = '\tdetails = "'


def quiet() -> None:
    """Let this process's libraries, not imported yet, keep their warnings to themselves."""
    os.environ.update(QUIET | os.environ)
    if os.environ["PYTHONWARNINGS"] == "ignore":
        warnings.simplefilter("ignore")
        if logging.lastResort:  # which prints what nobody has a handler for
            logging.lastResort.setLevel(logging.ERROR)


def plain(line: str) -> str:
    """``line`` as text alone; nothing, if it says nothing (Flower has empty ones as spaces)."""
    text = _NO_TEXT.sub("", line)
    return "" if _SAYS_NOTHING.fullmatch(text) else text


class Joining:
    """Flower's own words on why a SuperNode could not join; to be given its log line by line."""

    def __init__(self) -> None:
        self._over = self._failed = False

    def reason(self, line: str) -> str:
        """What this plain line says about it, or nothing; after joining, nothing any more."""
        self._over = self._over or _JOINED.fullmatch(line) is not None
        if self._over:
            return ""
        self._failed = self._failed or _NOT_JOINED.fullmatch(line) is not None
        return line if self._failed and line.startswith(_REASON) else ""
