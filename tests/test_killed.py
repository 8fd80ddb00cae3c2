"""What ``kills`` says that a SIGKILL leaves is what one leaves of a real process."""

import json
import subprocess
import sys
from pathlib import Path

from tests.killed import TORN_BYTES, kills

_WRITES = """
import os
from pathlib import Path

def write(folder):
    with open(folder / "kept.txt", "a") as file:
        file.write("x" * 30)
    part = folder / "one" / "a.part"
    part.parent.mkdir(exist_ok=True)
    part.write_text("whole " * 9)
    os.chmod(part, 0o640)
    os.replace(part, folder / "one" / "a")
    with open(folder / "one" / "held", "w") as file:
        file.write("held back")
        (folder / "link").symlink_to("one")
    (folder / "kept.txt").unlink()
"""
# SIGKILL before one of its steps, or by the kernel at a byte beyond the limit behind it.
_DIES = """
import os, resource, signal, sys
folder, step, torn = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
def hook(event, args):
    global step
    opens = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if opens or event in ("os.chmod", "os.mkdir", "os.remove", "os.rename", "os.symlink"):
        step -= 1
        if step == 0 and not torn:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 0 and opens:
            held = os.stat(args[0]).st_size if args[2] & os.O_APPEND else 0
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (held + %d,) * 2)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
sys.addaudithook(hook)
write(Path(folder))
"""


def tree(folder: Path) -> str:
    def told(path: Path) -> str:
        if path.is_symlink():
            return f"to {path.readlink()}"
        return path.read_text() if path.is_file() else "folder"

    found = sorted(folder.rglob("*"))
    return json.dumps([(str(p.relative_to(folder)), p.lstat().st_mode, told(p)) for p in found])


def test_the_states_are_those_that_real_kills_leave(tmp_path: Path) -> None:
    made: dict[str, object] = {}
    exec(_WRITES, made)  # noqa: S102 - the same lines here and in the processes
    told = tmp_path / "told"
    told.mkdir()
    (told / "kept.txt").write_text("before")
    states = [tree(folder) for folder in kills(made["write"], told)]  # type: ignore[arg-type]
    left = []
    for step in range(1, len(states) + 1):  # more than it takes: some are also torn
        for torn in (False, True):
            folder = tmp_path / f"{step}-{torn}"
            folder.mkdir()
            (folder / "kept.txt").write_text("before")
            program = _WRITES + _DIES % TORN_BYTES
            command = [sys.executable, "-c", program, str(folder), str(step), str(torn)]
            if subprocess.run(command, check=False).returncode < 0:
                left.append(tree(folder))
    assert states == left
    assert len(states) > 9
