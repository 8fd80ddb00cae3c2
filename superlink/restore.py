"""Put a backup back, into empty folders.

    python -m superlink.restore ARCHIVE

ARCHIVE is superlink.backup's; the folders are FEDERATION_DIR, SITES_DIR, AUDIT_DIR, STATE_DIR and
RESULTS_DIR, which must be empty. A restore that was cut off is repeated with the same ones.
All checksums are compared before anything is written. Without RESULTS_DIR the results stay in the
archive (tar -xf ARCHIVE results). Then: superlink.provision, the SuperLink, superlink.register.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from superlink.audit import AuditError, recorded
from superlink.backup import ABOUT, FORM, SUMS, BackupError, folders, is_ours
from superlink.half_done import UNFINISHED, sync_folder, unwind_on_sigterm


def restore(archive: Path, parts: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Write what the archive has of these parts; returns their names, and those of its others.

    What was written is removed again if that fails. Until all is on the disk, federation/ holds the
    file UNFINISHED: who is killed leaves it, and may call again with the same folders.

    Raises:
        BackupError: it is no backup, damaged, of another Flower, or a folder is not empty.
        OSError: it cannot be read, or something cannot be written.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            held = _checked(tar, archive)
            mine = {part: folder for part, folder in parts.items() if part in held}
            marker = parts["federation"] / UNFINISHED
            _clear(tar, mine, marker)
            _write(tar, mine, marker)
    except tarfile.TarError as err:
        raise BackupError(f"{archive} is damaged, or no backup: {err}") from None
    return list(mine), [part for part in held if part not in mine]


def _checked(tar: tarfile.TarFile, archive: Path) -> list[str]:
    """The parts that it has, if all in it is as it was saved.

    Raises:
        BackupError: it is not; tarfile.TarError: it is cut short.
    """
    sums: dict[str, str] = {}
    wanted, about = "", dict[str, Any]()
    for entry in tar:
        name = PurePosixPath(entry.name)
        link = entry.issym() and is_ours(entry.name, entry.linkname)
        of_a_kind = entry.isreg() or entry.isdir() or link
        if name.is_absolute() or ".." in name.parts or not of_a_kind:
            raise BackupError(f"{archive}: {entry.name!r} does not belong into a backup")
        if not entry.isreg() or (file := tar.extractfile(entry)) is None:
            continue
        if entry.name in (ABOUT, SUMS):
            text = file.read()
            wanted = text.decode(errors="replace") if entry.name == SUMS else wanted
            about = _about(text, archive) if entry.name == ABOUT else about
            file.seek(0)
        if entry.name != SUMS:
            sums[entry.name] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    if not wanted or not about:
        raise BackupError(f"{archive} is cut short, or no backup: it has no {ABOUT} or no {SUMS}")
    saved = {name: sha for sha, _, name in (line.partition("  ") for line in wanted.splitlines())}
    if different := sorted(n for n in sums.keys() | saved.keys() if sums.get(n) != saved.get(n)):
        raise BackupError(
            f"{archive} is damaged: {len(different)} files are not what was saved, the first is "
            f"{different[0]}"
        )
    return list(about["parts"])


def _about(text: bytes, archive: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(text)
        form, flower, _ = about["form"], about["flwr"], about["parts"]
    except (ValueError, KeyError, TypeError):
        raise BackupError(f"{archive}: its {ABOUT} is not one of superlink.backup") from None
    if form != FORM or flower != version("flwr"):
        raise BackupError(
            f"{archive} is of flwr {flower} and form {form}, here are flwr {version('flwr')} and "
            f"form {FORM}: restore it with the checkout that made it, then upgrade"
        )
    return about


def _placed(tar: tarfile.TarFile, parts: dict[str, Path]) -> Iterator[tuple[tarfile.TarInfo, Path]]:
    """Each entry of these parts, and where it goes."""
    for entry in tar.getmembers():
        part, *rest = PurePosixPath(entry.name).parts
        if part in parts:
            yield entry, parts[part].joinpath(*rest)


def _clear(tar: tarfile.TarFile, parts: dict[str, Path], marker: Path) -> None:
    """Remove what a restore that was cut off has left of this archive.

    Raises:
        BackupError: there is something else, or it wrote into other folders too.
    """
    resolved = {str(folder.resolve()): part for part, folder in parts.items()}
    begun = _begun(marker)
    if others := [folder for folder in begun if folder not in resolved]:
        raise BackupError(
            f"{marker} is there: the restore that was cut off wrote into {others[0]} too; call it "
            "with the same folders, or empty them all"
        )
    left = [
        path for _, path in _placed(tar, {p: parts[p] for f, p in resolved.items() if f in begun})
    ]
    known = {marker, *left}
    for part, folder in parts.items():
        files = (p for p in folder.rglob("*") if not p.is_dir() and p not in known)
        if there := next(files, None):
            raise BackupError(f"{there} is there: {part} is put back into an empty folder only")
    for path in reversed(left):  # folders too: one may not have its mode yet
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # a mount
                path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _begun(marker: Path) -> list[str]:
    """The folders of a restore that was cut off; none if it had not got further than the file.

    Raises:
        BackupError: it is still at work.
    """
    try:
        with marker.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return [str(folder) for folder in json.load(file)]
    except BlockingIOError:
        raise BackupError(f"{marker} is there: another restore is at work") from None
    except (FileNotFoundError, ValueError):
        return []


def _write(tar: tarfile.TarFile, parts: dict[str, Path], marker: Path) -> None:
    top = marker.parent
    made: list[Path] = []
    try:
        _make_folder(top, next((e.mode for e, p in _placed(tar, parts) if p == top), 0o755), made)
        made.append(marker)
        with marker.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.write(json.dumps([str(folder.resolve()) for folder in parts.values()]))
            lock.flush()
            os.fsync(lock.fileno())
            sync_folder(top)
            sync_folder(top.parent)
            for entry, path in _placed(tar, parts):
                _put(tar, entry, path, made)
            for folder in {path.parent for path in made}:
                sync_folder(folder)
    except BaseException:
        for path in reversed(made):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        raise
    marker.unlink()
    sync_folder(top)


def _put(tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path, made: list[Path]) -> None:
    if entry.isdir():
        _make_folder(path, entry.mode, made)
    elif entry.issym():
        with suppress(OSError):  # where the file system has links; readers do without
            path.symlink_to(entry.linkname)
            made.append(path)
    elif file := tar.extractfile(entry):
        _make_folder(path.parent, 0o755, made)
        made.append(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, flags, entry.mode & 0o700), "wb") as copy:
            shutil.copyfileobj(file, copy)
            os.fchmod(copy.fileno(), entry.mode)  # whatever the umask
            copy.flush()
            os.fsync(copy.fileno())


def _make_folder(path: Path, mode: int, made: list[Path]) -> None:
    """A folder that is there, perhaps a mount, stays as it is."""
    if path.is_dir():
        return
    _make_folder(path.parent, 0o755, made)
    path.mkdir()
    made.append(path)
    path.chmod(mode)


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.restore", description=__doc__.split("\n")[0])
    parser.add_argument("archive", type=Path, help="what superlink.backup has written")
    args = parser.parse_args()
    unwind_on_sigterm("restore")
    try:
        parts = folders(dict(os.environ), state_is_there=False)
        if not os.environ.get("RESULTS_DIR"):
            del parts["results"]
        done, left = restore(args.archive, parts)
        # Only now: before, there is no record that this could be put into.
        with recorded(parts["audit"], "restore", ", ".join(done), "superlink.restore"):
            pass
    except (BackupError, AuditError) as err:
        print(f"restore: {err}", file=sys.stderr)
        return 1
    except OSError as err:
        print(f"restore: {err.filename}: {err.strerror}", file=sys.stderr)
        return 1
    told = ", ".join(f"{part} in {parts[part]}" for part in done)
    if left:
        told += f"; left in the archive: {', '.join(left)} (RESULTS_DIR is not set)"
    print(f"restore: {told}; next: superlink.provision, the SuperLink, superlink.register")
    return 0


if __name__ == "__main__":
    sys.exit(main())
