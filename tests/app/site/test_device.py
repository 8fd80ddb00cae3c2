"""Taking turns on a device, and what the preflight asks of it. There is no GPU here."""

import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.site import device
from app.site.device import Gpu, look, take_turn, turn
from app.site.partition import SiteError
from tests.samples import REPOSITORY


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "locks"
    folder.mkdir()
    monkeypatch.setenv("LOCK_DIR", str(folder))
    monkeypatch.setenv("DEVICE", "cpu")
    yield folder
    for held in [p for p in device._held if p.parent == folder]:
        os.close(device._held.pop(held))


TAKE = (
    "from app.site.device import take_turn; take_turn('site-01', 60); print('taken', flush=True); "
)


def process(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TAKE + code], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def said(node: subprocess.Popen[str]) -> str:
    assert node.stdout
    return node.stdout.readline().strip()


def is_free(path: Path) -> bool:
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_turn_lasts_as_long_as_the_process_and_the_next_one_waits_for_its_end(
    locks: Path,
) -> None:
    first = process("input()")  # as if it were still uploading
    assert said(first) == "taken"
    assert not is_free(locks / "device-cpu.lock")
    with pytest.raises(SiteError, match=r"no turn within 0 s on the CPU, where another"):
        take_turn("site-02", 0.3)
    first.communicate("\n", timeout=30)
    take_turn("site-02", 30)
    take_turn("site-02", 0)  # it has it
    assert not is_free(locks / "device-cpu.lock")


@pytest.mark.parametrize("how", ["fork", "start"])
def test_a_child_left_behind_does_not_keep_the_turn(locks: Path, how: str) -> None:
    fork = "import os, time; pid = os.fork()\nif not pid: time.sleep(60)\nprint(pid, flush=True)"
    start = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    first = process(fork if how == "fork" else start)
    assert said(first) == "taken"
    left = int(said(first))
    try:
        first.wait(30)
        assert Path(f"/proc/{left}").exists()
        assert is_free(locks / "device-cpu.lock")
    finally:
        os.kill(left, 9)
        first.communicate()


def test_of_two_children_of_a_fork_server_one_computes_at_a_time(locks: Path) -> None:
    """The turn is the child's: neither its parent nor its sibling has it, and it ends with it."""
    code = (
        "import os, sys; sys.stdin.close()\n"
        "from app.site.device import take_turn\n"
        "def child(name):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        take_turn(name, 60)\n"
        "        print(name, 'begins', flush=True)\n"
        "        import time; time.sleep(0.5)\n"
        "        print(name, 'ends', flush=True)\n"
        "        os._exit(0)\n"
        "    return pid\n"
        "children = [child('site-01'), child('site-02')]\n"
        "for pid in children: os.waitpid(pid, 0)\n"
        "take_turn('the parent', 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True, check=True
    )
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["begins", "ends"] * 2
    assert names[0] == names[1] != names[2] == names[3]


def test_who_waits_says_so_once_and_then_every_few_minutes(
    locks: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "SAY_EVERY_S", 0.7)
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with (locks / "device-3.lock").open("w") as other, caplog.at_level(logging.INFO, "app"):
        fcntl.flock(other, fcntl.LOCK_EX)
        logging.getLogger("app").addHandler(caplog.handler)
        try:
            with pytest.raises(SiteError, match="no turn within 1 s on GPU 3"):
                take_turn("site-07", 1.2)
        finally:
            logging.getLogger("app").removeHandler(caplog.handler)
    line = "site-07 waits for its turn on GPU 3, where another SuperNode of this host computes"
    lines = list(dict.fromkeys(r.getMessage() for r in caplog.records))
    assert lines == [f"{line} (for 0 s now)", f"{line} (for 1 s now)"]
    take_turn("site-07", 1)  # nobody has it now, and nothing is said
    assert len({r.getMessage() for r in caplog.records}) == 2


