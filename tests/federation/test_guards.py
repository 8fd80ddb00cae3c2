"""Compromised hospitals in a real run: it completes without them and says why."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import superlink.submit
from app.server.checkpoint import rounds
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from supernode.partitions import Split, prepare_data
from tests.federation.hostile import hostile
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES, ROUNDS = 5, 2
HOSTILE = {1: "nan", 2: "huge", 3: "other layout", 4: "too large"}


class Infiltrated(LocalFederation):
    """Four of the five sites send what they should not."""

    def start_node(self, number: int, **settings: str) -> None:
        if number in HOSTILE:
            settings |= hostile(self.work / f"hostile-{number}", HOSTILE[number])
        super().start_node(number, **settings)


@pytest.fixture(scope="module")
def federation(
    models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Infiltrated, Control]]:
    work = tmp_path_factory.mktemp("infiltrated")
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    with Infiltrated(work, models_dir, work / "results", SITES) as infiltrated:
        infiltrated.provision()
        prepare_data(infiltrated.federation, Split(str(source), SITES))
        yield infiltrated, infiltrated.start()


def submit(federation: tuple[Infiltrated, Control], model: Path, changes: str) -> tuple[int, Path]:
    """Exit code and folder of the newest run."""
    local, control = federation
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds={ROUNDS} strategy.min-nodes={SITES} strategy.fraction-train=1.0",
        f"train.training-arguments.max-steps=2 strategy.fraction-evaluate=0.0 {changes}",
    ]
    before = {p.resolve() for p in local.results.glob("*/run.json")}
    code = superlink.submit.submit(REPOSITORY, overrides, control, local.public)
    (new,) = {p.resolve() for p in local.results.glob("*/run.json")} - before
    return code, new.parent


def test_a_run_completes_without_the_hostile_sites_and_says_why(
    federation: tuple[Infiltrated, Control], tiny_model: Path
) -> None:
    code, run = submit(federation, tiny_model, "strategy.min-replies=1")
    assert code == 0
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["round"] for line in lines] == [1, 2]
    for line in lines:
        print(line["rejected"])
        assert line["partitions"] == [0]
        assert set(line["rejected"]) == {"site-01", "site-02", "site-03", "site-04"}
        assert line["rejected"]["site-01"] == "adapter: values that are not finite"
        assert "update of norm" in line["rejected"]["site-02"]
        assert "bytes of fp32" in line["rejected"]["site-03"]
        assert "unavailable" in line["rejected"]["site-04"].lower()  # it did not get in at all
    log = (federation[0].work / "logs" / "superlink.log").read_text()
    assert log.count("refused: an array of 2 pieces") == ROUNDS  # and its SuperNode went on
    for folder in rounds(run).values():
        arrays = load_file(folder / "adapter_model.safetensors").values()
        assert all(np.isfinite(a).all() and np.abs(a).max() < 10 for a in arrays)


def test_a_run_that_only_hostile_sites_could_complete_ends_with_their_names(
    federation: tuple[Infiltrated, Control], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superlink.submit, "MAX_RESUMES", 0)
    code, run = submit(federation, tiny_model, "strategy.min-replies=2 strategy.max-retries=1")
    assert code == 1
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "failed"
    assert facts["error"].startswith("round 1: 1 usable replies, strategy.min-replies = 2")
    assert all(f"site-{n:02d}: " in facts["error"] for n in HOSTILE)
    assert not rounds(run)
