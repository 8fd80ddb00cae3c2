"""A backup has all that cannot be made anew and no row, and comes back as it was, or not at all."""

import io
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import superlink.backup
import superlink.restore
from superlink import site_keys
from superlink.backup import BackupError, backup
from superlink.provision import provision
from superlink.restore import restore
from tests.full_disk import full_disk

Parts = dict[str, Path]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A federation of three sites, with rows, a database in WAL mode and a run's results."""
    home = tmp_path / "there"
    provision(home / "federation", 3, "superlink.example:9092", [])
    found = of(home)
    (found["sites"]).mkdir()
    (found["sites"] / "sites.json").write_text('{"1": "site-00"}')
    for name in ("data/train.jsonl", "state/rest.bin"):
        (home / "federation" / "site-01" / name).write_text("a patient's row")
    (home / "federation" / "prepared" / "data.json").write_text("{}")
    (home / "federation" / "superlink" / ".server.key.part").write_text("half")
    found["state"].mkdir()
    with open_database(found) as base:
        base.execute("PRAGMA journal_mode=WAL")
        base.execute("CREATE TABLE node (id INTEGER)")
        base.execute("INSERT INTO node VALUES (7)")
    run = found["results"] / "12"
    (run / "eval").mkdir(parents=True)
    (run / "eval").chmod(0o2775)
    (run / "run.json").write_text("{}")
    (run / "peft_3").mkdir()
    (run / "best").symlink_to("peft_3")
    (found["results"] / "best").symlink_to("peft_3")  # no run's
    (run / "stolen").symlink_to(home / "federation" / "ca" / "ca.key")
    os.mkfifo(run / "pipe")
    (found["results"] / "latest").symlink_to("12")
    return found


def of(home: Path) -> Parts:
    return {
        "federation": home / "federation",
        "sites": home / "federation" / "sites",
        "state": home / "state",
        "results": home / "results",
    }


@contextmanager
def open_database(parts: Parts) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(parts["state"] / "superlink.db", timeout=60)) as base, base:
        yield base


def tree(parts: Parts) -> dict[str, tuple[int, bytes]]:
    """Path -> mode and content, of folders, and of files but for the database."""
    found = {}
    for part in ("federation", "results"):
        for p in parts[part].rglob("*"):
            if (p.is_dir() or p.is_file()) and not p.is_symlink():
                content = b"" if p.is_dir() else p.read_bytes()
                name = f"{part}/{p.relative_to(parts[part])}"
                found[name] = (stat.S_IMODE(p.stat().st_mode), content)
    return found


def test_what_comes_back_is_what_was_there_but_for_the_sites_own(
    parts: Parts, tmp_path: Path
) -> None:
    """Modes too, whatever the umask."""
    before = tree(parts)
    old = os.umask(0o077)
    try:
        path = backup(parts, tmp_path / "saved")
        assert restore(path, of(tmp_path / "here")) == (list(parts), [])
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list((tmp_path / "saved").iterdir()) == [path]
    after = tree(of(tmp_path / "here"))
    gone = {
        "federation/site-01/data/train.jsonl", "federation/site-01/state/rest.bin",
        "federation/prepared/data.json", "federation/superlink/.server.key.part",
    }  # fmt: skip
    assert before.keys() - after.keys() == gone
    assert after == {name: what for name, what in before.items() if name not in gone}
    keys = {name: mode for name, (mode, content) in after.items() if b"PRIVATE KEY" in content}
    assert len(keys) == 5
    assert set(keys.values()) == {0o600}
    with open_database(of(tmp_path / "here")) as base:
        assert base.execute("SELECT id FROM node").fetchall() == [(7,)]
    links = (p for p in (tmp_path / "here" / "results").rglob("*") if p.is_symlink())
    assert {p.name: str(p.readlink()) for p in links} == {"latest": "12", "best": "peft_3"}
    assert (tmp_path / "here" / "results" / "12" / "best").is_dir()
    database = tmp_path / "here" / "state" / "superlink.db"
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    assert b"patient" not in path.read_bytes()
    assert provision(tmp_path / "here" / "federation", 3, "superlink.example:9092", []) == []