def test_another_device_is_another_turn(locks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = [turn(), turn()]
    monkeypatch.setenv("DEVICE", "cuda")
    for gpu in ("0", "1", "MIG-GPU-5c1d/1/0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
        take_turn("site-00", 1)
        names.append(turn())
    assert names[0] == names[1]
    assert len(set(names)) == 4
    assert not [n for n in names if not n.isalnum() or len(n) != 16]
    here = subprocess.run(
        [sys.executable, "-c", "from app.site.device import turn; print(turn())"],
        cwd=REPOSITORY, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert here.stdout.strip() == names[-1]  # in every process of this host


# --- what another site may plant in the folder that all share ---


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "made-by-the-victim")


@pytest.mark.parametrize("plant", [fifo, link, dangling, Path.mkdir])
def test_what_is_no_lock_is_named_and_neither_followed_nor_waited_for(
    locks: Path, plant: Callable[[Path], None]
) -> None:
    path = locks / "device-cpu.lock"
    plant(path)
    started = time.monotonic()
    for use in (turn, lambda: take_turn("site-01", 600)):
        with pytest.raises(SiteError, match=rf"{path}.* lock"):
            use()
    assert time.monotonic() - started < 30
    assert list(locks.iterdir()) == [path]


def test_a_lock_file_that_was_replaced_meanwhile_is_taken_anew(locks: Path) -> None:
    path = locks / "device-cpu.lock"
    path.touch()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        second = process("input()")
        time.sleep(1)  # it waits, or will find the new one
        path.unlink()
        path.touch()
    assert said(second) == "taken"
    assert not is_free(path)  # what the next site will find
    second.communicate("\n", timeout=30)


def test_files_that_nobody_can_write_are_locks_as_well(locks: Path) -> None:
    path = locks / "device-cpu.lock"
    path.touch()
    path.chmod(0o444)
    locks.chmod(0o555)
    try:
        first = process("input()")
        assert said(first) == "taken"
        assert not is_free(path)
        first.communicate("\n", timeout=30)
    finally:
        locks.chmod(0o755)


# --- the check of a GPU ---


@pytest.fixture
def gpu(locks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first in PATH for a stand-in of nvidia-smi; DEVICE=cuda, GPU 2."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    return programs


def nvidia_smi(programs: Path, script: str) -> None:
    program = programs / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_a_gpu_that_torch_cannot_use_is_refused_by_torch_itself(gpu: Path, tmp_path: Path) -> None:
    import torch

    if torch.version.cuda:
        pytest.skip("this torch is built for CUDA")
    nvidia_smi(gpu, "echo 550.54.15, 22500")
    with pytest.raises(SiteError) as caught:
        look(tmp_path / "state")
    assert str(caught.value) == (
        f"DEVICE=cuda, but torch cannot use GPU 2: torch {torch.__version__} is built for the "
        "CPU; mend that, or set DEVICE=cpu"
    )
    assert not (tmp_path / "state").exists()  # a refusal is not remembered: it may be mended
    assert is_free(device._lock_file())


# torch on a host with a GPU, as far as the check goes; the real one: test_cuda.py.
STAND_IN = """
import os, sys, types, pathlib
log = pathlib.Path({log!r})
log.write_text(log.read_text() + "asked " if log.exists() else "asked ")
class Tensor:
    def sum(self):
        {compute}
        return 2.0
sys.modules["torch"] = types.SimpleNamespace(
    __version__="9.9", version=types.SimpleNamespace(cuda="13.0"), ones=lambda *a, **k: Tensor(),
    cuda=types.SimpleNamespace(
        is_available=lambda: True, mem_get_info=lambda: (20_000_000_000, 25_000_000_000),
        get_device_name=lambda: "NVIDIA Stand-in", is_bf16_supported=lambda **k: True,
    ),
)
"""


@pytest.fixture
def torch_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def place(compute: str = "pass") -> Path:
        folder = tmp_path / "stand-in"
        folder.mkdir(exist_ok=True)
        log = tmp_path / "asked"
        code = STAND_IN.format(log=str(log), compute=compute)
        (folder / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return log

    return place


def test_torch_is_asked_once_and_memory_each_time(
    gpu: Path, tmp_path: Path, torch_stand_in: Callable[..., Path]
) -> None:
    log, state = torch_stand_in(), tmp_path / "state"
    nvidia_smi(gpu, '[ "$1" = --id=2 ] && echo 550.54.15, 20480')
    seen = look(state)
    assert seen == Gpu("NVIDIA Stand-in", True, 25_000_000_000, 20480 * 2**20)
    assert str(seen) == "NVIDIA Stand-in, 21.5 GB free of 25.0"
    nvidia_smi(gpu, "echo 550.54.15, 1000")
    assert look(state).free == 1000 * 2**20
    assert log.read_text().split() == ["asked"]
    nvidia_smi(gpu, "echo 560.1, 1000")  # another driver
    look(state)
    assert len(log.read_text().split()) == 2
    (state / "gpu.json").write_text("[]")
    look(state)
    assert len(log.read_text().split()) == 3
    nvidia_smi(gpu, "echo no GPU; exit 9")  # then only torch can tell, each time
    assert [look(state).free for _ in range(2)] == [20_000_000_000] * 2
    assert len(log.read_text().split()) == 5


def test_while_another_site_computes_its_memory_counts_as_free(
    gpu: Path, tmp_path: Path, torch_stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on after a cut must not be refused for what the dead one still trains."""
    torch_stand_in()
    monkeypatch.setattr(device, "LOOK_TIMEOUT_S", 0.5)
    nvidia_smi(gpu, "echo 550.54.15, 77")
    look(tmp_path / "state")
    other = process("input()")
    assert said(other) == "taken"
    assert look(tmp_path / "state").free == 25_000_000_000
    other.communicate("\n", timeout=30)
    assert look(tmp_path / "state").free == 77 * 2**20


@pytest.mark.parametrize(
    ("compute", "why"),
    [
        ("raise RuntimeError('CUDA error: no kernel image is available\\nmore')",
         "torch 9.9: RuntimeError: CUDA error: no kernel image is available; mend"),
        ("os.abort()", "its process ended with code -6"),
        ("return 3.0", "torch 9.9 computes 1 + 1 wrong"),
    ],
)  # fmt: skip
def test_a_gpu_that_fails_at_its_first_work_is_refused_in_one_line(
    gpu: Path, tmp_path: Path, torch_stand_in: Callable[..., Path], compute: str, why: str
) -> None:
    torch_stand_in(compute)
    with pytest.raises(SiteError, match="DEVICE=cuda, but torch cannot use GPU 2: ") as caught:
        look(tmp_path / "state")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_check_that_hangs_is_ended(
    gpu: Path, tmp_path: Path, torch_stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_stand_in("import time; time.sleep(600)")
    monkeypatch.setattr(device, "CHECK_TIMEOUT_S", 3.0)
    with pytest.raises(SiteError, match="no answer within 3 s"):
        look(tmp_path / "state")


def test_what_the_supernode_found_wrong_is_the_answer(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE_ERROR", "no NVIDIA GPU is visible here")
    with pytest.raises(SiteError, match=r"^no NVIDIA GPU is visible here$"):
        look(tmp_path / "state")
