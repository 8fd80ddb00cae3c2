"""What `make demo` says when one of its own processes has ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from superlink.onehost.processes import LocalFederation
from tests.samples import REPOSITORY, ROWS

pytestmark = pytest.mark.faults


def test_a_supernode_that_dies_at_its_start_ends_the_demo_with_its_log(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source, results = tmp_path / "rows.json", tmp_path / "results"
    source.write_text(json.dumps(ROWS))
    LocalFederation(tmp_path, models_dir, results, 2).provision()
    broken = tmp_path / "federation" / "site-01" / "site.env"  # somebody's own: it is kept
    broken.write_text(broken.read_text().replace("PARTITION_ID=1", "PARTITION_ID=one"))
    done = subprocess.run(
        [
            sys.executable, "-m", "superlink.onehost", "--sites", "2", "--model", str(tiny_model),
            "--data", str(source), "--work", str(tmp_path), "--models", str(models_dir),
            "--results", str(results), "--run-config", "strategy.node-timeout-s=90",
        ],
        cwd=REPOSITORY, check=False, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode == 1
    log = tmp_path / "logs" / "site-01.log"
    said = "demo: ERROR: the SuperNode of site-01 has ended with exit code 1; end of its log, "
    assert f"{said}{log}:\n{log.read_text().strip()}\n" in done.stderr
    assert f"see {broken}, line " in done.stderr
    assert " SuperNodes online after " not in done.stderr
    assert "submit: run " not in done.stdout