def test_a_key_that_is_rotated_meanwhile_is_newer_than_the_database(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So superlink.register mends it; of a newer database it would shut the site out for good."""
    copy = superlink.backup._copy_database

    def rotated(database: Path, to: Path) -> None:
        copy(database, to)
        site_keys.rotate(parts["federation"], "site-00")

    monkeypatch.setattr(superlink.backup, "_copy_database", rotated)
    here = of(tmp_path / "here")
    restore(backup(parts, tmp_path / "saved"), here)
    public = "federation/public/site-00.pub"
    assert tree(here)[public] == tree(parts)[public]


def test_a_site_that_has_paused_is_paused_when_it_comes_back(parts: Parts, tmp_path: Path) -> None:
    """But nothing else of its state, and no row of that name."""
    site = parts["federation"] / "site-01"
    (site / "state" / "paused").touch()
    (site / "data" / "paused").touch()
    here = of(tmp_path / "here")
    restore(backup(parts, tmp_path / "saved"), here)
    there = here["federation"] / "site-01"
    assert [p.name for p in (there / "state").iterdir()] == ["paused"]
    assert list((there / "data").iterdir()) == []


def test_the_sums_are_those_that_sha256sum_reads(parts: Parts, tmp_path: Path) -> None:
    path = backup(parts, tmp_path / "saved")
    subprocess.run(["tar", "-xf", str(path)], cwd=tmp_path / "saved", check=True)
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "saved", check=True,
        capture_output=True,
    )  # fmt: skip
    assert done.stdout + done.stderr == b""


def test_the_database_is_that_of_one_moment_while_somebody_writes_to_it(
    parts: Parts, tmp_path: Path
) -> None:
    """Each transaction writes two rows: a copy has an even number, and all that stood there."""
    stop, copies, done = threading.Event(), list[int](), list[int]()

    def write() -> None:
        with open_database(parts) as base:
            while not stop.is_set():
                base.execute("INSERT INTO node VALUES (1)")
                base.execute("INSERT INTO node VALUES (2)")
                base.commit()
                done.append(2)

    writer = threading.Thread(target=write)
    del parts["results"]
    writer.start()
    try:
        for n in range(5):
            here, before = of(tmp_path / f"here-{n}"), sum(done)
            restore(backup(parts, tmp_path / f"saved-{n}"), here)
            with open_database(here) as base:
                copies += base.execute("SELECT COUNT(*) FROM node WHERE id < 7").fetchone()
            assert copies[-1] >= before
    finally:
        stop.set()
        writer.join()
    assert [n % 2 for n in copies] == [0] * 5


def test_results_are_left_where_nobody_asked_for_them(parts: Parts, tmp_path: Path) -> None:
    del parts["results"]
    path = backup(parts, tmp_path / "saved")
    assert restore(path, of(tmp_path / "here")) == (["federation", "sites", "state"], [])
    assert not (tmp_path / "here" / "results").exists()


def changed(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The archive with other contents, all else as it was."""
    with tarfile.open(path) as tar:
        entries = tar.getmembers()
        held = {e.name: f.read() for e in entries if (f := tar.extractfile(e))}
    change(held)
    with tarfile.open(path, "w") as tar:
        for entry in entries:
            content = held.pop(entry.name, None)
            if content is not None:
                entry.size = len(content)
            if entry.isdir() or content is not None:
                tar.addfile(entry, io.BytesIO(content or b""))
        for name, content in held.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.update({"federation/ca/ca.key": b"x"}), "damaged: 1 files .*ca/ca.key"),
        (lambda h: h.pop("state/superlink.db"), "damaged: 1 files .*superlink.db"),
        (lambda h: h.update({"federation/more": b"x"}), "damaged: 1 files .*federation/more"),
        (lambda h: h.update({"../outside": b"x"}), "'../outside' does not belong"),
        (lambda h: h.update({"/etc/x": b"x"}), "'/etc/x' does not belong"),
        (lambda h: h.pop("SHA256SUMS"), "cut short, or no backup"),
        (lambda h: h.update({"backup.json": b"[]"}), "backup.json is not one of"),
        (
            lambda h: h.update(
                {"backup.json": h["backup.json"].replace(b'"flwr": "1.', b'"flwr": "9.')}
            ),
            r"is of flwr 9\.36\.0 and form 1, here are flwr 1\.36\.0",
        ),
    ],
)
def test_an_archive_that_is_not_what_was_saved_is_refused_whole(
    parts: Parts, tmp_path: Path, change: Callable[[dict[str, bytes]], object], said: str
) -> None:
    path = changed(backup(parts, tmp_path / "saved"), change)
    with pytest.raises(BackupError, match=said) as err:
        restore(path, of(tmp_path / "here"))
    assert len(str(err.value).splitlines()) == 1
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("size", [0, 100, 3000, -2000])
def test_an_archive_that_was_cut_off_is_refused(parts: Parts, tmp_path: Path, size: int) -> None:
    path = backup(parts, tmp_path / "saved")
    path.write_bytes(path.read_bytes()[: size or None] if size else b"")
    if size == -2000:  # into the sums, past the padding at the end
        path.write_bytes(path.read_bytes().rstrip(b"\0")[:-200])
    with pytest.raises(BackupError, match=r"damaged|cut short|no backup"):
        restore(path, of(tmp_path / "here"))
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("part", ["federation", "state", "results"])
def test_a_folder_that_is_not_empty_is_never_restored_into(
    parts: Parts, tmp_path: Path, part: str
) -> None:
    path, here = backup(parts, tmp_path / "saved"), of(tmp_path / "here")
    own = here[part] / "a" / "file"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(BackupError, match=f"{own} is there: {part} is put back into an empty"):
        restore(path, here)
    assert [p for p in (tmp_path / "here").rglob("*") if p.is_file()] == [own]


