"""``compare --deployment``: the lines of a file as runs of a real federation."""

import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import psutil
import pytest

from superlink.onehost.compare import main
from superlink.onehost.compare_results import known
from tests.samples import REPOSITORY, ROWS, write_jsonl

pytestmark = pytest.mark.faults
TEXT = """
rows = "rows.jsonl"
model = "MODEL"
sites = 2
seeds = [3]

[config]
num-server-rounds = 1
strategy.name = "fedavg"
strategy.fraction-train = 1.0
strategy.max-retries = 0
model.quantization = 4
model.lora.peft-lora-r = 4
train.learning-rate-max = 1e-2
train.learning-rate-min = 1e-2
train.training-arguments.per-device-train-batch-size = 4
train.training-arguments.max-steps = 2

[[line]]
name = "fp32"

[[line]]
name = "int4"
communication.codec = "int4"
"""
# The server refuses it once it knows the adapter's size.
FAILS = """
[[line]]
name = "too noisy"
privacy.clip-norm = 1.0
privacy.noise-multiplier = 1000.0
"""
# What no two runs, or not both ways, have in common.
OWN = {"seconds", "date", "commit", "made_of"}


def results(file: Path, deployed: bool) -> dict[str, dict[str, Any]]:
    records = known(file)
    return {r["line"]: r for r in records if ("deployment" in r["made_of"]) is deployed}


def test_a_deployment_learns_what_one_process_does(
    tmp_path: Path, tiny_model: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    # One thread everywhere, as the tiny model has here: of others a sum has other last digits.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    file, text = tmp_path / "tiny.toml", TEXT.replace("MODEL", str(tiny_model))
    options = [str(file), "--models", str(models_dir)]

    def said(*more: str) -> str:
        with redirect_stdout(StringIO()) as out:
            code = main([*options, *more])
        print(out.getvalue())
        assert code == 0
        return out.getvalue()

    before, after = text.split("[[line]]", 1)
    file.write_text(f"{before.replace('[3]', str([*range(3, 23)]))}{FAILS}[[line]]{after}")
    stopped_with_a_result(["superlink.onehost.compare", *options, "--deployment"])

    file.write_text(text)
    assert "compare: 0 of 2 results are there" in said()  # in one process
    adapters = {path: path.read_bytes() for path in tmp_path.glob("tiny.adapters/*/*.safetensors")}
    assert len(adapters) == 2
    assert "submit: run " in (deployed := said("--deployment"))
    assert "not used" not in deployed  # what one process found is left as it is
    assert adapters == {path: path.read_bytes() for path in adapters}
    alone, found = (results(tmp_path / "tiny.jsonl", deployed) for deployed in (False, True))
    assert sorted(alone) == sorted(found) == ["fp32", "int4"]
    for line in alone:
        a, b = alone[line], found[line]
        assert {k: a[k] for k in a.keys() - OWN} == {k: b[k] for k in b.keys() - OWN}
        assert a["loss"] != a["curve"][0][1]  # it is not the base model's
        made, of = b["made_of"], a["made_of"]
        other = {k for k in made.keys() | of.keys() if made.get(k) != of.get(k)}
        assert other == {"deployment", "SHA-256 of the code"}
    again = said("--deployment")
    assert "compare: 2 of 2 results are there" in again
    assert "submit: " not in again


def stopped_with_a_result(words: list[str]) -> None:
    """Ctrl-C at the first one, which comes behind a run that fails; no process stays."""
    with subprocess.Popen(
        [sys.executable, "-m", *words], cwd=REPOSITORY, text=True, stdout=subprocess.PIPE
    ) as stopped:
        assert stopped.stdout
        lines = list(takewhile(lambda x: "compare: fp32, seed 3: loss" not in x, stopped.stdout))
        print(*lines)
        services = psutil.Process(stopped.pid).children(recursive=True)
        stopped.send_signal(signal.SIGINT)
        print(stopped.stdout.read())
    assert stopped.returncode == 130
    failed = [x for x in lines if x.startswith("compare: too noisy, seed 3: failed, and no res")]
    assert len(failed) == 1
    assert "privacy.noise-multiplier = 1000" in failed[0]
    assert len(services) >= 3  # SuperLink and two SuperNodes
    for process in services:
        with suppress(psutil.NoSuchProcess):
            assert process.status() == psutil.STATUS_ZOMBIE
