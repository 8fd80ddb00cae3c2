"""Where a data set's rows come from: a file, a folder, or the hub; each question once.

What stands there is read anew each time, and no library's copy of it is made.
"""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.site.row_files import SUFFIXES, RowsError, suffix
from app.site.rows import Table, read
from supernode.download import PrepareError, check_id, data_folder

MUCH = 0.1  # of the rows, left out, is worth a warning
SHOWN = 10  # files that are named
MOST_COLUMNS = 12  # that are listed
_NAME = r"[^\W\d][\w.-]{0,31}"  # one word
_ABOUT = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}  # no rows


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity(source: str, cache: Path, token: str | None, old: dict[str, Any]) -> str:
    """Of a file or of all files of a folder; of a data set of the hub its revision."""
    path = Path(source)
    if not path.exists():
        try:
            return data_folder(cache, source, token).name
        except PrepareError:  # gone from the cache, or not there yet: reading it will say so
            return str((old.get("split") or {}).get("source_sha256", ""))
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    whole = "".join(f"{f.relative_to(path)} {sha256_of(f)}\n" for f in files)
    return hashlib.sha256(whole.encode()).hexdigest()


def seen(folder: Path) -> list[str]:
    """The data files in a folder and those below, without hidden ones and what tells of a set."""
    files = (p for p in folder.rglob("*") if suffix(p) and p.name not in _ABOUT and p.is_file())
    names = sorted(p.relative_to(folder).as_posix() for p in files)
    return [name for name in names if not any(p.startswith(".") for p in name.split("/"))]


def named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def listed(columns: list[str]) -> str:
    """Their names, if those are few and all look like names.

    Without a line of column names the first row stands there, and it is no message's.
    """
    names = len(columns) <= MOST_COLUMNS and all(re.fullmatch(_NAME, c) for c in columns)
    return ", ".join(columns) if names else f"{len(columns)} columns"


def data_files(
    source: str, cache: Path, token: str | None, scratch: str, notes: list[str]
) -> dict[str, Path]:
    """The data files by name: the file itself, or those of a folder's or hub set's train split.

    Adds to ``notes`` the others that are there. Raises PrepareError: one of a local folder's is in
    no split, so that nobody chose to leave it out.
    """
    if Path(source).is_file():
        return {source: Path(source)}
    here = bool(source) and Path(source).is_dir()
    if not here:
        check_id("data set", source.rstrip("/"))
    folder = Path(source) if here else data_folder(cache, source, token)
    import datasets

    try:
        names = datasets.get_dataset_config_names(str(folder))
        default = datasets.get_dataset_default_config_name(str(folder))
        if not default:
            raise PrepareError(
                f"data set {source}: it has the configurations {', '.join(names)}; give the file "
                f"of one as --source, out of {folder}"
            )
        builder = datasets.load_dataset_builder(str(folder), default, cache_dir=scratch)
    except PrepareError:
        raise
    except Exception as err:  # of no common class
        raise PrepareError(
            f"data set {source}: no files that can be read ({type(err).__name__}); give one of "
            f"{', '.join(SUFFIXES)} as --source, out of {folder}"
        ) from err
    splits = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if "train" not in splits:
        raise PrepareError(
            f"data set {source}: no split 'train', it has {', '.join(splits) or 'none'}; give the "
            f"file of one as --source, out of {folder}"
        )
    split_of = {os.path.realpath(f): name for name, files in splits.items() for f in files}
    there = {name: split_of.get(os.path.realpath(folder / name), "") for name in seen(folder)}
    if here and (lost := [name for name, split in there.items() if not split]):
        raise PrepareError(
            f"data set {source}: {named(lost)} would not be read; give one file with all rows as "
            "--source, or move away what is not wanted"
        )
    others = [f"{n} ({split or 'no split'})" for n, split in there.items() if split != "train"]
    if others:
        notes.append(f"{source}: not read: {named(others)}")
    # With its folder: shards in several folders may have one name.
    return {f"{source}: {os.path.relpath(file, folder)}": Path(file) for file in splits["train"]}


def source_table(
    files: dict[str, Path], called: str, columns: str, class_column: str, notes: list[str]
) -> Table:
    """The files' rows, each question once: else it could be held out and trained on.

    Adds to ``notes`` how many there are, and why others are left out. Raises PrepareError.
    """
    try:
        table = read(files, columns, class_column)
    except RowsError as err:
        has = f"; it has {listed(err.columns)}" if err.columns else ""
        raise PrepareError(f"data set {err}{has}") from None
    first = {r.question: i for i, r in reversed(list(enumerate(table.rows)))}
    once = sorted(first.values())
    lost = {
        "without a question or an answer": table.empty,
        "that ask a question again": table.repeated + len(table.rows) - len(once),
    }
    told = "".join(f", {count} {what}" for what, count in lost.items() if count)
    warning = "WARNING: " if sum(lost.values()) > MUCH * table.read else ""
    notes.append(f"{warning}{called}: {table.read} rows, {len(once)} of them used{told}")
    if table.left_out:
        notes.append(f"{called}: the instruction that all rows share is no part of the questions")
    return replace(
        table, rows=[table.rows[i] for i in once], classes=[table.classes[i] for i in once]
    )
