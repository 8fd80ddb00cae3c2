"""Sets of the hub of which nobody can know which rows are meant: one line with the choices."""

import json
import re
from pathlib import Path

import pytest

from tests.hub.conftest import Command
from tests.hub.server import repository

pytestmark = pytest.mark.faults  # each command splits rows with a library that takes seconds
CONFIGS = b"""---
configs:
- config_name: english
  data_files: en.jsonl
- config_name: german
  data_files: de.jsonl
---
"""


def rows(what: str, count: int = 20) -> bytes:
    lines = ({"question": f"{what} {n}?", "answer": f"A {n}"} for n in range(count))
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def prepared(run: Command, hub: str, source: str) -> tuple[int, str, str]:
    done = run(hub, "supernode.prepare", "data", "--source", source, "--sites", "2")
    return done.returncode, done.stdout, done.stderr


def test_the_line_lists_the_configurations_and_its_advice_works(
    served: Path, mirror: str, run: Command
) -> None:
    files = {"README.md": CONFIGS, "en.jsonl": rows("Q"), "de.jsonl": rows("F")}
    repository(served, "datasets", "somebody/cards", files)
    code, out, err = prepared(run, mirror, "somebody/cards/")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    folder = Path(line.rpartition(" ")[2])
    assert line == (
        "prepare: ERROR: data set somebody/cards/: it has the configurations english, german; give "
        f"the file of one as --source, out of {folder}"
    )
    assert {p.name for p in folder.iterdir()} == set(files)
    code, out, err = prepared(run, mirror, str(folder / "de.jsonl"))
    assert code == 0, err
    assert f"prepare: {folder}/de.jsonl: 20 rows, 20 of them used" in out.splitlines()


def test_the_line_lists_the_splits_where_none_is_for_training(
    served: Path, mirror: str, run: Command
) -> None:
    files = {"test.jsonl": rows("T"), "validation.jsonl": rows("V")}
    repository(served, "datasets", "somebody/exam", files)
    code, out, err = prepared(run, mirror, "somebody/exam")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert re.fullmatch(
        r"prepare: ERROR: data set somebody/exam: no split 'train', it has (test, validation|"
        r"validation, test); give the file of one as --source, out of /\S+/[0-9a-f]{40}",
        line,
    )
