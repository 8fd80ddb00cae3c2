"""Flower's SuperExec, but its ClientApps are forked: it has Flower's libraries already."""

import gc
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from flwr.supercore.cli import flower_superexec
from flwr.supercore.exit import exit_handler
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supernode.cli import flwr_clientapp

from supernode.node_log import quiet
from supernode.warm import lost
from supernode.warm.asking import ask
from supernode.warm.ending import end_at_once, end_like, end_with, name_process
from supernode.warm.server import UnsafeError, check_safe, end_idle_threads

_tokens: dict[int, str] = {}  # process id of a ClientApp -> its token


class Forked(BaseException):
    """Raised in the process that was forked to be this command: nothing of the parent goes on."""


def start(command: list[str], stdout: int | None = None, stderr: int | None = None) -> None:
    """In the place of ``subprocess.Popen``."""
    try:
        if stdout or stderr:
            raise UnsafeError("its output goes elsewhere")
        check_safe()
        sys.stdout.flush()
        sys.stderr.flush()
        own = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until its token is noted
        try:
            child = os.fork()
            if child:
                _tokens[child] = command[command.index("--token") + 1]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        if not child:
            end_with(own)
            raise Forked(*command)
    except UnsafeError as err:
        print(f"supernode: a cold ClientApp: SuperExec cannot fork: {err}", flush=True)
        subprocess.Popen(command, stdout=stdout, stderr=stderr)


def reap(*_: object) -> None:
    """See who of them has ended; Flower waits for none."""
    for child in list(_tokens):
        with suppress(ChildProcessError):  # another signal amid this one was faster
            ended, status = os.waitpid(child, os.WNOHANG)
            token = _tokens.pop(child) if ended else ""
            if token and status:
                lost.tell(Path(os.environ["APPS_SEEN"]).parent, token)


def work(command: list[str]) -> NoReturn:
    """Be Flower's program of this command line, or let the fork server be it."""
    for number in (signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exit_handler.registered_exit_handlers.clear()
    name_process()
    if socket := os.environ.get("WARM_SOCKET"):
        status = ask(socket, command)
        if status is not None:
            end_like(status)
    sys.argv = command
    try:
        flwr_clientapp()
    except SystemExit as end:
        end_at_once(end.code)
    sys.exit()


def main() -> None:
    # Flower's own look at its parent is a second thread.
    where = sys.argv.index("--parent-pid")
    end_with(int(sys.argv[where + 1]), signal.SIGTERM)
    del sys.argv[where : where + 2]
    sys.path[0] = str(Path(sys.executable).parent)  # as Flower's own programs have it
    starts = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
    vars(subprocess_executor)["subprocess"] = starts
    quiet()  # for a ClientApp that nobody else forks
    end_idle_threads()
    gc.freeze()
    signal.signal(signal.SIGCHLD, reap)
    try:
        sys.exit(flower_superexec())  # type: ignore[func-returns-value]
    except Forked as forked:
        command = list(forked.args)
    work(command)


if __name__ == "__main__":
    main()
