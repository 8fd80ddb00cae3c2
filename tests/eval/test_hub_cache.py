"""The hub's files out of its cache: what `fetch` left there is all that an evaluation needs."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from eval.__main__ import main
from eval.benchmarks import BENCHMARKS, load

ROWS: dict[str, dict[str, Any]] = {  # in the hub's columns, as the parquet files nest them
    "pubmedqa": {"QUESTION": "Q?", "CONTEXTS": ["a", "b"], "final_decision": "maybe"},
    "medqa": {
        "question": "Q?",
        "options": [{"key": k, "value": k.lower()} for k in "ABCD"],
        "answer": "c",
    },
    "medmcqa": {"question": "Q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 3},
}
GOLDS = {"pubmedqa": "maybe", "medqa": "C", "medmcqa": "D"}


def into_cache(cache: Path, dataset: str, count: int) -> None:
    """As the hub's client has it: a link to the content."""
    known = BENCHMARKS[dataset]
    repository = cache / "hub" / f"datasets--{known.repository.replace('/', '--')}"
    path, blob = repository / "snapshots" / known.revision / known.file, repository / "blobs/x"
    for parent in (path.parent, blob.parent):
        parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist([ROWS[dataset]] * count), blob)
    path.symlink_to(Path("../" * len(path.parent.relative_to(repository).parts)) / "blobs/x")


@pytest.mark.parametrize("dataset", ROWS)
def test_a_fetched_set_is_read_from_the_pinned_revision(dataset: str, tmp_path: Path) -> None:
    into_cache(tmp_path, dataset, BENCHMARKS[dataset].questions)
    questions, origin = load(dataset, None, tmp_path)
    assert len(questions) == BENCHMARKS[dataset].questions
    assert {q.gold for q in questions} == {GOLDS[dataset]}
    assert BENCHMARKS[dataset].revision[:12] in origin


def packed(
    cache: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> tuple[bytes, str]:
    """What `pack` writes, and says."""
    monkeypatch.setenv("EVAL_DATASETS", "demo-four")  # another question than what there is
    assert main(["pack", "--cache", str(cache)]) == 0
    said = capsysbinary.readouterr()
    return said.out, said.err.decode()


def test_what_is_packed_is_read_where_it_is_unpacked_and_what_is_not_is_named(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for dataset in ("medqa", "pubmedqa"):
        into_cache(here, dataset, BENCHMARKS[dataset].questions)
    (here / "hub" / "models--of--nobody").mkdir()
    archive, said = packed(here, capsysbinary, monkeypatch)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert all(entry.isfile() and entry.mode == 0o644 for entry in tar)
        assert len(tar.getnames()) == 2
        tar.extractall(there, filter="data")
    for dataset in ("medqa", "pubmedqa"):
        assert load(dataset, None, there) == load(dataset, None, here)
    assert said.startswith(f"eval: not packed, since not in {here}: medmcqa, careqa; where the hub")
    assert said.count("\n") == 1


def test_where_nothing_was_fetched_the_archive_is_empty_and_one_line_says_what_to_do(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, said = packed(tmp_path, capsysbinary, monkeypatch)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getnames() == []
    assert "pubmedqa, medmcqa, medqa, careqa; where the hub can be reached" in said
    assert "docker compose run --rm fetch" in said
