"""A program in a real pseudo-terminal, and what is to be seen in it afterwards."""

import fcntl
import os
import pty
import re
import signal
import subprocess
import termios
from contextlib import suppress

from tests.samples import REPOSITORY

_PARTS = re.compile(r"\x1b\[\??([\d;]*)([a-zA-Z])|(\r)|(\n)|([^\x1b\r\n]+)")


def _take_it() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # Started from a background job of a shell, the tests ignore it, and so would what they start.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """``command`` in a terminal of its own; it gets Ctrl-C from ``type``."""

    def __init__(self, command: list[str], columns: int = 100, **env: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (50, columns))
        kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=theirs, stdout=theirs, stderr=theirs,
            env=kept | {"TERM": "xterm-256color", **env}, start_new_session=True,
            preexec_fn=_take_it,
        )  # fmt: skip
        os.close(theirs)
        self.output = ""

    def read_until(self, text: str = "") -> None:
        """Read on until ``text`` was written; without one, until nobody writes any more."""
        with suppress(OSError):  # a terminal's way to say that its last user has ended
            while not text or text not in self.output:
                part = os.read(self._ours, 2**16)
                if not part:
                    return
                self.output += part.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def end(self) -> int:
        """Its exit code, once all that it wrote is read."""
        self.read_until()
        os.close(self._ours)
        return self.process.wait(30)

    def screen(self) -> list[str]:
        """The lines that are to be seen, as this output leaves them."""
        lines, row, column = [""], 0, 0
        for number, letter, back, down, text in _PARTS.findall(self.output):
            if back:
                column = 0
            elif down:
                row += 1
                lines += [""] * (row == len(lines))
            elif text:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + text + line[column + len(text) :]
                column += len(text)
            elif letter == "A":
                row -= int(number or 1)
                assert row >= 0
            elif letter == "K":
                assert number == "2"
                lines[row] = ""
            else:
                assert letter in "mhl", (
                    f"an escape sequence that this terminal does not know: {letter}"
                )
        return [line.rstrip() for line in lines]
