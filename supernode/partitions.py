"""Split a question/answer data set into the sites' partitions.

Writes ``site-NN/data/train.jsonl`` and ``holdout.jsonl`` and one manifest,
``prepared/data.json``, with rows and sha256 of every file. Disjoint, complete and a function of the
seed. A question that is there twice is taken once; with a file a site, once a site, and one that
several sites have is held out at none of them: the others train on it.
"""

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from supernode.download import CACHE, PrepareError, data_folder

COLUMNS = ("instruction", "input", "output")
BUNDLED = Path(__file__).with_name("flashcards.jsonl")
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SCRATCH = ".rows-"


@dataclass(frozen=True)
class Split:
    """How to split: source is a hub data set, a file, or a folder with one file a site."""

    source: str
    sites: int
    partitioner: str = "iid"  # iid, dirichlet, or files
    partition_by: str = ""  # dirichlet: the column that holds the class
    alpha: float = 0.5  # dirichlet: smaller is more skewed
    seed: int = 2025
    holdout_fraction: float = 0.1
    holdout_rows: int = 64  # at most, per site


def prepare_data(
    federation: Path, split: Split, cache: Path = CACHE, token: str | None = None
) -> list[str]:
    """Make the partitions unless they are there; returns one line a site.

    Files that the manifest does not know, or that were changed since, are a hospital's own:
    they are never overwritten.

    Args:
        cache: where a data set of the hub is, or gets to, with the hub's ``token``; no row of a
            local file does.

    Raises:
        PrepareError: the source cannot be read or split, or a site's own data is in the way.
    """
    manifest_file = federation / "prepared" / "data.json"
    old = _manifest(manifest_file)
    wanted = asdict(split) | {"source_sha256": _source_sha256(split.source)}
    intact = _check_intact(federation, old.get("files", {}))
    # Where "notes" are missing, a site's own file was split with its repeats.
    own = split.partitioner == "files"
    if intact and old["split"] == wanted and (not own or "notes" in old):
        return _said(old)
    manifest_file.parent.mkdir(parents=True, exist_ok=True)
    for left in manifest_file.parent.glob(f"{_SCRATCH}*"):  # of a call that was killed
        shutil.rmtree(left, ignore_errors=True)
    notes: list[str] = []
    # The loader's copy of the rows is on this disk for as long as they are split, nowhere else.
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=manifest_file.parent) as scratch:
        reader = _Reader(cache, token, Path(scratch))
        parts = _own_files(split, reader, notes) if own else _partitions(split, reader, notes)
        shared = _shared(parts, notes) if own else set()
        files, written = _contents(federation, split, parts, shared)
    # In this order, so that what an interruption leaves is no stranger to the next call.
    for name in old.get("files", {}):  # all intact; also those of sites that there are no longer
        (federation / name).unlink(missing_ok=True)
    for torn in federation.glob("site-*/data/.*.part"):  # rows that nobody would find again
        torn.unlink()
    manifest = {"split": wanted, "notes": notes, "files": files}
    _write_manifest(manifest_file, manifest | {"split": None})
    for path, content in written.items():
        part = path.with_name(f".{path.name}.part")
        part.write_text(content, encoding="utf-8")
        part.replace(path)
    _write_manifest(manifest_file, manifest)
    return _said(manifest)


def _contents(
    federation: Path, split: Split, parts: list[Any], shared: set[str]
) -> tuple[dict[str, dict[str, Any]], dict[Path, str]]:
    """The manifest's facts of every file, and what is to be in it."""
    files: dict[str, dict[str, Any]] = {}
    written: dict[Path, str] = {}
    for number, dataset in enumerate(parts):
        folder = federation / f"site-{number:02d}" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in _halves(dataset, split, shared).items():
            path = folder / f"{name}.jsonl"
            content = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
            digest = hashlib.sha256(content.encode()).hexdigest()
            files[str(path.relative_to(federation))] = {"rows": len(rows), "sha256": digest}
            written[path] = content
    return files, written


def _halves(dataset: Any, split: Split, shared: set[str]) -> dict[str, Any]:
    """A site's rows, shuffled: those held out, none of them ``shared``, and those to train on."""
    order = dataset.shuffle(seed=split.seed)
    count = min(split.holdout_rows, int(len(order) * split.holdout_fraction))
    own = (i for i, row in enumerate(order) if not shared or _question(row) not in shared)
    held_out = list(islice(own, count))
    rest = sorted(set(range(len(order))).difference(held_out))
    return {"holdout": order.select(held_out), "train": order.select(rest)}


def _said(manifest: dict[str, Any]) -> list[str]:
    lines = [f"{name}: {facts['rows']} rows" for name, facts in manifest["files"].items()]
    return [*lines, *manifest.get("notes", [])]


def _manifest(path: Path) -> dict[str, Any]:
    """What the last call wrote; empty where there was none. Raises PrepareError: it is damaged."""
    if not path.exists():
        return {}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if {"split", "files"} <= manifest.keys():
            return manifest
    except (ValueError, AttributeError):
        pass
    raise PrepareError(
        f"{path} is not what supernode.prepare wrote: move it and the sites' data/ files away to "
        "have the partitions made"
    )


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}")
    part.write_text(json.dumps(manifest, indent=2) + "\n")
    part.replace(path)


