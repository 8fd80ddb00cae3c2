"""A base model that is no Llama: GPT-2, with layers of other names and a place for each token."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from app.server.checkpoint import newest, rounds
from superlink.onehost.processes import LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from supernode.quantise import prepare_model
from tests.samples import REPOSITORY, ROWS, write_jsonl
from tests.tiny_model import build_tiny_family

pytestmark = pytest.mark.faults


def test_gpt_2_is_trained_and_a_row_that_it_has_no_place_for_is_told_at_once(
    tmp_path: Path,
) -> None:
    source, results = tmp_path / "gpt2", tmp_path / "results"
    build_tiny_family(source, "gpt2")
    prepare_model(tmp_path / "models", tmp_path / "cache", str(source), "none", None)
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(source))} model.quantization=0 model.lora.peft-lora-r=4"
        ' model.lora.target-modules="c_attn" train.seq-length=2000',
        "num-server-rounds=1 strategy.min-nodes=2 strategy.node-timeout-s=120",
        "strategy.fraction-evaluate=0.0 train.learning-rate-max=0.01",
    ]
    with LocalFederation(tmp_path, tmp_path / "models", results, 2) as federation:
        federation.provision()
        prepare_data(federation.federation, Split(str(rows), 2))
        control = federation.start()
        assert submit(REPOSITORY, overrides, control, federation.public) == 0
        run = newest(results)
        long = {"instruction": "", "input": "Long?", "output": "long " * 600}
        own = federation.federation / "site-01" / "data" / "train.jsonl"
        own.write_text(own.read_text() + json.dumps(long) + "\n")
        assert submit(REPOSITORY, overrides, control, federation.public) == 1
    assert run is not None
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    arrays = load_file(rounds(run)[1] / "adapter_model.safetensors")
    assert {n.split(".")[-3] for n in arrays} == {"c_attn"}
    assert any(a.any() for n, a in arrays.items() if "lora_B" in n)
    (failed,) = [p for p in results.glob("*/run.json") if p.parent.resolve() != run.resolve()]
    facts = json.loads(failed.read_text())
    assert facts["status"] == "failed"
    assert "site-01: data/train.jsonl: 1 rows are longer than the 1024 tokens" in facts["error"]
    # Its own log says it too. (What else is an error to Flower depends on when it is stopped.)
    logs = [(tmp_path / "logs" / f"site-{n:02d}.log").read_text() for n in (0, 1)]
    told = "ERROR: data/train.jsonl: 1 rows are longer than the 1024 tokens"
    assert [log.count(told) for log in logs] == [0, 1]
