"""The fork server with real processes, sockets and signals; what it forks here is cheap."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.samples import REPOSITORY

# A fork server whose orders are Python code: the first of their arguments.
SERVER = """
import os, socket, sys
from supernode.warm.ending import end_with
from supernode.warm.server import Server
end_with(int(sys.argv[3]))
{before}
order = Server(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])).run()
if order is None:
    sys.exit(0)
exec(order.argv[0], {"argv": order.argv})
"""
ASKING = """
import sys
from supernode.warm.asking import ask
from supernode.warm.ending import end_like
status = ask(sys.argv[1], sys.argv[2:])
if status is None:
    sys.exit("nobody: " + " ".join(sys.argv[2:]))
end_like(status)
"""


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Warm:
    """A fork server in ``folder``, and programs that ask it."""

    def __init__(self, folder: Path, idle_s: float = 60, before: str = "") -> None:
        self.socket = folder / "warm.socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.socket))
            listener.listen()
            arguments = [str(listener.fileno()), str(idle_s), str(os.getpid())]
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVER.replace("{before}", before), *arguments],
                pass_fds=[listener.fileno()], cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip

    def start(self, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", ASKING, str(self.socket), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=self.socket.parent, start_new_session=True,
            env={"PYTHONPATH": str(REPOSITORY)} | env,
        )  # fmt: skip

    def do(self, *arguments: str, said: str = "", **env: str) -> tuple[int, str, str]:
        """Exit code, output and errors of a program that reads ``said``."""
        with self.start(*arguments, **env) as program:
            out, err = program.communicate(said, timeout=20)
        return program.returncode, out, err


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    made = Warm(tmp_path)
    yield made
    made.server.kill()
    made.server.wait()


def line(program: "subprocess.Popen[str]") -> str:
    assert program.stdout
    return program.stdout.readline().strip()


# --- the program is what it asked for ---


def test_the_work_has_the_programs_arguments_folder_environment_and_streams(warm: Warm) -> None:
    code = (
        "import os, sys\n"
        "print(argv[1:], os.getcwd(), ascii(os.environ['SITE']), os.environ.get('HOME'), input())\n"
        "print('to the log', file=sys.stderr)\n"
        "sys.exit(7)"
    )
    text = "täglich\udce9"  # as Python has what is no UTF-8
    done = warm.do(code, "--token", "x y", said="from stdin\n", SITE=text)
    assert done[0] == 7
    said = f"['--token', 'x y'] {warm.socket.parent} {text!a} None from stdin\n"
    assert done[1:] == (said, "to the log\n")


def test_each_order_is_a_new_process_of_one_server_and_sees_nothing_of_the_last(warm: Warm) -> None:
    code = "import os, sys; print(os.getppid(), 'left' in dir(sys)); sys.left = 1"
    for _ in range(2):
        assert warm.do(code) == (0, f"{warm.server.pid} False\n", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_work_that_is_killed_takes_nobody_with_it(warm: Warm, number: signal.Signals) -> None:
    with warm.start("import time; print('there', flush=True); time.sleep(60)") as other:
        assert line(other) == "there"
        assert warm.do(f"import os; os.kill(os.getpid(), {number})")[0] == -number
        assert other.poll() is None
        assert warm.do("print('next')") == (0, "next\n", "")
        other.kill()


def test_a_signal_reaches_the_work_once_and_its_end_the_program(warm: Warm) -> None:
    code = (
        "import signal, time\n"
        "seen = []\n"
        "for n in (1, 2, 3, 15): signal.signal(n, lambda n, _: seen.append(n))\n"
        "print('ready', flush=True)\n"
        "while len(seen) < 4: time.sleep(0.02)\n"
        "time.sleep(0.3); print(sorted(seen), flush=True)"
    )
    with warm.start(code) as program:
        assert line(program) == "ready"
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            os.killpg(program.pid, number)  # as a terminal does
        assert line(program) == "[1, 2, 3, 15]"
        assert program.wait(20) == 0


def test_a_program_that_is_asked_to_end_does_as_its_work_does(warm: Warm) -> None:
    with warm.start("import time; print('there', flush=True); time.sleep(60)") as program:
        assert line(program) == "there"
        program.terminate()
        assert program.wait(20) == -signal.SIGTERM


# --- who ends with whom ---

FAMILY = (
    "import os, signal, time\n"
    "for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
    "print(os.getpid(), os.fork() or os.getpid(), flush=True)\n"
    "time.sleep(60)"
)


def family(program: "subprocess.Popen[str]") -> set[int]:
    """Process ids of what FAMILY has started, itself included."""
    return {int(word) for _ in range(2) for word in line(program).split()}


def test_with_the_program_all_ends_that_was_started_for_it(warm: Warm) -> None:
    with warm.start(FAMILY) as program:
        pids = family(program)
        assert len(pids) == 2
        program.kill()
    for pid in pids:
        until(lambda pid=pid: gone(pid))  # type: ignore[misc]
    assert warm.do("print('next')")[1] == "next\n"


def test_with_the_server_its_work_and_the_program_end(warm: Warm) -> None:
    with warm.start("import os, time; print(os.getpid(), flush=True); time.sleep(60)") as program:
        pid = int(line(program))
        warm.server.kill()
        assert program.wait(20) == -signal.SIGKILL
    until(lambda: gone(pid))


def test_with_the_supernode_server_work_and_program_end(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    node = (
        "import sys, time; from pathlib import Path; from tests.supernode.test_warm import Warm\n"
        "warm = Warm(Path(sys.argv[1])); program = warm.start(sys.argv[2])\n"
        "print(warm.server.pid, program.pid, program.stdout.readline(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", node, str(tmp_path), code],
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY,
    ) as supernode:  # fmt: skip
        pids = [int(word) for word in line(supernode).split()]
        assert len(pids) == 3
        supernode.kill()
    for pid in pids:
        until(lambda pid=pid: gone(pid))  # type: ignore[misc]


def test_a_lock_is_held_for_as_long_as_the_work_that_took_it(warm: Warm, tmp_path: Path) -> None:
    file = tmp_path / "device.lock"
    file.touch()
    hold = f"import fcntl, time; f = open({str(file)!r}); fcntl.flock(f, 2); print(1, flush=True)"
    with file.open() as lock, warm.start(f"{hold}; time.sleep(60)") as program:
        line(program)
        warm.do("print('another order meanwhile')")
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        program.kill()
        fcntl.flock(lock, fcntl.LOCK_EX)  # hangs if somebody keeps it


def test_the_server_ends_when_nothing_happens_and_not_while_somebody_works(tmp_path: Path) -> None:
    warm = Warm(tmp_path, idle_s=0.5)
    assert warm.do("import time; time.sleep(1.5); print('done')") == (0, "done\n", "")
    assert warm.server.wait(20) == 0
    assert warm.do("--token", "t") == (1, "", "nobody: --token t\n")


# --- without a server ---


def test_an_order_that_must_not_be_forked_is_not_taken(tmp_path: Path) -> None:
    wait = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    warm = Warm(tmp_path, before=f"import threading; {wait}")
    assert warm.do("--token", "t") == (1, "", "nobody: --token t\n")
    assert warm.server.wait(20) == 1


# --- whom it serves, and when it must not fork ---


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_users_program_is_turned_away(warm: Warm) -> None:
    warm.socket.chmod(0o777)
    warm.socket.parent.chmod(0o755)  # as wide as a mistake could make it
    asking = (  # from within the folder: those above it are pytest's, and closed
        "import os; from supernode.warm.asking import ask; os.setuid(65534)\n"
        f"print(ask({warm.socket.name!r}, ['print(1)']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", asking], cwd=warm.socket.parent, text=True, capture_output=True,
        env={"PYTHONPATH": str(REPOSITORY)}, check=True,
    )  # fmt: skip
    assert done.stdout == "None\n"  # nobody took it
    assert warm.do("print('still there')")[1] == "still there\n"


@pytest.mark.parametrize(
    "sent", [b"", b"\0", b"\0\0\0\4[]{}", b"\0\0\0\2{}", b"\0\0\0\2[]", b"\xff\xff\xff\xff"]
)
def test_what_is_no_order_ends_nothing(warm: Warm, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(warm.socket))
        socket.send_fds(client, [sent or b"x"], [0, 1, 2])
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert warm.do("print('still there')")[1] == "still there\n"
    assert (
        len(list(Path(f"/proc/{warm.server.pid}/fd").iterdir())) < 12
    )  # and nothing is kept of it


def test_a_process_with_two_threads_or_with_cuda_does_not_fork(tmp_path: Path) -> None:
    code = (
        "import sys, threading; from supernode.warm.server import check_safe\n"
        "check_safe(); print('safe', flush=True)\n"
        "if sys.argv[1]: kept = open(sys.argv[1])\n"
        "else: threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "check_safe()"
    )
    (tmp_path / "nvidia-uvm").touch()
    for argument, why in (("", "it has 2 threads"), (str(tmp_path / "nvidia-uvm"), "CUDA")):
        done = subprocess.run(
            [sys.executable, "-c", code, argument],
            cwd=REPOSITORY, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == "safe\n"
        assert "UnsafeError: " in done.stderr
        assert why in done.stderr.splitlines()[-1]
