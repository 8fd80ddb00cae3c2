"""The hub's files out of its cache: what `fetch` left there is all that an evaluation needs."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

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
    known = BENCHMARKS[dataset]
    repository = cache / "hub" / f"datasets--{known.repository.replace('/', '--')}"
    path = repository / "snapshots" / known.revision / known.file
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist([ROWS[dataset]] * count), path)


@pytest.mark.parametrize("dataset", ROWS)
def test_a_fetched_set_is_read_from_the_pinned_revision(dataset: str, tmp_path: Path) -> None:
    into_cache(tmp_path, dataset, BENCHMARKS[dataset].questions)
    questions, origin = load(dataset, None, tmp_path)
    assert len(questions) == BENCHMARKS[dataset].questions
    assert {q.gold for q in questions} == {GOLDS[dataset]}
    assert BENCHMARKS[dataset].revision[:12] in origin
