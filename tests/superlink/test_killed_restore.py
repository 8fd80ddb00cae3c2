"""A restore or backup that is killed leaves nothing that could be taken for whole, and no keys."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from superlink.backup import BackupError, backup
from superlink.provision import ProvisionError, main, provision
from superlink.restore import restore
from tests.killed import kills
from tests.superlink.test_backup import Parts, of, open_database, tree

ADDRESS = "superlink.example:9092"


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """The least that has each kind of thing: keys, who is who, a database, results and a link."""
    found = of(tmp_path / "there")
    provision(found["federation"], 1, ADDRESS, [])
    for part in ("sites", "state", "results"):
        found[part].mkdir()
    (found["sites"] / "sites.json").write_text('{"1": "site-00"}')
    with open_database(found) as base:
        base.execute("CREATE TABLE node (id INTEGER)")
    (found["results"] / "12").mkdir()
    (found["results"] / "12" / "run.json").write_text("{}")
    (found["results"] / "latest").symlink_to("12")
    return found


def refusal(federation: Path) -> str:
    try:
        assert provision(federation, 1, ADDRESS, []) == [], "keys were taken for lost"
    except ProvisionError as err:
        return str(err)
    return ""


def test_killed_anywhere_a_restore_is_refused_by_provision_and_completed_by_another(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # the kernel outlives them: no power cut
    archive = backup(parts, tmp_path / "saved")
    moments = 0
    for home in kills(lambda home: restore(archive, of(home)), tmp_path / "here"):
        here = of(home)
        written = [p for p in home.rglob("*") if p.is_file() and p.parent != here["federation"]]
        if written or (here["federation"] / "unfinished-restore").exists():
            moments += 1
            said = refusal(here["federation"])
            # At the last step all is there, and only the marker is gone or not.
            assert "superlink.restore again" in said or moments > len(tree(parts))
            if said:
                with pytest.raises(BackupError, match="a restore is at work, or was cut off"):
                    backup(here, tmp_path / "again")
                restore(archive, here)
        else:
            restore(archive, here)
        assert tree(here) == tree(parts)
        assert refusal(here["federation"]) == ""
    assert moments > len(tree(parts))


@pytest.fixture
def cut_off(parts: Parts, tmp_path: Path) -> tuple[Path, Parts]:
    """The archive, and a restore of it that was killed before the CA's key had got its mode."""
    archive, here = backup(parts, tmp_path / "saved"), of(tmp_path / "here")
    for _ in kills(lambda _: restore(archive, here), tmp_path / "here"):
        if list(here["federation"].rglob("*.key")):
            return archive, here
    raise AssertionError("no key was written")


def test_what_an_unfinished_restore_has_not_written_is_never_taken_back(
    cut_off: tuple[Path, Parts], tmp_path: Path
) -> None:
    archive, here = cut_off
    own = here["results"] / "12" / "other.json"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text("mine")
    before = tree(here)
    with pytest.raises(BackupError, match=f"{own} is there: results is put back"):
        restore(archive, here)
    elsewhere = here | {"results": tmp_path / "elsewhere"}
    with pytest.raises(BackupError, match=f"wrote into {here['results']} too"):
        restore(archive, elsewhere)
    own.unlink()
    with (here["federation"] / "unfinished-restore").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BackupError, match="another restore is at work"):
            restore(archive, here)
    assert {n: c for n, c in before.items() if not n.endswith("other.json")} == tree(here)


@pytest.mark.parametrize(
    "command",
    [(), ("renew",), ("reset",), ("rotate", "site-00"), ("revoke", "site-00"),
     ("admit", "site-00", "-"), ("kit", "site-00", "--address", ADDRESS)],
)  # fmt: skip
def test_every_command_is_refused_until_then(
    cut_off: tuple[Path, Parts],
    command: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, here = cut_off
    before = tree(here)
    options = ["--federation", str(here["federation"]), "--sites", "1", "--address", ADDRESS]
    monkeypatch.setattr(sys, "argv", ["superlink.provision", *options, *command])
    monkeypatch.delenv("AUDIT_DIR", raising=False)
    assert main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("provision: ")
    assert "run superlink.restore again with the same archive and folders" in line
    assert tree(here) == before


_STOPPED = """
import os, signal, sys
name, program = sys.argv.pop(1), sys.argv.pop(1)
def hook(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes and str(args[0]).endswith(name):
        os.kill(os.getpid(), signal.SIGTERM)
sys.addaudithook(hook)
__import__("runpy").run_module(program, run_name="__main__")
"""


def stopped(program: str, parts: Parts, word: Path, name: str) -> int:
    """The exit code of a program that gets SIGTERM when it opens a file of this name to write."""
    environment = {f"{part.upper()}_DIR": str(folder) for part, folder in parts.items()}
    command = [sys.executable, "-c", _STOPPED, name, program, str(word)]
    return subprocess.run(command, env=os.environ | environment, check=False).returncode


def test_a_restore_that_is_stopped_takes_back_what_it_has_written(
    parts: Parts, tmp_path: Path
) -> None:
    archive, here = backup(parts, tmp_path / "saved"), of(tmp_path / "here")
    assert stopped("superlink.restore", here, archive, "server.key") == 1
    assert not [p for p in (tmp_path / "here").rglob("*") if p.is_file()]


def test_a_backup_that_is_stopped_leaves_no_keys(parts: Parts, tmp_path: Path) -> None:
    code = stopped("superlink.backup", parts, tmp_path / "saved", ".part.db")
    assert code == 1
    assert list((tmp_path / "saved").iterdir()) == []


def test_what_a_killed_backup_has_left_the_next_one_removes(parts: Parts, tmp_path: Path) -> None:
    """All private keys are in it. One that is at work keeps its own."""
    left = 0
    for target in kills(lambda target: backup(parts, target), tmp_path / "saved"):
        target.mkdir(exist_ok=True)
        if list(target.glob("*.tar")):
            continue  # it had come to its end
        left += bool(list(target.iterdir()))
        at_work = target / ".fedllm-2026-01-01T000000Z.tar.part"
        with at_work.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            path = backup(parts, target)
        assert sorted(target.iterdir()) == [at_work, path]
    assert left
