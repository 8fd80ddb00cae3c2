"""Which GPU of this host is this SuperNode's, without importing torch (5 s and 300 MB)."""

import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

SMI_TIMEOUT_S = 30.0  # a driver that hangs shows its GPUs in /dev; torch finds it in the preflight


class NoGpuError(Exception):
    """This SuperNode has no GPU; the message is one line that says why."""


def choose_gpu(env: dict[str, str], visible: int) -> int:
    """The index of this SuperNode's GPU among the visible ones.

    Raises:
        NoGpuError: there is none, or not that one.
    """
    if not visible:
        raise NoGpuError(
            "DEVICE=cuda but no NVIDIA GPU is visible here; on a host without GPU use "
            "docker/compose.cpu.yaml (or DEVICE=cpu), else check nvidia-smi and the NVIDIA "
            "container toolkit, and start the SuperNode anew"
        )
    if not env.get("SUPERNODE_GPU"):
        return int(env["PARTITION_ID"]) % visible
    chosen = env["SUPERNODE_GPU"]
    if not re.fullmatch(r"[0-9]{1,6}", chosen) or int(chosen) >= visible:
        raise NoGpuError(f"SUPERNODE_GPU={chosen}: this host shows GPUs 0 to {visible - 1}")
    return int(chosen)


def set_gpu(env: dict[str, str]) -> None:
    """Choose this SuperNode's GPU for its ClientApps: CUDA_VISIBLE_DEVICES, or DEVICE_ERROR.

    Without a GPU the SuperNode starts all the same: the preflight of a run then refuses the site
    with the reason, where the operator reads it. One that ends says it to nobody else.
    """
    try:
        chosen, visible = gpu_of(env)
    except NoGpuError as err:
        print(f"supernode: ERROR: {err}; no run can start with it", file=sys.stderr, flush=True)
        env["DEVICE_ERROR"] = str(err)
        return
    env |= chosen
    print(f"supernode: GPU {chosen['CUDA_VISIBLE_DEVICES']}, one of {visible}", flush=True)


def gpu_of(env: dict[str, str]) -> tuple[dict[str, str], int]:
    """What the environment must hold so that CUDA sees this SuperNode's GPU alone; and how many
    there are.

    Raises:
        NoGpuError: there is none, or not the one that is asked for.
    """
    given = env.get("CUDA_VISIBLE_DEVICES", "").strip()
    visible = _allowed(given) if given else visible_gpus()
    name = visible[choose_gpu(env, len(visible))]
    # By the bus, as nvidia-smi counts.
    return {"CUDA_VISIBLE_DEVICES": name, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, len(visible)


def _allowed(given: str) -> list[str]:
    """What CUDA sees by this CUDA_VISIBLE_DEVICES: all before the first that is no GPU's name.

    Raises:
        NoGpuError: nothing.
    """
    names = (name.strip() for name in given.split(","))
    allowed = list(takewhile(re.compile(r"[0-9]+|(GPU|MIG)-\S+").fullmatch, names))
    if not allowed:
        raise NoGpuError(f"CUDA_VISIBLE_DEVICES={given} hides every GPU; take it out or name one")
    return allowed


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs as CUDA calls them.

    One that is cut up (MIG) is there as its slices only.
    """
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=SMI_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return [str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    slices: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():
        if gpu := re.match(r"GPU (\d+): ", line):
            slices[gpu[1]] = []
        elif (mig := re.match(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)", line)) and slices:
            slices[next(reversed(slices))].append(mig[1])
    return [name for gpu, parts in slices.items() for name in parts or [gpu]]
