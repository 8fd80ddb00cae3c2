"""Split a question/answer data set into the sites' partitions.

Writes ``site-NN/data/train.jsonl`` and ``holdout.jsonl`` and one manifest,
``prepared/data.json``, with rows and sha256 of every file. Disjoint, complete and a function of the
seed. A question that is there twice is taken once; with a file a site, once a site, and one that
several sites have is held out at none of them: the others train on it.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from app.site.row_files import SUFFIXES, suffix
from app.site.rows import VERSION, Row
from supernode.data_source import data_files, identity, listed, named, seen, sha256_of, source_table
from supernode.download import CACHE, PrepareError

BUNDLED = Path(__file__).with_name("flashcards.jsonl")
PARTITIONERS = ("iid", "dirichlet", "files")
_SCRATCH = ".rows-"
Rows = list[Row]


@dataclass(frozen=True)
class Split:
    """How to split: source is a hub data set, a file, or a folder with one file a site."""

    source: str
    sites: int
    partitioner: str = "iid"  # iid, dirichlet, or files
    partition_by: str = ""  # dirichlet: the column that holds the class
    alpha: float = 0.5  # dirichlet: smaller is more skewed
    seed: int = 2025
    columns: str = ""  # QUESTION,ANSWER, where app.site.rows cannot know them
    holdout_fraction: float = 0.1
    holdout_rows: int = 64  # at most, per site

    def check(self) -> None:
        """Raises PrepareError: no data set could be split so."""
        for flag, value, fits, allowed in (
            ("--sites", self.sites, self.sites > 0, "a whole number above 0"),
            ("--seed", self.seed, self.seed >= 0, "a whole number from 0"),
            (
                "--columns", self.columns, not self.columns or self.columns.count(",") == 1,
                "QUESTION,ANSWER",
            ),
            ("--alpha", self.alpha, 0 < self.alpha < math.inf, "a number above 0"),
            (
                "--partitioner", self.partitioner, self.partitioner in PARTITIONERS,
                "iid, dirichlet or files",
            ),
        ):  # fmt: skip
            if not fits:
                raise PrepareError(f"{flag} {value}: {allowed} is needed")


def prepare_data(
    federation: Path, split: Split, cache: Path = CACHE, token: str | None = None
) -> list[str]:
    """Make the partitions unless they are there; returns one line a site, and what was left out.

    Files that the manifest does not know, or that were changed since, are a site's own: they are
    never overwritten. Where the split is the same as before, they are said and all is left.

    Args:
        cache: where a data set of the hub is, or gets to, with the hub's ``token``; no row of a
            local file does.

    Raises:
        PrepareError: the source cannot be read or split, or a site's own data is in the way.
    """
    split.check()
    manifest_file = federation / "prepared" / "data.json"
    old = _manifest(manifest_file)
    wanted = asdict(split) | {
        "reader": VERSION,
        "source_sha256": identity(split.source, cache, token, old),
    }
    same = old.get("split") == wanted
    own = _sites_own(federation, old.get("files", {}), same)
    if same and (own or set(_there(federation)) == set(old["files"])):
        return _said(old, own)
    manifest_file.parent.mkdir(parents=True, exist_ok=True)
    for left in manifest_file.parent.glob(f"{_SCRATCH}*"):  # of a call that was killed
        shutil.rmtree(left, ignore_errors=True)
    notes: list[str] = []
    if split.partitioner == "files":
        parts = _own_files(split, notes)
        shared = _shared(parts, notes)
    else:
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=manifest_file.parent) as scratch:
            files = data_files(split.source, cache, token, scratch, notes)
        parts, shared = _partitions(split, files, notes), set()
    facts, written = _contents(federation, split, parts, shared)
    without = [name for name, f in facts.items() if "/holdout." in name and not f["rows"]]
    if without:
        notes.append(
            f"WARNING: {len(without)} of {split.sites} sites hold no row out, since they have too "
            "few that no other site has; they take no part in the evaluation"
        )
    # In this order, so that what an interruption leaves is no stranger to the next call.
    for name in old.get("files", {}):  # all intact; also those of sites that there are no longer
        (federation / name).unlink(missing_ok=True)
    for torn in federation.glob("site-*/data/.*.part"):  # rows that nobody would find again
        torn.unlink()
    manifest = {"split": wanted, "notes": notes, "files": facts}
    _write_manifest(manifest_file, manifest | {"split": None})
    for path, content in written.items():
        part = path.with_name(f".{path.name}.part")
        part.write_text(content, encoding="utf-8")
        part.replace(path)
    _write_manifest(manifest_file, manifest)
    return _said(manifest)


def _contents(
    federation: Path, split: Split, parts: list[Rows], shared: set[str]
) -> tuple[dict[str, dict[str, Any]], dict[Path, str]]:
    """The manifest's facts of every file, and what is to be in it."""
    files: dict[str, dict[str, Any]] = {}
    written: dict[Path, str] = {}
    for number, part in enumerate(parts):
        folder = federation / f"site-{number:02d}" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in _halves(part, split, shared).items():
            path = folder / f"{name}.jsonl"
            # The question whole, in one column: no reader has to put it together again.
            lines = ({"instruction": "", "input": r.question, "output": r.answer} for r in rows)
            content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            digest = hashlib.sha256(content.encode()).hexdigest()
            files[str(path.relative_to(federation))] = {"rows": len(rows), "sha256": digest}
            written[path] = content
    return files, written


