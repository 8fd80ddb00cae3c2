"""``python -m eval fetch``: the pinned files, from a hub."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from eval.benchmarks import BENCHMARKS, load
from tests.eval.test_hub_cache import GOLDS, ROWS
from tests.hub.conftest import Command
from tests.hub.server import Asked, Front, Refusal, repository
from tests.samples import REPOSITORY

DEAD = "http://127.0.0.1:9"


@pytest.mark.parametrize("dataset", ROWS)
def test_a_set_is_fetched_by_its_name_and_read_offline_from_the_cache(
    served: Path, front: Front, run: Command, tmp_path: Path, dataset: str
) -> None:
    """The front gives the local commit the pinned one's name: nobody could make that one here."""
    known = BENCHMARKS[dataset]
    table = pa.Table.from_pylist([ROWS[dataset]] * known.questions)
    pyarrow.parquet.write_table(table, tmp_path / "file")
    content = {known.file: (tmp_path / "file").read_bytes()}
    commit = repository(served, "datasets", known.repository, content)
    front.stands_for = (known.revision, commit)
    front.cuts = [1000]
    command = ("eval", "fetch", "--datasets", dataset)
    done = run(front.address, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"eval: {dataset}: {tmp_path / 'cache'}")
    again = run(DEAD, *command)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    questions, _ = load(dataset, None, tmp_path / "cache")  # offline, as tests are
    assert len(questions) == known.questions
    assert {q.gold for q in questions} == {GOLDS[dataset]}
    with (tmp_path / "benchmarks.tar").open("wb") as file:
        pack = [sys.executable, "-m", "eval", "pack", "--cache", str(tmp_path / "cache")]
        subprocess.run(pack, cwd=REPOSITORY, check=True, stdout=file)
    with tarfile.open(tmp_path / "benchmarks.tar") as tar:
        tar.extractall(tmp_path / "another", filter="data")
    assert load(dataset, None, tmp_path / "another")[0] == questions


def test_a_revision_that_is_gone_is_said(front: Front, run: Command, tmp_path: Path) -> None:
    known = BENCHMARKS["medqa"]

    def refuse(asked: Asked) -> Refusal | None:
        gone = known.revision in asked.path
        says = f"Invalid rev id: {known.revision}"
        return Refusal(404, "RevisionNotFound", says) if gone else None

    front.refuse = refuse
    done = run(front.address, "eval", "fetch", "--datasets", "medqa")
    assert done.stderr == (
        f"eval: ERROR: medqa: {known.repository}@{known.revision[:12]} is not in "
        f"{tmp_path / 'cache'}, and {front.address} says 404 (Invalid rev id: {known.revision}): "
        "that revision is not there, or no longer; or give --data-dir\n"
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_a_pinned_file_that_a_mirror_does_not_have_is_said(mirror: str, run: Command) -> None:
    done = run(mirror, "eval", "fetch", "--datasets", "careqa")
    (line,) = done.stderr.splitlines()
    assert f"{mirror} says 404 (Entry not found): that file is not there, or no longer" in line
