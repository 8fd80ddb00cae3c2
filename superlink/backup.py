"""Save what a federation cannot make anew, while it runs.

    python -m superlink.backup FOLDER [--results]

Writes FOLDER/fedllm-<UTC time>.tar (mode 0600: it holds all private keys) of

    federation/  FEDERATION_DIR: CA, keys, certificates, secrets, kits; no site's data/, and of its
                 state/ only that it has paused
    sites/       SITES_DIR: who is who
    audit/       AUDIT_DIR: the operator's record
    state/       of STATE_DIR the SuperLink's database, by SQLite's backup interface
    results/     RESULTS_DIR, with --results

and SHA256SUMS of it all, as sha256sum reads it. superlink.restore puts it back. Links (but for
results/latest and each run's best) and hidden files (what is being written) are left out.
"""

import argparse
import fcntl
import hashlib
import io
import json
import os
import re
import sqlite3
import stat
import sys
import tarfile
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO

from superlink.audit import AuditError, recorded
from superlink.half_done import sync_folder, unfinished, unwind_on_sigterm

FORM = 1  # of the archive: another number is another order of things in it
ABOUT, SUMS = "backup.json", "SHA256SUMS"
DATABASE = "superlink.db"
LOCKED_FOR_S = 120
PAUSED = "paused"  # supernode/site.py; a site that comes back without it would train again
# The sites' own, and what follows from that; prepare makes it again from its source.
_LEFT_OUT = ("site-*/data", "site-*/state", "prepared")


class BackupError(Exception):
    """There is no backup, or it cannot be put back; the message is one line for the user."""


def folders(env: dict[str, str], state_is_there: bool) -> dict[str, Path]:
    """Part of an archive -> its folder, as the programs' environment says.

    Raises:
        BackupError: STATE_DIR is not set, or, if it is to be there, has no database.
    """
    if not env.get("STATE_DIR"):
        raise BackupError("STATE_DIR is not set; it is the folder of the SuperLink's database")
    federation = Path(env.get("FEDERATION_DIR", "federation"))
    found = {
        "federation": federation,
        "sites": Path(env.get("SITES_DIR") or federation / "sites"),
        "audit": Path(env.get("AUDIT_DIR") or federation / "audit"),
        "state": Path(env["STATE_DIR"]),
        "results": Path(env.get("RESULTS_DIR", "results")),
    }
    if state_is_there and not (found["state"] / DATABASE).is_file():
        raise BackupError(f"STATE_DIR={found['state']}: no {DATABASE} there")
    return found


def backup(parts: dict[str, Path], target: Path) -> Path:
    """Write the archive of these parts into the folder ``target``; returns its path.

    Raises:
        BackupError: a part is missing, damaged or half restored, or the archive is there already.
        OSError: something cannot be read, or written.
    """
    if said := unfinished(parts["federation"]):
        raise BackupError(said)
    if not (parts["federation"] / "ca" / "ca.key").is_file():
        raise BackupError(f"FEDERATION_DIR={parts['federation']}: no ca/ca.key there")
    if "results" in parts and not parts["results"].is_dir():
        raise BackupError(f"RESULTS_DIR={parts['results']}: no such folder")
    parts = {part: folder for part, folder in parts.items() if folder.is_dir()}
    if any(target.resolve().is_relative_to(folder.resolve()) for folder in parts.values()):
        raise BackupError(f"{target} lies in what is to be saved; give another folder")
    target.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    path = target / f"fedllm-{now:%Y-%m-%dT%H%M%SZ}.tar"
    if path.exists():
        raise BackupError(f"{path} is there already")
    about = {
        "form": FORM,
        "time": now.isoformat(timespec="seconds"),
        "flwr": version("flwr"),
        "parts": list(parts),
    }
    for torn in target.glob(".fedllm-*.part"):
        with suppress(OSError), torn.open("rb+") as file:  # locked: another one is at work
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(torn)
    part = path.with_name(f".{path.name}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            with suppress(OSError):  # a file system without locks: nothing is removed there
                fcntl.flock(file, fcntl.LOCK_EX)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                _fill(_Archive(archive), parts, about, part.with_name(f"{part.name}.db"))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        _remove(part)
    sync_folder(target)
    return path


def _remove(part: Path) -> None:
    """It last: what a call that is killed here leaves is found by the next one."""
    for path in sorted(part.parent.glob(f"{part.name}*"), reverse=True):
        path.unlink(missing_ok=True)


class _Archive:
    """A tar file that is being written, and the sums of what is in it."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive, self.sums = archive, list[str]()

    def add(self, name: str, mode: int, file: IO[bytes], size: int) -> None:
        summed = _Summed(file, size)
        try:
            self._archive.addfile(_entry(name, mode, size), summed)  # type: ignore[arg-type]
        except OSError as err:
            if err.errno is not None:
                raise
            raise BackupError(f"{name} has become shorter while it was read; try again") from None
        self.sums.append(f"{summed.sha256.hexdigest()}  {name}\n")

    def add_text(self, name: str, text: str) -> None:
        self.add(name, 0o644, io.BytesIO(text.encode()), len(text.encode()))

    def add_folder(self, name: str, mode: int) -> None:
        entry = _entry(name, mode, 0)
        entry.type = tarfile.DIRTYPE
        self._archive.addfile(entry)

    def add_link(self, name: str, target: str) -> None:
        entry = _entry(name, 0o777, 0)
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        self._archive.addfile(entry)


class _Summed:
    """The first ``size`` bytes of a file, summed as they are read; a file that grows is cut."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left, self.sha256 = file, size, hashlib.sha256()

    def read(self, most: int) -> bytes:
        data = self._file.read(min(most, self._left))
        self._left -= len(data)
        self.sha256.update(data)
        return data


def _entry(name: str, mode: int, size: int) -> tarfile.TarInfo:
    """Of no owner: what is restored is whose who restores it."""
    entry = tarfile.TarInfo(name)
    entry.mode, entry.size = mode, size
    return entry


def _fill(archive: _Archive, parts: dict[str, Path], about: object, copy: Path) -> None:
    archive.add_text(ABOUT, json.dumps(about) + "\n")
    others = {folder.resolve() for folder in parts.values()}
    # Before the keys: of a key that is newer than the database, superlink.register tells it.
    _copy_database(parts["state"] / DATABASE, copy)
    with copy.open("rb") as file:
        archive.add(f"state/{DATABASE}", 0o600, file, copy.stat().st_size)
    copy.unlink()
    for part, folder in parts.items():
        if part != "state":
            _add_tree(archive, part, folder, others - {folder.resolve()})
    archive.add_text(SUMS, "".join(archive.sums))


def _copy_database(database: Path, copy: Path) -> None:
    """As it is at one moment, whoever writes to it meanwhile. Raises BackupError: it is damaged."""
    os.close(os.open(copy, os.O_CREAT | os.O_EXCL, 0o600))
    uri = f"{database.resolve().as_uri()}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(uri, uri=True, timeout=LOCKED_FOR_S)) as source,
            closing(sqlite3.connect(copy)) as saved,
        ):
            source.backup(saved)
            saved.execute("PRAGMA journal_mode=DELETE")  # one file, without a WAL beside it
            (said,) = saved.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as err:
        raise BackupError(f"{database}: {err}") from None
    if said != "ok":
        raise BackupError(f"{database} is damaged: {said}")