def _halves(rows: Rows, split: Split, shared: set[str]) -> dict[str, Rows]:
    """A site's rows, shuffled: those held out, none of them ``shared``, and those to train on."""
    order = [rows[i] for i in _numbers(len(rows)).shuffle(seed=split.seed)["row"]]
    count = min(split.holdout_rows, int(len(order) * split.holdout_fraction))
    held_out = list(islice((row for row in order if row.question not in shared), count))
    kept = set(held_out)
    return {"holdout": held_out, "train": [row for row in order if row not in kept]}


def _numbers(count: int, classes: list[str] | None = None) -> Any:
    """A datasets.Dataset of rows' numbers: what is split by them is in no copy on a disk."""
    import datasets

    datasets.disable_progress_bars()
    columns: dict[str, Any] = {"row": list(range(count))}
    return datasets.Dataset.from_dict(columns | ({"class": classes} if classes else {}))


def _said(manifest: dict[str, Any], own: Iterable[str] = ()) -> list[str]:
    lines = [
        f"{name}: {facts['rows']} rows" for name, facts in manifest["files"].items()
        if name not in own
    ]  # fmt: skip
    mine = [f"{name}: changed or put there since; it is the site's own, and stays" for name in own]
    return [*lines, *mine, *manifest.get("notes", [])]


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


def _there(federation: Path) -> dict[str, Path]:
    return {
        str(p.relative_to(federation)): p
        for p in sorted(federation.glob("site-*/data/*"))
        if suffix(p) and not p.name.startswith(".")
    }


def _sites_own(federation: Path, known: dict[str, Any], may_stay: bool) -> list[str]:
    """Files that are not as the manifest says. Raises PrepareError: they are in the way."""
    there = _there(federation)
    own = [n for n, p in there.items() if known.get(n, {}).get("sha256") != sha256_of(p)]
    for name in own:
        beside = str(Path(name).with_suffix(".jsonl"))
        if not may_stay or (beside != name and beside in there):
            raise PrepareError(
                f"{federation / name} is not from supernode.prepare or was changed: move it away "
                "to have the partitions made, or leave this step out to use it"
            )
    return own


def _partitions(split: Split, files: dict[str, Path], notes: list[str]) -> list[Rows]:
    """The sites' rows by flwr-datasets' partitioners."""
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    by = split.partition_by if split.partitioner == "dirichlet" else ""
    table = source_table(files, split.source, split.columns, by, notes)
    if len(table.rows) < 2 * split.sites:
        raise PrepareError(
            f"data set {split.source}: {len(table.rows)} rows are too few for {split.sites} sites"
        )
    partitioner: Any = IidPartitioner(num_partitions=split.sites)
    if split.partitioner == "dirichlet":
        if split.partition_by.strip().casefold() not in table.columns:
            raise PrepareError(
                f"--partition-by {split.partition_by or '(not given)'}: dirichlet needs a column "
                f"with the class; {split.source} has {listed(table.columns)}"
            )
        if without := sum(not name.strip() for name in table.classes):
            raise PrepareError(
                f"data set {split.source}: {without} rows have nothing in column "
                f"'{split.partition_by}'; fill it in, or give another as --partition-by, of "
                f"{listed(table.columns)}"
            )
        partitioner = DirichletPartitioner(
            num_partitions=split.sites,
            partition_by="class",
            alpha=split.alpha,
            min_partition_size=2,
            seed=split.seed,
            shuffle=True,
        )
    partitioner.dataset = _numbers(len(table.rows), table.classes).shuffle(seed=split.seed)
    try:
        parts = [partitioner.load_partition(n) for n in range(split.sites)]
    except ValueError as err:
        raise PrepareError(f"data set {split.source}: {err}") from None
    return [[table.rows[i] for i in part["row"]] for part in parts]


def _own_files(split: Split, notes: list[str]) -> list[Rows]:
    """Exactly the files of a folder: site-00.jsonl goes to site 00, and so on."""
    folder, parts = Path(split.source), []
    sites = {f"site-{number:02d}" for number in range(split.sites)}
    if lost := [name for name in seen(folder) if name.rpartition(".")[0] not in sites]:
        raise PrepareError(
            f"{folder}: {named(lost)} {'are' if len(lost) > 1 else 'is'} beyond --sites "
            f"{split.sites}, or not named site-NN: give more sites, rename or move away"
        )
    for number in range(split.sites):
        name = f"site-{number:02d}"
        found = [p for p in folder.glob(f"{name}.*") if p.stem == name and suffix(p)]
        if len(found) != 1:
            raise PrepareError(
                f"{folder}: exactly one of {name}{', '.join(SUFFIXES)} is needed, "
                f"{len(found)} found"
            )
        files = {found[0].name: found[0]}
        parts.append(source_table(files, found[0].name, split.columns, "", notes).rows)
    return parts


def _shared(parts: list[Rows], notes: list[str]) -> set[str]:
    """The questions that more than one site has."""
    sites = Counter(row.question for part in parts for row in part)
    shared = {question for question, count in sites.items() if count > 1}
    if shared:
        notes.append(f"{len(shared)} questions are at more than one site: none of them is held out")
    return shared
