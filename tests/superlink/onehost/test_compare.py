"""``compare`` with the tiny model: real rounds and sites in this process."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.site.base_model import find, load_with_lora
from app.wire.adapter import Layout, initial_adapter
from superlink.onehost import rounds
from superlink.onehost.compare import Plan, main
from superlink.onehost.compare_results import CompareError, fitting, known
from superlink.onehost.rounds import Federation, arithmetic
from tests.samples import REPOSITORY, ROWS, write_jsonl

TEXT = """
rows = "rows.jsonl"
model = "MODEL"
sites = 2
seeds = [3, 4]
every-round = true

[config]
num-server-rounds = 2
strategy.name = "fedavg"
strategy.fraction-train = 1.0
strategy.max-retries = 0
train.learning-rate-max = 1e-2
train.training-arguments.per-device-train-batch-size = 4
train.training-arguments.max-steps = 2
[config.model]
quantization = 0
lora.peft-lora-r = 4

[[line]]
name = "fedavg"

[[line]]
name = "int4"
communication.codec = "int4"
"""
DIVERGES = '[[line]]\nname = "too fast"\ntrain.learning-rate-max = 1e9\n'


@pytest.fixture
def text(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEVICE", "cpu")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return TEXT.replace("MODEL", str(tiny_model))


def written(folder: Path, text: str) -> Path:
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    return folder / "tiny.toml"


def results(folder: Path) -> list[dict[str, Any]]:
    """But for what no two runs have in common."""
    found = known(folder / "tiny.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "date", "commit")} for r in found]


def adapters(folder: Path) -> dict[str, bytes]:
    found = sorted((folder / "tiny.adapters").iterdir())
    return {path.name: (path / "adapter_model.safetensors").read_bytes() for path in found}


def test_stopped_and_resumed_is_as_in_one_go(tmp_path: Path, text: str, models_dir: Path) -> None:
    file = written(tmp_path, text)
    options = [str(file), "--models", str(models_dir)]
    assert main([*options, "--out", str(tmp_path / "whole")]) == 0
    written(tmp_path, text.replace("[3, 4]", str(list(range(3, 23)))))  # more than get done
    command = [sys.executable, "-m", "superlink.onehost.compare", *options]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE,
    ) as stopped:  # fmt: skip
        assert stopped.stdout
        assert any("fedavg, seed 3: loss" in line for line in stopped.stdout)
        stopped.send_signal(signal.SIGTERM)
    assert stopped.returncode == 130
    whole, lines = results(tmp_path / "whole"), (tmp_path / "tiny.jsonl").read_text().splitlines()
    # As if it had been killed while it wrote the second.
    (tmp_path / "tiny.jsonl").write_text(f"{lines[0]}\n{json.dumps(whole[1])[:40]}")
    written(tmp_path, text)
    assert main(options) == 0
    assert results(tmp_path) == whole
    assert adapters(tmp_path) == adapters(tmp_path / "whole")
    assert [*adapters(tmp_path)] == [
        f"{line}, seed {seed}" for line in ("fedavg", "int4") for seed in (3, 4)
    ]
    for suffix in (".md", ".svg"):
        assert (tmp_path / f"tiny{suffix}").stat().st_size


def test_every_line_has_the_same_rows_and_sites(
    tmp_path: Path, text: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two of three sites in a round.
    text = text.replace("sites = 2", "sites = 3").replace("fraction-train = 1.0", "max-share = 1")
    options = [str(written(tmp_path, text + DIVERGES)), "--models", str(models_dir)]
    assert main(options) == 1
    assert "compare: too fast, seed 4: failed, and no result: round 1" in capsys.readouterr().out
    found = {(r["line"], r["seed"]): r for r in results(tmp_path)}
    assert [*found] == [(line, seed) for seed in (3, 4) for line in ("fedavg", "int4")]
    assert len(adapters(tmp_path)) == len(found)
    for seed in (3, 4):
        a, b = found["fedavg", seed], found["int4", seed]
        assert a["sites"] == b["sites"]
        assert a["curve"][0] == b["curve"][0]
        assert a["made_of"]["SHA-256 of the rows"] == b["made_of"]["SHA-256 of the rows"]
        assert b["mib"] < a["mib"] / 5
        assert a["loss"] != b["loss"]
        assert len(a["curve"]) == 1 + 2
        assert a["loss"] < a["curve"][0][1]  # it learns
    assert found["fedavg", 3]["sites"] != found["fedavg", 4]["sites"]
    # What is there is not run again, and of other rows it is not taken.
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:-1])
    assert main([str(written(tmp_path, text.replace("[3, 4]", "[3]"))), *options[1:]]) == 0
    said = capsys.readouterr().out
    assert "not used: fedavg, seed 3; int4, seed 3: made of something else: SHA-256 of the" in said
    assert "not used: fedavg, seed 4; int4, seed 4: no line or seed of the file any more" in said
    assert len(results(tmp_path)) == 4 + 2
    assert main([str(tmp_path / "tiny.toml"), *options[1:]]) == 0
    assert len(results(tmp_path)) == 4 + 2
    assert "no interval" in (tmp_path / "tiny.md").read_text()


def test_a_model_that_stays_loaded_learns_what_a_fresh_one_does(
    tmp_path: Path, text: str, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.read(written(tmp_path, text.replace("quantization = 0", "quantization = 4")))
    base = find(models_dir, plan.lines["int4"].model_name, 4)

    def losses(name: str) -> Any:
        federation = Federation(tmp_path / name, plan.rows, plan.sites, 8, base)
        with federation.sites():
            (tmp_path / "adapter").mkdir(exist_ok=True)
            run = federation.run(plan.config("int4", 3), True, tmp_path / "adapter")
            return run["curve"]

    kept = losses("kept")
    loads = []

    def load(kept: Any, *given: Any) -> Any:
        loads.append(given)
        return kept._load(*given)

    monkeypatch.setattr(rounds._Kept, "__call__", load)
    assert losses("fresh") == kept
    assert len(loads) == 2 * 2 + 3 * 2  # training and scoring, at each site


def test_what_a_training_wraps_a_model_in_is_gone_before_the_next(
    tmp_path: Path, text: str, models_dir: Path
) -> None:
    """Else each would add to it, up to Python's limit on calls. Only a GPU trains in bf16."""
    plan = Plan.read(written(tmp_path, text))
    base = find(models_dir, plan.lines["int4"].model_name, 0)
    layout = Layout.of(base.linear_layers, plan.lines["int4"])
    given = base, plan.lines["int4"], "cpu", layout, initial_adapter(layout, 0)
    kept = rounds._Kept(load_with_lora)
    model, tokenizer = kept(*given)
    forward = model.forward
    model.forward = lambda *given, **named: forward(*given, **named)  # as accelerate does
    assert kept(*given) == (model, tokenizer)
    assert model.forward == forward


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"rows.jsonl"', '"no.jsonl"', "rows = 'no.jsonl': there is no /"),
        ("sites = 2", "sites = 0", "sites = 0: it must be a whole number from 1"),
        ("sites = 2", "", "sites is missing: it must be a whole number from 1"),
        ("sites = 2", "sites = 2\nround = 3", "unknown key round; known: rows, model, sites"),
        ("[3, 4]", "[3, 3]", "seeds = [3, 3]: it must be a list of different whole numbers"),
        ("[3, 4]", "[]", "seeds = []: it must be a list"),
        ("[3, 4]", "[[3]]", "seeds = [[3]]: it must be a list"),
        ("every-round = true", "every-round = 1", "every-round = 1: it must be true or false"),
        ('name = "int4"', "", "[[line]] 2: name = None: it must be a text"),
        ('name = "int4"', 'name = "a|b"', "[[line]] 2: name = 'a|b': it must be a text"),
        ('name = "int4"', 'name = "../b"', "[[line]] 2: name = '../b': it must be a text"),
        ('name = "int4"', 'name = "fedavg"', "name = 'fedavg': it must be a text without"),
        ('codec = "int4"', 'codec = "int5"', "line 'int4': run config: communication.codec = 'int"),
        ('codec = "int4"', 'codecs = "int4"', "line 'int4': run config: unknown key communicat"),
        ('codec = "int4"', "codec = 4\nseed = 2", "line 'int4': seed = 2: a comparison sets it"),
        ("num-server-rounds", "strategy.min-nodes", "[config]: strategy.min-nodes = 2: a comp"),
        ('communication.codec = "int4"', "train.seq-length = 64", "set it in [config]"),
        ('communication.codec = "int4"', 'model.prompt = "chat"', "set it in [config]"),
        ("sites = 2", "sites = 2 3", "line 4"),
        ('"q"', '"q"', ""),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(
    tmp_path: Path, text: str, old: str, new: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text.replace(old, new))
    if not said:
        assert list(Plan.read(file).lines) == ["fedavg", "int4"]
        return
    assert main([str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compare: ERROR: {file}")
    assert said in line


def test_a_folder_gives_each_site_its_own_file(
    tmp_path: Path, text: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text.replace("rows.jsonl", "sites").replace("[3, 4]", "[3]").split("\n[[line]]")[0]
    file = written(tmp_path, text + '\n[[line]]\nname = "fedavg"\n')
    (tmp_path / "sites").mkdir()
    write_jsonl(tmp_path / "sites" / "site-00.jsonl", ROWS[:10])
    assert main([str(file), "--models", str(models_dir)]) == 1
    assert "exactly one of site-01.jsonl" in capsys.readouterr().err
    write_jsonl(tmp_path / "sites" / "site-01.jsonl", ROWS[10:])
    plan = Plan.read(file)
    base = find(models_dir, plan.lines["fedavg"].model_name, 0)
    Federation(tmp_path / "work", plan.rows, plan.sites, 8, base)
    for number, rows in enumerate((ROWS[:10], ROWS[10:])):
        data = tmp_path / "work" / f"site-{number:02d}" / "data"
        read = [line for path in data.iterdir() for line in path.read_text().splitlines()]
        assert len(read) == len(rows)


def test_a_base_model_without_a_chat_template_is_refused_before_any_training(
    tmp_path: Path, text: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text.replace("quantization = 0", 'quantization = 0\nprompt = "chat"'))
    assert main([str(file), "--models", str(models_dir)]) == 1
    assert "compare: ERROR: " in (said := capsys.readouterr().err)
    assert "model.prompt = 'chat': the chat template of base model" in said
    assert "it has none (chat_template.jinja" in said
    assert results(tmp_path) == []


def test_two_comparisons_do_not_write_to_one_file(
    tmp_path: Path, text: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "tiny.jsonl").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main([str(written(tmp_path, text)), "--models", str(models_dir)]) == 1
    assert "tiny.jsonl: another comparison is writing to it" in capsys.readouterr().err


def test_too_few_rows_to_hold_one_out_are_one_line(
    tmp_path: Path, text: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, text.replace("sites = 2", "sites = 4"))
    assert main([str(file), "--models", str(models_dir)]) == 1
    assert "too few rows for 4 sites: none holds a row out" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_one_line(
    tmp_path: Path, text: str, models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--models", str(models_dir)]
    text += 'model.lora.target-modules = "qqq"\n'
    assert main([str(written(tmp_path, text)), *models]) == 1
    assert "line 'int4': " in capsys.readouterr().err
    assert main([str(written(tmp_path, text.replace("model = ", "model = 'x' #"))), *models]) == 1
    assert "no base model x (0 bits) among the prepared ones" in capsys.readouterr().err


def test_another_cpu_or_number_of_threads_is_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert arithmetic().endswith(f", threads {os.cpu_count()}")
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    told = "processor\t: 0\nvendor_id\t: X\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: X 7\n"
    (tmp_path / "cpuinfo").write_text((told + "stepping\t: 8\n\n") * 2)
    monkeypatch.setattr(rounds, "_CPU", tmp_path / "cpuinfo")
    assert "cpu family 6 model 207 stepping 8, threads 99" in arithmetic()
    monkeypatch.setattr(rounds, "_CPU", tmp_path / "none")
    assert arithmetic() == f"{platform.machine()}, threads 99"


def test_results_of_something_else_are_named_and_not_mixed_in() -> None:
    made = {"strategy.server-lr": 1.0, "SHA-256 of the code": "a"}
    other = made | {"strategy.server-lr": 1.4}
    record = {"line": "a", "seed": 0, "loss": 1.0, "made_of": made}
    wanted = {("a", 0): made, ("a", 1): made, ("b", 0): made}
    found, others = fitting(
        [
            record | {"made_of": other}, record, record | {"loss": 2.0},
            record | {"line": "b", "made_of": other}, record | {"line": "c"},
            record | {"seed": 1, "made_of": made | {"SHA-256 of the code": "b"}},
        ],
        wanted,
    )  # fmt: skip
    assert found == {("a", 0): record}
    assert others == {
        "made of something else: strategy.server-lr = 1.4 then, 1.0 now": [
            "a, seed 0", "b, seed 0",
        ],
        "no line or seed of the file any more": ["c, seed 0"],
        "made of something else: SHA-256 of the code": ["a, seed 1"],
    }  # fmt: skip


@pytest.mark.parametrize("line", ["[]", "{}", "x", '{"line": "a", "seed": 0, "loss": 1}'])
def test_another_file_in_the_place_of_the_results_stays(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tiny.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(CompareError, match=r"tiny.jsonl, line 1: not what compare writes"):
        known(path)
    assert path.read_text() == f"{line}\n"