def _add_tree(archive: _Archive, part: str, top: Path, others: set[Path]) -> None:
    """Folders and files; of what a ServerApp may have put there no link is followed."""
    for where, folders, files, handle in os.fwalk(top, onerror=_raise):
        here = Path(where).relative_to(top)
        archive.add_folder(str(part / here), stat.S_IMODE(os.fstat(handle).st_mode))
        inside = [name for name in sorted(folders) if (top / here / name).resolve() not in others]
        folders[:] = [name for name in inside if _wanted(name)]
        if any(here.match(pattern) for pattern in _LEFT_OUT if part == "federation"):
            folders.clear()
            files = [PAUSED] if here.name == "state" and PAUSED in files else []
        for name in ("latest", "best"):
            with suppress(OSError):  # it is none, or not there
                link, target = str(part / here / name), os.readlink(name, dir_fd=handle)
                if is_ours(link, target):
                    archive.add_link(link, target)
        for name in filter(_wanted, sorted(files)):
            for file in _opened(name, handle):
                facts = os.fstat(file.fileno())
                archive.add(
                    str(part / here / name), stat.S_IMODE(facts.st_mode), file, facts.st_size
                )


def is_ours(link: str, target: str) -> bool:
    """Whether a run makes such a link, within the results."""
    ours = r"results/latest -> \d+|results/\d+/best -> peft_\d+"
    return re.fullmatch(ours, f"{link} -> {target}", re.ASCII) is not None


def _raise(err: OSError) -> None:
    raise err


def _wanted(name: str) -> bool:
    """Not what is being written, nor a name that would be no line of SHA256SUMS."""
    return not name.startswith(".") and name.isprintable() and "\\" not in name


def _opened(name: str, folder: int) -> Iterator[IO[bytes]]:
    """The regular file of this name, unless it has gone meanwhile."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        if not stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode):
            return
        handle = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return
    with os.fdopen(handle, "rb") as file:
        yield file


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.backup", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the archive goes")
    parser.add_argument("--results", action="store_true", help="the runs' results as well")
    args = parser.parse_args()
    unwind_on_sigterm("backup")
    try:
        parts = folders(dict(os.environ), state_is_there=True)
        if not args.results:
            del parts["results"]
        with recorded(parts["audit"], "backup", ", ".join(parts), "superlink.backup"):
            path = backup(parts, args.folder)
    except (BackupError, AuditError) as err:
        print(f"backup: {err}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"backup: {err.filename}: {err.strerror}", file=sys.stderr)
        return 1
    size = path.stat().st_size / 2**20
    print(f"backup: {path}, {size:.1f} MiB; it holds all private keys: keep it like one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