def _check_intact(federation: Path, known: dict[str, Any]) -> bool:
    """True if all files of the manifest are as written; raises if another one is in the way."""
    there = {
        str(p.relative_to(federation)): p
        for p in federation.glob("site-*/data/*")
        if p.suffix in LOADERS and not p.name.startswith(".")
    }
    for name, path in there.items():
        if known.get(name, {}).get("sha256") != _sha256(path):
            raise PrepareError(
                f"{federation / name} is not from supernode.prepare or was changed: move it away "
                "to have the partitions made, or leave this step out to use it"
            )
    return bool(known) and set(there) == set(known)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _source_sha256(source: str) -> str:
    """Of a file, or of the files of a folder; empty for a data set of the hub."""
    path = Path(source)
    files = sorted(path.glob("site-*")) if path.is_dir() else [path]
    return " ".join(_sha256(f)[:16] for f in files if f.is_file())


@dataclass(frozen=True)
class _Reader:
    """Reads rows out of local files or the cache of the hub; its own copies are in ``scratch``."""

    cache: Path
    token: str | None
    scratch: Path

    def rows(self, source: str) -> Any:
        """A datasets.Dataset of the source's rows, all columns."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors may quote a row
        path, cache = Path(source), str(self.scratch)
        if not path.exists():
            path = data_folder(self.cache, source, self.token)
        if path.is_file() and path.suffix not in LOADERS:
            raise PrepareError(f"{source}: one of {', '.join(LOADERS)} is needed")
        try:
            if path.is_file():
                loaded = datasets.load_dataset(
                    LOADERS[path.suffix], data_files=str(path), split="train", cache_dir=cache
                )
            else:
                loaded = datasets.load_dataset(str(path), split="train", cache_dir=cache)
        except Exception as err:  # pyarrow's errors have no common class
            raise PrepareError(
                f"data set {source}: cannot be read ({type(err).__name__}); give a JSON, JSONL or "
                f"parquet file with the columns {', '.join(COLUMNS)}"
            ) from err
        missing = [c for c in COLUMNS if c not in loaded.column_names]
        if missing:
            raise PrepareError(
                f"data set {source}: no column {', '.join(missing)}; it has "
                f"{', '.join(loaded.column_names)}"
            )
        return loaded


def _once(loaded: Any, source: str, notes: list[str]) -> Any:
    """Without the rows whose question was there before: they could be held out and trained on."""
    first = {q: i for i, q in reversed(list(enumerate(map(_question, loaded))))}
    if repeats := len(loaded) - len(first):
        notes.append(f"{source}: {repeats} rows ask a question again and are left out")
    return loaded.select(sorted(first.values()))


def _partitions(split: Split, reader: _Reader, notes: list[str]) -> list[Any]:
    """The sites' data sets by flwr-datasets' partitioners."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    loaded = _once(reader.rows(split.source), split.source, notes)
    if len(loaded) < 2 * split.sites:
        raise PrepareError(
            f"data set {split.source}: {len(loaded)} rows are too few for {split.sites} sites"
        )
    if split.partitioner == "iid":
        partitioner: Any = IidPartitioner(num_partitions=split.sites)
    elif split.partitioner == "dirichlet":
        if split.partition_by not in loaded.column_names:
            raise PrepareError(
                f"--partition-by {split.partition_by or '(not given)'}: dirichlet needs a column "
                f"with the class; {split.source} has {', '.join(loaded.column_names)}"
            )
        partitioner = DirichletPartitioner(
            num_partitions=split.sites,
            partition_by=split.partition_by,
            alpha=split.alpha,
            min_partition_size=2,
            seed=split.seed,
            shuffle=True,
        )
    else:
        raise PrepareError(f"--partitioner {split.partitioner}: iid, dirichlet or files")
    partitioner.dataset = loaded.shuffle(seed=split.seed)
    try:
        parts = [partitioner.load_partition(n) for n in range(split.sites)]
    except ValueError as err:
        raise PrepareError(f"data set {split.source}: {err}") from None
    return [p.select_columns(list(COLUMNS)) for p in parts]


def _question(row: dict[str, Any]) -> str:
    return str(row["input"] or "").strip() or str(row["instruction"] or "").strip()


def _own_files(split: Split, reader: _Reader, notes: list[str]) -> list[Any]:
    """Exactly the files of a folder: site-00.jsonl goes to site 00, and so on."""
    folder, parts = Path(split.source), []
    for number in range(split.sites):
        found = [p for s in LOADERS if (p := folder / f"site-{number:02d}{s}").is_file()]
        if len(found) != 1:
            raise PrepareError(
                f"{folder}: exactly one of site-{number:02d}.jsonl, .json, .parquet is needed, "
                f"{len(found)} found"
            )
        loaded = reader.rows(str(found[0])).select_columns(list(COLUMNS))
        parts.append(_once(loaded, found[0].name, notes))
    return parts


def _shared(parts: list[Any], notes: list[str]) -> set[str]:
    """The questions that more than one site has."""
    sites = Counter(question for part in parts for question in map(_question, part))
    shared = {question for question, count in sites.items() if question and count > 1}
    if shared:
        notes.append(f"{len(shared)} questions are at more than one site: none of them is held out")
    return shared
