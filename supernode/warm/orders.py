"""The SuperNode's side: an order to compute starts the fork server, unless one is there."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from flwr.app import MessageType


class Keeper:
    """The fork server of this process: started when it is needed, at ``path``.

    One that could not serve (it says why in the log) is not started again.
    """

    def __init__(self, path: Path, idle_s: float) -> None:
        self._path, self._idle_s = path, idle_s
        self._server: subprocess.Popen[bytes] | None = None

    def order_received(self, kind: str) -> None:
        """To be called before Flower starts a ClientApp for it. ``kind`` is the message's type."""
        if kind.partition(".")[0] == MessageType.QUERY:  # a preflight: it needs no torch
            return
        ended = self._server.poll() if self._server else 0
        if ended is None or ended > 0:
            return
        try:
            self._start()
        except OSError as err:
            print(f"supernode: no warm ClientApps: {self._path}: {err.strerror or err}", flush=True)
            self._path.unlink(missing_ok=True)

    def _start(self) -> None:
        """Who connects from now on is answered, or turned away when the server has ended."""
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen()
            self._server = subprocess.Popen(
                [
                    sys.executable, "-m", "supernode.warm",
                    str(listener.fileno()), str(self._idle_s), str(os.getpid()),
                ],
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )  # fmt: skip


def install(path: Path, idle_s: float) -> None:
    """Let this process's SuperNode have its orders done by warm ClientApps."""
    from flwr.supernode import start_client_internal as flower

    receive, keeper = flower._pull_and_store_message, Keeper(path, idle_s)

    def receive_noting(**given: Any) -> int | None:
        def note() -> Any:
            received = given["receive"]()
            if received is not None:
                keeper.order_received(received[0].metadata.message_type)
            return received

        return receive(**given | {"receive": note})

    flower._pull_and_store_message = receive_noting  # type: ignore[assignment]
