"""Has the fork server do the work that a process is there for.

Arguments, folder, environment and the three streams go over its socket, signals follow; back comes
how the work ended. Once the fork server has taken it, nobody else may: it could be done twice.
"""

import json
import os
import signal
import socket
from pathlib import Path

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TAKEN = b"\x01"
_LOST = signal.SIGKILL  # the wait status of what is gone with its fork server


def ask(path: str, argv: list[str]) -> int | None:
    """Have the work done; its wait status, or None if nobody took it."""
    order = {"argv": argv, "cwd": str(Path.cwd()), "env": dict(os.environ)}
    text = json.dumps(order).encode()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(path)
            socket.send_fds(server, [len(text).to_bytes(4, "big")], [0, 1, 2])
            server.sendall(text)
            if server.recv(1) != TAKEN:
                return None
        except OSError:
            return None
        for number in PASSED_ON:
            signal.signal(number, lambda n, _: server.send(bytes([n])))
        try:
            status = server.recv(4, socket.MSG_WAITALL)
        except OSError:
            status = b""
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
    return int.from_bytes(status, "big") if len(status) == 4 else _LOST
