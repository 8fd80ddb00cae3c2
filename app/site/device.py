"""The device that this site computes on: its turn, and what the preflight asks of it. No torch.

SuperNodes of one host share its devices. A ClientApp that computes takes the device's turn, a lock
on a file in LOCK_DIR, and keeps it until its process (one for each message) has ended: only then
is the device's memory free. Settings: DEVICE, CUDA_VISIBLE_DEVICES, LOCK_DIR, and DEVICE_ERROR
(why the SuperNode found no GPU).
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import stat
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from app.site.last_lines import travels
from app.site.partition import SiteError

logger = logging.getLogger(__name__)
POLL_S, SAY_EVERY_S = 0.2, 180.0
# The preflight's own use of the device is short, so it does not wait for who trains there.
LOOK_TIMEOUT_S, CHECK_TIMEOUT_S, SMI_TIMEOUT_S = 60.0, 180.0, 30.0
_held: dict[Path, int] = {}  # the turns of this process: lock file -> descriptor


def device() -> str:
    """cuda or cpu."""
    return os.environ.get("DEVICE", "cuda")


def device_name() -> str:
    """The device as people call it: ``GPU 2``, or ``the CPU``."""
    return f"GPU {_gpu()}" if device() == "cuda" else "the CPU"


def _gpu() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES") or "0"


def _lock_file() -> Path:
    name = re.sub(r"[^\w-]", "-", _gpu()) if device() == "cuda" else "cpu"
    return Path(os.environ["LOCK_DIR"]) / f"device-{name}.lock"


def take_turn(who: str, timeout_s: float) -> None:
    """Wait until no other process computes on this device, then keep the others waiting.

    The turn ends with this process and no earlier. A process forked from this one does not have
    it, nor does the one that this was forked from. Taken a second time, nothing happens.

    Raises:
        SiteError: it was not free within ``timeout_s``, or the lock file is none.
    """
    path, started = _lock_file(), time.monotonic()
    while path not in _held:
        lock = _open(path)
        try:
            taken = wait_for(lock, started + timeout_s, f"{who} waits for its turn on {_whose()}")
            if not taken:
                raise SiteError(f"no turn within {timeout_s:.0f} s on {_whose()}")
            if _same(path, lock):
                _held[path], lock = lock, -1
        finally:
            if lock >= 0:
                os.close(lock)


def _whose() -> str:
    return f"{device_name()}, where another SuperNode of this host computes"


def _forget() -> None:
    """In a forked child: the turn is its parent's, and must not outlive it."""
    while _held:
        os.close(_held.popitem()[1])


os.register_at_fork(after_in_child=_forget)


def _open(path: Path) -> int:
    """A descriptor of the lock file, which is made where it is missing.

    Other sites may write to this folder: nothing is followed, and opening waits for nobody.
    Reading is enough for a lock, so the folder may as well be read-only.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            lock = os.open(path, flags)
        except FileNotFoundError:
            lock = os.open(path, flags | os.O_CREAT, 0o644)
    except OSError as err:
        raise SiteError(f"{path} cannot be opened as a lock: {err.strerror}") from None
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise SiteError(f"{path} is not a file that can be a lock; delete it")
    return lock


def _same(path: Path, lock: int) -> bool:
    """Whether the others would still find this file there."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(lock))
    except FileNotFoundError:
        return False


def wait_for(lock: int, deadline: float, say: str = "") -> bool:
    """Lock this descriptor for ourselves; False if somebody else holds it until ``deadline``.

    ``say`` goes to the log when there is something to wait for, and again every few minutes.
    """
    started = said = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            now = time.monotonic()
        if now >= deadline:
            return False
        if say and (said == started or now - said >= SAY_EVERY_S):
            logger.info("%s (for %.0f s now)", say, now - started, extra=travels())
            said = now
        time.sleep(POLL_S)


def turn() -> str:
    """Names this device's turn: the same for the sites that wait for each other, and for no other.

    Raises:
        SiteError: the lock file is none.
    """
    lock = _open(_lock_file())
    try:
        file = os.fstat(lock)
    finally:
        os.close(lock)
    return hashlib.sha256(f"{_boot()} {file.st_dev} {file.st_ino}".encode()).hexdigest()[:16]


def _boot() -> str:
    """Of this host since it started; the same in all its containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(uuid.getnode())


@dataclass(frozen=True)
class Gpu:
    """What this site's GPU is; sizes in bytes."""

    name: str
    bf16: bool
    total: int
    free: int  # equal to ``total`` while another site of this host computes on it

    def __str__(self) -> str:
        return f"{self.name}, {self.free / 1e9:.1f} GB free of {self.total / 1e9:.1f}"


def look(state: Path) -> Gpu:
    """This site's GPU, checked: torch has computed something on it.

    torch is asked in a process of its own and once only; its answer is kept in ``state`` for as
    long as host, driver, device and torch stay the same. Memory is read each time, in the
    device's turn. While another site has that, all memory counts as free: it will be.

    Raises:
        SiteError: there is no GPU, or torch cannot use it.
    """
    if problem := os.environ.get("DEVICE_ERROR"):
        raise SiteError(problem)
    lock = _open(_lock_file())
    try:
        seen = _nvidia_smi()
        kept, key = state / "gpu.json", [_boot(), platform.node(), version("torch"), _gpu()]
        key.append(seen["driver"] if seen else "")
        known = _remembered(kept, key) if seen else None
        if not known:
            known = _ask_torch(lock)
            with suppress(OSError):  # then it is asked again next time
                state.mkdir(exist_ok=True)
                kept.write_text(json.dumps({"key": key, "answer": known}))
        if known.get("busy") or not wait_for(lock, time.monotonic() + LOOK_TIMEOUT_S):
            free = known["total"]
        else:
            free = (_nvidia_smi() or known)["free"]
        return Gpu(known["name"], known["bf16"], known["total"], free)
    finally:
        os.close(lock)


def _remembered(kept: Path, key: list[str]) -> dict[str, Any] | None:
    try:
        stored = json.loads(kept.read_text())
        answer: dict[str, Any] = stored["answer"]
        return answer if stored["key"] == key and not answer["busy"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _nvidia_smi() -> dict[str, Any] | None:
    """Driver, and free memory in bytes; None if nvidia-smi does not tell."""
    query = ["--query-gpu=driver_version,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={_gpu()}", *query],
            capture_output=True, text=True, check=True, timeout=SMI_TIMEOUT_S,
        )  # fmt: skip
        driver, mib = done.stdout.strip().split(", ")
        return {"driver": driver, "free": int(mib) * 2**20}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _ask_torch(lock: int) -> dict[str, Any]:
    """What ``app.site.gpu_check`` says of the GPU; it takes ``lock`` when torch is loaded."""
    problem = f"DEVICE=cuda, but torch cannot use {device_name()}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "app.site.gpu_check", str(lock)], cwd=Path(__file__).parents[2],
            pass_fds=[lock], capture_output=True, text=True, check=False, timeout=CHECK_TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SiteError(f"{problem}: no answer within {CHECK_TIMEOUT_S:.0f} s") from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise SiteError(f"{problem}: its process ended with code {done.returncode}") from None
    if "error" in answer:
        raise SiteError(f"{problem}: {answer['error']}; mend that, or set DEVICE=cpu")
    return answer