def test_empty_folders_that_are_mounts_stay(parts: Parts, tmp_path: Path) -> None:
    path, here = backup(parts, tmp_path / "saved"), of(tmp_path / "here")
    ca = here["federation"] / "ca"
    ca.mkdir(parents=True)
    before = ca.stat().st_ino
    restore(path, here)
    assert ca.stat().st_ino == before
    assert (ca / "ca.key").is_file()


def test_a_restore_that_fails_leaves_nothing(parts: Parts, tmp_path: Path) -> None:
    path, here = backup(parts, tmp_path / "saved"), of(tmp_path / "here")
    here["state"].parent.mkdir()
    here["state"].symlink_to("/dev/full")  # no folder can be made there
    with pytest.raises(OSError, match="state"):
        restore(path, here)
    assert not here["federation"].exists()


def test_no_archive_is_left_by_a_backup_that_fails(parts: Parts, tmp_path: Path) -> None:
    with full_disk(40_000), pytest.raises(OSError, match="File too large"):
        backup(parts, tmp_path / "saved")
    assert list((tmp_path / "saved").iterdir()) == []


def test_what_cannot_be_saved_is_one_line(parts: Parts, tmp_path: Path) -> None:
    def said(change: Parts) -> str:
        with pytest.raises(BackupError) as err:
            backup(parts | change, tmp_path / "saved")
        return str(err.value)

    assert said({"federation": tmp_path}) == f"FEDERATION_DIR={tmp_path}: no ca/ca.key there"
    assert said({"results": tmp_path / "x"}) == f"RESULTS_DIR={tmp_path / 'x'}: no such folder"
    assert "lies in what is to be saved" in said({"results": tmp_path})
    (parts["state"] / "superlink.db").write_bytes(b"no database" * 1000)
    assert "superlink.db: file is not a database" in said({})
    assert not list((tmp_path / "saved").iterdir())


def test_the_commands_take_the_folders_of_the_environment(
    parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call(program: object, *words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["program", *words])
        code: int = program.main()  # type: ignore[attr-defined]
        return code

    monkeypatch.delenv("STATE_DIR", raising=False)
    assert call(superlink.backup, str(tmp_path / "saved")) == 1
    assert "STATE_DIR is not set" in capsys.readouterr().err
    for part, folder in parts.items():
        monkeypatch.setenv(f"{part.upper()}_DIR", str(folder))
    assert call(superlink.backup, str(tmp_path / "saved"), "--results") == 0
    said = capsys.readouterr().out
    (path,) = (tmp_path / "saved").iterdir()
    assert said.startswith(f"backup: {path}, ")
    assert call(superlink.restore, str(path)) == 1
    assert "is there: federation is put back" in capsys.readouterr().err
    for folder in (parts["federation"], parts["state"], parts["results"]):
        shutil.rmtree(folder)
    monkeypatch.delenv("RESULTS_DIR")
    assert call(superlink.restore, str(path)) == 0
    said = capsys.readouterr().out
    assert f"federation in {parts['federation']}, " in said
    assert "; left in the archive: results (RESULTS_DIR is not set)" in said
    assert not parts["results"].exists()
    assert call(superlink.restore, str(tmp_path / "none.tar")) == 1
    assert f"{tmp_path / 'none.tar'}: No such file" in capsys.readouterr().err
