"""What a run will cost: the leaderboard's figure to the digit, and what is really sent."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app import plan
from app.config import CODECS, merged_config
from app.wire.adapter import Layout
from app.wire.codec import unpacked_bytes
from supernode import source
from tests.samples import REPOSITORY, run_config

PROFILES = REPOSITORY / "app" / "profiles"
MIB = 2**20
LLAMA = "ContactDoctor/Bio-Medical-Llama-3-8B"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, num_hidden_layers and
# vocab_size of the bases that a profile names, from their published config.json.
PUBLISHED = {
    "HPAI-BSC/Llama3.1-Aloe-Beta-8B": (4096, 14336, 32, 8, 32, 128256),
    "mistralai/Mistral-7B-v0.3": (4096, 14336, 32, 8, 32, 32768),
}


@pytest.fixture(autouse=True)
def _no_prepared_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS_DIR", str(tmp_path / "models"))


def printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *overrides: object
) -> list[str]:
    """The lines of ``python -m app.plan`` with these --run-config, which must succeed."""
    words = [w for text in overrides for w in ("--run-config", str(text))]
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    assert plan.main() == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *overrides: object
) -> str:
    """The one line on stderr."""
    words = [w for text in overrides for w in ("--run-config", str(text))]
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    assert plan.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def number(lines: list[str], start: str) -> float:
    """The first figure behind ``start``, of the one line that begins so."""
    (line,) = (x for x in lines if x.startswith(start))
    found = re.search(r"[\d,]+(\.\d+)?", line.removeprefix(start))
    assert found, line
    return float(found[0].replace(",", ""))


def test_the_reference_recipe_costs_what_the_leaderboard_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch)
    assert "communication (leaderboard counting): 2080.62 MB" in lines
    assert printed(capsys, monkeypatch, PROFILES / "reference.toml") == lines
    assert number(lines, "adapter:") == 13_631_488
    (adapter,) = (x for x in lines if x.startswith("adapter:"))
    assert "13,631,488 parameters in 128 arrays, 52.00 MiB" in adapter
    (a_round,) = (x for x in lines if x.startswith("a round:"))
    for part in ("2 of 20 sites", "10 steps, 160 rows", "0 are evaluated"):
        assert part in a_round
    # As one array each way, without the 128 headers.
    assert number(lines, "communication a round:") == 2 * 2 * 52
    assert number(lines, "communication (sent):") == 2080
    assert "at most" not in "\n".join(lines)
    assert any("1.04 % of communication.budget-mb" in x for x in lines)
    assert number(lines, "checkpoints:") == 520
    assert number(lines, "a GPU:") == 15.0  # tests/app/site/test_memory.py
    assert lines[0] == f"model: {LLAMA}, 4 bits"


def test_the_efficient_profile_sends_no_more_than_300_mb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch, PROFILES / "efficient.toml")
    sent = number(lines, "communication (sent): at most")
    assert sent <= 300
    # By hand: 40 transfers of a half-byte a value and a scale of 2 bytes for 64 of them.
    assert sent == pytest.approx(40 * 13_631_488 * (1 / 2 + 2 / 64) / MIB, abs=0.005)
    # All else is the reference recipe, also as the leaderboard counts.
    assert "communication (leaderboard counting): 2080.62 MB" in lines
    reference = printed(capsys, monkeypatch)
    differing = [a.split(":")[0] for a, b in zip(reference, lines, strict=True) if a != b]
    assert differing == ["a transfer", "communication a round", "communication (sent)"]


def test_half_the_rounds_cost_half(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = printed(capsys, monkeypatch)
    half = printed(capsys, monkeypatch, "num-server-rounds=5")
    for start in ("communication (sent):", "checkpoints:"):
        assert number(half, start) == number(whole, start) / 2
    assert "communication (leaderboard counting): 1040.31 MB" in half
    assert number(half, "communication a round:") == number(whole, "communication a round:")


def test_evaluation_downloads_are_counted_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The demo: 30 layers, q 576 x 576 and v 192 x 576, rank 16; 20 sites, 2 train, 4 are
    # evaluated, before the first of 3 rounds and after each.
    parameters = 30 * (16 * 576 + 576 * 16 + 16 * 576 + 192 * 16)
    lines = printed(capsys, monkeypatch, PROFILES / "demo.toml")
    assert number(lines, "adapter:") == parameters == 921_600
    assert any("2 of 20 sites train (8 steps, 32 rows), 4 are evaluated" in x for x in lines)
    each = 4 * parameters / MIB
    transfers = 3 * (2 + 2) + 4 * 4
    sent = number(lines, "communication (sent):")
    assert sent == pytest.approx(transfers * each, abs=0.005)
    # The leaderboard counts training only, with a header for each of 120 arrays.
    counted = number(lines, "communication (leaderboard counting):")
    assert counted == pytest.approx(12 * (each + 120 * 128 / MIB), abs=0.005)
    assert number(lines, "a GPU:") < 3
    without = printed(capsys, monkeypatch, PROFILES / "demo.toml", "strategy.fraction-evaluate=0")
    assert number(without, "communication (sent):") == pytest.approx(12 * each, abs=0.005)


@settings(max_examples=60)
@given(
    rounds=st.integers(1, 30),
    sites=st.integers(2, 40),
    fraction=st.floats(0.01, 1),
    evaluated=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    at_least=st.integers(1, 8),
    down=st.sampled_from(CODECS),
    up=st.sampled_from(CODECS),
)
@example(rounds=1, sites=3, fraction=1, evaluated=0.5, at_least=5, down="fp32", up="fp32")
def test_the_bytes_are_those_of_every_transfer_of_the_run(
    rounds: int, sites: int, fraction: float, evaluated: float, at_least: int, down: str, up: str
) -> None:
    config = run_config(
        num_server_rounds=rounds, min_nodes=sites, fraction_train=fraction, min_train_nodes=2,
        fraction_evaluate=evaluated, min_evaluate_nodes=at_least, codec_down=down, codec_up=up,
    )  # fmt: skip
    layout = Layout.of({"m.q_proj": [4096, 4096], "m.v_proj": [1024, 4096]}, config)
    lines = plan.plan(config, layout, sites)
    train = max(int(sites * fraction), 2)
    # No more than there are, as the strategy asks them.
    evaluate = min(max(int(sites * evaluated), at_least), sites) if evaluated else 0
    (a_round,) = (x for x in lines if x.startswith("a round:"))
    assert f"{train} of {sites} sites train" in a_round
    assert f"), {evaluate} are evaluated" in a_round
    n_down, n_up = unpacked_bytes(down, layout.size), unpacked_bytes(up, layout.size)
    total = rounds * train * (n_down + n_up) + (rounds + 1) * evaluate * n_down
    (sent,) = (x for x in lines if x.startswith("communication (sent):"))
    assert f" {total / MIB:.2f} MiB in {rounds} rounds" in sent
    assert f"{100 * total / MIB / config.budget_mb:.2f} % of" in sent
    # zlib makes the coarse ones fewer, so that it is a limit; fp32 is what it is.
    assert ("at most" in sent) == ((down, up) != ("fp32", "fp32"))


@pytest.mark.parametrize(("down", "up"), [("fp32", "int8"), ("int4", "fp32")])
def test_each_way_has_its_own_codec(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, down: str, up: str
) -> None:
    overrides = f'communication.down="{down}" communication.up="{up}"'
    lines = printed(capsys, monkeypatch, overrides)
    mb = {"fp32": 52, "int8": 13 * (1 + 2 / 64), "int4": 13 * (0.5 + 2 / 64)}
    (line,) = (x for x in lines if x.startswith("a transfer:"))
    assert f"{mb[down]:.2f} MiB down ({down}), {mb[up]:.2f} MiB up ({up})" in line
    total = number(lines, "communication (sent): at most")
    assert total == pytest.approx(20 * (mb[down] + mb[up]), abs=0.006)


def test_epochs_are_named_where_steps_do_not_limit_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = "train.training-arguments."
    lines = printed(
        capsys, monkeypatch,
        f"{args}max-steps=-1 {args}num-train-epochs=5 {args}gradient-accumulation-steps=3",
    )  # fmt: skip
    (a_round,) = (x for x in lines if x.startswith("a round:"))
    assert "5 epochs of its rows, 48 a step" in a_round
    assert "-1" not in a_round
    assert printed(capsys, monkeypatch, PROFILES / "extended.toml")  # which trains by epochs


def test_accumulated_batches_are_rows_of_a_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = "train.training-arguments."
    lines = printed(
        capsys, monkeypatch,
        f"{args}max-steps=7 {args}per-device-train-batch-size=2",
        f"{args}gradient-accumulation-steps=3",
    )  # fmt: skip
    assert any("7 steps, 42 rows" in x for x in lines)


@pytest.mark.parametrize("target", ["q_proj,k_proj", "all-linear", "down_proj"])
@pytest.mark.parametrize(
    ("name", "layers", "shapes"),
    [
        (LLAMA, 32, {"q": 8192, "k": 5120, "v": 5120, "o": 8192, "gate": 18432, "down": 18432}),
        (SMOL, 30, {"q": 1152, "k": 768, "v": 768, "o": 1152, "gate": 2112, "down": 2112}),
    ],
)
def test_a_known_model_has_its_published_shapes(
    name: str, layers: int, shapes: dict[str, int], target: str
) -> None:
    # Parameters of a layer are rank times (in + out).
    config = run_config(model_name=name, target_modules=target, lora_r=8)
    layout = Layout.of(plan.linear_layers(config, Path("/nowhere")), config)
    sides = {
        "q_proj,k_proj": shapes["q"] + shapes["k"],
        "down_proj": shapes["down"],
        "all-linear": sum(shapes.values()) + shapes["gate"],  # and up
    }[target]
    assert layout.size == layers * 8 * sides


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bases_of_the_profiles_have_their_published_layers(name: str) -> None:
    """All of them, by the library itself: names, order, and shapes, without any weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    hidden, mlp, heads, kv_heads, layers, vocabulary = PUBLISHED[name]
    makes = (MistralConfig, MistralForCausalLM) if "Mistral" in name else (
        LlamaConfig, LlamaForCausalLM
    )  # fmt: skip
    shape = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocabulary,
    }  # fmt: skip
    with torch.device("meta"):
        model = makes[1](makes[0](**shape))
    found = plan.linear_layers(run_config(model_name=name), Path("/nowhere"))
    assert list(found.items()) == list(source.linear_layers(model).items())


