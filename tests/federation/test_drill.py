"""The drill in its short form: every fault is survived, and no more than the round in work lost."""

from pathlib import Path

import pytest

from tests.federation.drill import drill, table

pytestmark = pytest.mark.faults


def test_a_run_survives_every_fault_of_the_drill(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows = drill(tmp_path, models_dir, tiny_model, rounds=4)
    print(table(rows))
    assert len(rows) == 4
    assert max(r.rounds_lost for r in rows) <= 1
