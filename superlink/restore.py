"""Put a backup back, into empty folders.

    python -m superlink.restore ARCHIVE

ARCHIVE is superlink.backup's; the folders are FEDERATION_DIR, SITES_DIR, AUDIT_DIR, STATE_DIR and
RESULTS_DIR, which must be empty.
All checksums are compared before anything is written. Without RESULTS_DIR the results stay in the
archive (tar -xf ARCHIVE results). Then: superlink.provision, the SuperLink, superlink.register.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tarfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from superlink.audit import AuditError, recorded
from superlink.backup import ABOUT, FORM, SUMS, BackupError, folders

LATEST = "results/latest"  # the one link


def restore(archive: Path, parts: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Write what the archive has of these parts; returns their names, and those of its others.

    What was written is removed again if that fails.

    Raises:
        BackupError: it is no backup, damaged, of another Flower, or a folder is not empty.
        OSError: it cannot be read, or something cannot be written.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            held = _checked(tar, archive)
            mine = {part: folder for part, folder in parts.items() if part in held}
            for part, folder in mine.items():
                if there := next((p for p in folder.rglob("*") if not p.is_dir()), None):
                    raise BackupError(
                        f"{there} is there: {part} is put back into an empty folder only"
                    )
            _write(tar, mine)
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
        link = entry.issym() and entry.name == LATEST and entry.linkname.isdecimal()
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


def _write(tar: tarfile.TarFile, parts: dict[str, Path]) -> None:
    made: list[Path] = []
    try:
        for entry in tar.getmembers():
            part, *rest = PurePosixPath(entry.name).parts
            if part not in parts:
                continue
            path = parts[part].joinpath(*rest)
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
    except BaseException:
        for path in reversed(made):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        raise


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
