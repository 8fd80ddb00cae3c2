#!/usr/bin/env -S python3 -ISE
"""What Flower starts as ``flwr-clientapp``: lets the fork server do the work, and ends as it does.

The standard library only, and little of it: this runs once for every order. Arguments, folder,
environment and the three streams go over the socket that WARM_SOCKET names, signals follow; back
comes how the work ended. If the fork server does not take the order, the next ``flwr-clientapp`` in
the PATH does. Once it has taken it, nobody else may: the order could be worked on twice.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
TAKEN = b"\x01"
_LOST = signal.SIGKILL  # the wait status of what is gone with its fork server


def main() -> None:
    status = ask(os.environ.get("WARM_SOCKET", ""))
    if status is None:
        ordinary()
    else:
        end_like(status)


def ask(path: str) -> int | None:
    """Have the work done; its wait status, or None if nobody took it."""
    if not path:
        return None
    # No pathlib here: it costs as much as all the rest.
    order = {"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}  # noqa: PTH109
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


def ordinary() -> None:
    """Become Flower's own program, the next of this name in the PATH."""
    own, name = os.path.split(sys.argv[0])
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        program = os.path.join(folder, name)  # noqa: PTH118
        if folder != own and os.access(program, os.X_OK):
            os.execv(program, [program, *sys.argv[1:]])  # noqa: S606
    sys.exit(f"supernode: ERROR: no {name} in the PATH but {own}'s")


def end_like(status: int) -> None:
    """End as a process of this wait status did."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
