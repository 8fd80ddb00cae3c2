"""An HTTP proxy that lets a client through with CONNECT, as a hospital's does, or refuses it."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ConnectProxy:
    """On ``port`` of 127.0.0.1; ``asked`` holds the first line and headers of every request.

    It leads to ``leads_to`` whatever it is asked for, where that is given.
    """

    def __init__(self, refuses: bool = False, leads_to: int = 0) -> None:
        self.asked: list[str] = []
        self._refuses, self._leads_to = refuses, leads_to
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(near,), daemon=True).start()

    def _answer(self, near: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += near.recv(1)
        self.asked.append(head.decode())
        if self._refuses:
            near.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return near.close()
        host, _, port = head.split()[1].decode().rpartition(":")
        far = socket.create_connection((host, self._leads_to or int(port)))
        near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        threading.Thread(target=_copy, args=(far, near), daemon=True).start()
        _copy(near, far)


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(2**16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def connect_proxy(refuses: bool = False, leads_to: int = 0) -> Iterator[ConnectProxy]:
    proxy = ConnectProxy(refuses, leads_to)
    try:
        yield proxy
    finally:
        proxy.close()
