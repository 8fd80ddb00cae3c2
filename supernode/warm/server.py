"""The fork server: takes orders (``asking``) and forks a process for each that works on it."""

import json
import os
import selectors
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from supernode.warm.asking import PASSED_ON, TAKEN
from supernode.warm.ending import end_with, name_process

REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Order:
    """What the process was started with that asks."""

    argv: list[str]
    cwd: str
    env: dict[str, str]
    streams: tuple[int, ...]  # descriptors of what shall be 0, 1 and 2


class UnsafeError(Exception):
    """A process forked from this one might not work; the message says why."""


def check_safe() -> None:
    """Raises UnsafeError if a fork would not be like a process of its own."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise UnsafeError(f"it has {threads} threads")
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        raise UnsafeError("torch has initialised CUDA in it")
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            # CUDA opens it, also where torch does not know of it; asking NVML does not.
            if descriptor.readlink().name == "nvidia-uvm":
                raise UnsafeError("a library has initialised CUDA in it")


def end_idle_threads() -> None:
    """Libraries that keep threads end them before a fork (OpenBLAS: until it computes again)."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


class Server:
    """Serves programs of this user on ``listener``, with a single thread."""

    def __init__(self, listener: socket.socket, idle_s: float) -> None:
        self._listener, self._idle_s = listener, idle_s
        self._children: dict[int, socket.socket] = {}  # process id -> its program
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._selector = selectors.DefaultSelector()
        for source in (listener, self._woken):
            self._selector.register(source, selectors.EVENT_READ)

    def run(self) -> Order | None:
        """Serve until nothing has happened for ``idle_s`` seconds: None.

        Returns the order in the process that was forked for it, which is the order's own then:
        session, folder, environment and streams.

        Raises:
            UnsafeError: see ``check_safe``; no order was taken since.
        """
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready = self._selector.select(None if self._children else self._idle_s)
            if not ready and not self._children:
                return None
            for key, _ in ready:
                source = cast(socket.socket, key.fileobj)
                if source is self._woken:
                    source.recv(4096)
                elif source is not self._listener:
                    self._heard(source)
                elif order := self._accept():
                    return order
            self._reap()

    def _accept(self) -> Order | None:
        program, _ = self._listener.accept()
        program.settimeout(REQUEST_TIMEOUT_S)
        try:
            order = _read(program)
        except (OSError, ValueError, KeyError, TypeError):
            program.close()
            return None
        try:
            check_safe()
            sys.stdout.flush()
            sys.stderr.flush()
            own = os.getpid()
            child = os.fork()
            if child == 0:
                end_with(own)
                self._leave(program)
                _become(order)
                return order
        except UnsafeError:
            program.close()
            raise
        except OSError:  # no process more
            program.close()
            return None
        finally:
            for stream in order.streams:
                os.close(stream)
        self._children[child] = program
        self._selector.register(program, selectors.EVENT_READ)
        with suppress(OSError):
            program.sendall(TAKEN)
        return None

    def _heard(self, program: socket.socket) -> None:
        """A program passes a signal on, or has ended."""
        child = next(c for c, p in self._children.items() if p is program)
        try:
            numbers = program.recv(64)
        except OSError:
            numbers = b""
        for number in numbers:
            if number in PASSED_ON:
                os.kill(child, number)
        if not numbers:  # nobody waits for it: all that it has started ends too
            self._selector.unregister(program)
            for end in (os.kill, os.killpg):  # it may have no group of its own yet
                with suppress(ProcessLookupError):
                    end(child, signal.SIGKILL)

    def _reap(self) -> None:
        while self._children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            program = self._children.pop(child)
            with suppress(KeyError):
                self._selector.unregister(program)
            with suppress(OSError):
                program.sendall(status.to_bytes(4, "big"))
            program.close()

    def _leave(self, program: socket.socket) -> None:
        """In what is forked: nothing of the server is left."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for end in (program, self._listener, self._woken, self._waker, *self._children.values()):
            end.close()


def _read(program: socket.socket) -> Order:
    """Raises OSError or ValueError: it is another user's, or sends something else."""
    credentials = program.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    if struct.unpack("3i", credentials)[1] != os.getuid():
        raise ValueError("another user's")
    size, streams, _, _ = socket.recv_fds(program, 4, 3)
    try:
        if len(streams) != 3 or len(size) != 4:
            raise ValueError("not three streams")
        missing, text = int.from_bytes(size, "big"), b""
        while missing and (part := program.recv(missing)):
            missing, text = missing - len(part), text + part
        order = json.loads(text)
        return Order(order["argv"], order["cwd"], order["env"], tuple(streams))
    except (OSError, ValueError, KeyError, TypeError):
        for stream in streams:
            os.close(stream)
        raise


def _become(order: Order) -> None:
    os.setsid()  # so that it can be ended with all that it starts
    name_process()
    for number, stream in enumerate(order.streams):
        os.dup2(stream, number)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.env)