@pytest.mark.parametrize(("profile", "name"), [
    ("aloe", "HPAI-BSC/Llama3.1-Aloe-Beta-8B"), ("first", "HPAI-BSC/Llama3.1-Aloe-Beta-8B"),
    ("mistral", "mistralai/Mistral-7B-v0.3"),
])  # fmt: skip
def test_the_profiles_of_other_bases_cost_what_their_shapes_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, profile: str, name: str
) -> None:
    lines = printed(capsys, monkeypatch, PROFILES / f"{profile}.toml")
    hidden, _, heads, kv_heads, layers, _ = PUBLISHED[name]
    # Rank 32 on q (hidden x hidden) and v (hidden x its heads' part of hidden).
    parameters = layers * 32 * ((hidden + hidden) + (hidden + hidden * kv_heads // heads))
    assert number(lines, "adapter:") == parameters == 13_631_488
    # 10 rounds, 2 sites, both ways, and a header of 128 bytes for each of 4 arrays a layer.
    mb = 10 * 2 * 2 * (4 * parameters + 128 * 4 * layers) / MIB
    assert f"communication (leaderboard counting): {mb:.2f} MB" in lines
    assert lines[0] == f"model: {name}, 4 bits"


def test_the_boards_first_recipe_is_the_published_one() -> None:
    """0-1-ai/01AI-FlowerTune-LLM-Leaderboard-Medical, llama3.1-aloe-8b-v1/pyproject.toml."""
    _, config = merged_config(REPOSITORY, [str(PROFILES / "first.toml")])
    assert (config.strategy_name, config.num_server_rounds, config.max_steps) == ("fedavg", 10, 10)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (32, 128, 0.075)
    assert (config.targets, config.prompt) == (["q_proj", "v_proj"], "alpaca")
    assert (config.lr_max, config.lr_min, config.seq_length) == (1e-4, 1e-5, 512)
    assert (config.batch_size, config.rows_per_step) == (16, 32)
    assert (config.quantization, config.fraction_train, config.min_nodes) == (4, 0.1, 20)


def test_a_prepared_model_is_read_from_its_base_json(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    models_dir: Path,
    tiny_model: Path,
) -> None:
    monkeypatch.setenv("MODELS_DIR", str(models_dir))
    lines = printed(
        capsys, monkeypatch, f"model.name='{tiny_model}' model.lora.peft-lora-r=4",
    )  # fmt: skip
    # Two layers: q 64 x 64, v 32 x 64 (two heads of four share one).
    assert number(lines, "adapter:") == 2 * 4 * (64 + 64 + 64 + 32)
    assert str(tiny_model) in lines[0]
    # What is known stays known beside it.
    assert "communication (leaderboard counting): 2080.62 MB" in printed(capsys, monkeypatch)


def test_an_unknown_model_is_one_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = refused(capsys, monkeypatch, "model.name='nobody/no-model'")
    for part in (
        "ERROR",
        "nobody/no-model",
        str(tmp_path),
        "supernode.prepare",
        "MODELS_DIR",
        LLAMA,
    ):
        assert part in line


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("num-server-rounds=0", "num-server-rounds"),
        ("sed=1", "unknown key sed"),
        ("model.lora.target-modules='x_proj'", "x_proj"),
        ("missing.toml", "missing.toml"),
        ("communication.codec='fp8'", "communication.codec"),
    ],
)
def test_a_config_that_cannot_work_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str, part: str
) -> None:
    assert part in refused(capsys, monkeypatch, override)


def test_it_runs_as_a_command_with_files_and_pairs() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "app.plan", "--run-config", "app/profiles/efficient.toml",
            "--run-config", "num-server-rounds=5",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "communication (leaderboard counting): 1040.31 MB" in done.stdout.splitlines()
    assert "(int4)" in done.stdout
    failed = subprocess.run(
        [sys.executable, "-m", "app.plan", "--run-config", "model.name='no/model'"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize("profile", sorted(PROFILES.glob("*.toml")), ids=lambda p: p.name)
def test_every_profile_can_be_planned_within_its_budget(profile: Path) -> None:
    _, config = merged_config(REPOSITORY, [str(profile)])
    layout = Layout.of(plan.linear_layers(config, Path("/nowhere")), config)
    lines = plan.plan(config, layout, config.min_nodes)
    (sent,) = (x for x in lines if x.startswith("communication (sent):"))
    share = re.search(r"([\d.]+) % of communication.budget-mb", sent)
    assert share
    assert 0 < float(share[1]) < 100
