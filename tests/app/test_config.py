"""The run config: what is refused, what is kept, and the learning-rate schedule."""

import math
import tomllib
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import CODECS, STRATEGIES, ConfigError, RunConfig, flatten
from tests.samples import REPOSITORY, flat_config, run_config

KEYS = {f.metadata["key"]: f.type for f in fields(RunConfig)}
PROFILES = sorted((REPOSITORY / "app" / "profiles").glob("*.toml"))
WRONG: dict[Any, list[object]] = {
    int: [True, 1.0, "1", None, [1]],
    float: [True, "0.5", None, math.nan, math.inf],
    bool: [0, 1, "true", 1.0, None],
    bool | str: [0, 1, 1.0, None, "", "true", "on", b"auto"],
    str: [1, True, b"x", None, "", "  "],
}


def test_the_projects_defaults_are_a_valid_config() -> None:
    assert RunConfig.from_flat(flat_config()).num_server_rounds > 0


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_named(key: str) -> None:
    values = flat_config()
    del values[key]
    with pytest.raises(ConfigError, match=f"{key} is missing") as caught:
        RunConfig.from_flat(values)
    assert "pyproject.toml" in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_the_wrong_type_is_refused_naming_key_and_value(key: str) -> None:
    for wrong in WRONG[KEYS[key]]:
        if key in ("resume", "strategy.exclude-sites") and wrong == "":
            continue  # no run is to be resumed, or no site to be left out
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_flat(flat_config() | {key: wrong})
        message = str(caught.value)
        assert key in message
        assert repr(wrong) in message
        assert "pyproject.toml" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.quantisation", "model.quantization"),
        ("learning-rate-max", "train.learning-rate-max"),
        ("train.training-arguments.max-step", "train.training-arguments.max-steps"),
        ("no-such-thing", "num-server-rounds"),
    ],
)
def test_an_unknown_key_is_refused_and_a_known_one_is_suggested(key: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_flat(flat_config() | {key: 1})
    assert key in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("num_server_rounds", [1, 1000], [0, -1]),
        ("seed", [0, 2**40], [-1]),
        ("quantization", [0, 4, 8], [1, 2, 16, -4]),
        ("lora_r", [1], [0, -8]),
        ("lora_alpha", [1], [0]),
        ("lora_dropout", [0.0, 0, 0.999], [1.0, 1, -0.1]),
        ("lr_max", [1e-6, 1.0], [0.0, -1e-3]),
        ("lr_min", [0.0, 0], [-1e-9]),
        ("seq_length", [16], [15, 0]),
        ("max_tokens_per_pass", [1, 10**6], [0, -1]),
        ("gradient_checkpointing", [True, False, "auto"], ["Auto", "auto "]),
        ("batch_size", [1], [0]),
        ("gradient_accumulation_steps", [1], [0]),
        ("num_train_epochs", [0.5, 1, 2], [0, -1.0]),
        ("max_steps", [1, -1], [0, -2]),
        ("fraction_train", [1e-9, 1.0, 1], [0.0, 0, 1.001]),
        ("min_train_nodes", [1], [0]),
        ("fraction_evaluate", [0.0, 1.0], [-0.1, 1.1]),
        ("min_evaluate_nodes", [1], [0]),
        ("min_nodes", [2], [0]),
        ("strategy_name", list(STRATEGIES), ["FedAvg", "fedavg ", "fedyogi"]),
        ("solver", ["nelder-mead", "bfgs"], ["Nelder-Mead", "newton"]),
        ("proximal_mu", [0.0, 0, 1, 1e9], [-1e-9, -1]),
        ("server_lr", [1e-9, 1, 1.4, 10, 10.0], [0.0, 0, -1.0, 10.001, math.nan, math.inf, True]),
        ("min_replies", [1], [0]),
        ("max_retries", [0, 1, 100], [-1]),
        ("max_share", [1e-9, 0.5, 1.0, 1], [0.0, 0, 1.001]),
        ("max_norm_ratio", [1e-9, 1, 1e9], [0.0, 0, -1.0]),
        ("max_update_norm", [1e-9, 1, 1e9], [0.0, 0, -1.0]),
        ("codec", list(CODECS), ["codec", "fp16", "INT4", "int4 "]),
        ("codec_down", ["codec", *CODECS], ["fp16", "down"]),
        ("codec_up", ["codec", *CODECS], ["fp16", "up"]),
        ("budget_mb", [1e-9, 1, 1e9], [0.0, 0, -1.0]),
        ("node_timeout_s", [0.1, 1], [0.0, -1]),
        ("round_timeout_s", [10, 604800, 604800.0], [9.9, 0.0, -1, 604800.1, 1e300]),
    ],
)
def test_each_range_includes_its_edges_and_nothing_beyond(
    field: str, good: list[float | str], bad: list[float | str]
) -> None:
    for value in good:
        assert getattr(run_config(**{field: value}), field) == value
    for value in bad:
        with pytest.raises(ConfigError):
            run_config(**{field: value})


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        ("lr_min", "lr_max", (1e-3, 1e-4)),
        ("min_train_nodes", "min_nodes", (3, 2)),
        ("min_replies", "min_nodes", (3, 2)),
    ],
)
def test_two_keys_at_odds_are_both_named_with_their_values(
    low: str, high: str, values: tuple[float, float]
) -> None:
    key_of = {f.name: f.metadata["key"] for f in fields(RunConfig)}
    with pytest.raises(ConfigError) as caught:
        run_config(**{low: values[0], high: values[1]})
    for part in (key_of[low], key_of[high], *map(str, values)):
        assert part in str(caught.value)


def test_limits_that_are_equal_are_not_at_odds() -> None:
    config = run_config(
        lr_min=1e-4, lr_max=1e-4, min_train_nodes=3, min_replies=3, min_nodes=3, fraction_train=1.0
    )
    assert config.learning_rate(1) == 1e-4


def test_more_replies_than_sites_in_a_round_are_refused_before_anything_starts() -> None:
    # Of 20 sites 2 are sampled; a third reply can never come, however well the round goes.
    with pytest.raises(ConfigError, match="min-replies"):
        run_config(min_nodes=20, fraction_train=0.1, min_train_nodes=2, min_replies=3)


def test_the_strategy_and_transfer_keys_have_these_names_and_defaults() -> None:
    expected = {
        "strategy.name": "fedavgopt",
        "strategy.solver": "nelder-mead",
        "strategy.proximal-mu": 0.01,
        "strategy.server-lr": 1.0,
        "strategy.min-replies": 2,
        "strategy.max-retries": 2,
        "strategy.max-share": 0.5,
        "strategy.max-norm-ratio": 10.0,
        "strategy.max-update-norm": 100.0,
        "communication.codec": "fp32",
        "communication.down": "codec",
        "communication.up": "codec",
        "communication.error-feedback": True,
        "communication.budget-mb": 200_000,
    }
    flat = flat_config()
    assert {k: flat.get(k) for k in expected} == expected
    assert {k for k in KEYS if k.startswith("communication.")} == {
        k for k in expected if k.startswith("communication.")
    }
    assert set(STRATEGIES) == {"fedavgopt", "fedavg", "fedavgopt-delta", "fedprox", "rda"}
    assert set(CODECS) == {"fp32", "bf16", "int8", "int4"}


@pytest.mark.parametrize("down", ["codec", *CODECS])
@pytest.mark.parametrize("up", ["codec", *CODECS])
@pytest.mark.parametrize("codec", CODECS)
def test_each_way_has_its_own_codec_or_the_one_of_both(codec: str, up: str, down: str) -> None:
    config = run_config(codec=codec, codec_up=up, codec_down=down)
    assert config.down == (codec if down == "codec" else down)
    assert config.up == (codec if up == "codec" else up)
    assert RunConfig.from_flat(config.flat()) == config  # which keeps "codec" as it was typed


def test_the_efficient_profile_changes_the_codec_alone() -> None:
    profile = REPOSITORY / "app" / "profiles" / "efficient.toml"
    config = RunConfig.from_flat(flat_config() | flatten(tomllib.loads(profile.read_text())))
    assert config == run_config(codec="int4")
    assert config.down == config.up == "int4"
    assert config.error_feedback


@pytest.mark.parametrize(
    ("rows", "changes", "steps"),
    [
        (1000, {"max_steps": 10}, 10),
        (1, {"max_steps": 10}, 10),
        (1000, {"num_train_epochs": 2}, 126),  # 63 batches of 16
        (1000, {"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 32),
        (1000, {"num_train_epochs": 0.5}, 32),
        (1, {"num_train_epochs": 1, "gradient_accumulation_steps": 4}, 1),
    ],
)
def test_steps_are_those_that_a_site_takes(rows: int, changes: dict[str, Any], steps: int) -> None:
    """tests/app/site/test_training.py compares with Transformers."""
    assert run_config(**{"max_steps": -1, "batch_size": 16, **changes}).steps(rows) == steps


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        run_config().seed = 1  # type: ignore[misc]


@settings(max_examples=40)
@given(
    rounds=st.integers(1, 500),
    lr_max=st.floats(1e-6, 1, exclude_min=True),
    dropout=st.floats(0, 0.99),
    steps=st.one_of(st.just(-1), st.integers(1, 10_000)),
    name=st.text(min_size=1).filter(lambda t: bool(t.strip())),
    strict=st.booleans(),
)
def test_flat_and_back_gives_the_same_config(
    rounds: int, lr_max: float, dropout: float, steps: int, name: str, strict: bool
) -> None:
    config = run_config(
        num_server_rounds=rounds,
        lr_max=lr_max,
        lora_dropout=dropout,
        max_steps=steps,
        model_name=name,
        require_all_nodes=strict,
    )
    assert RunConfig.from_flat(config.flat()) == config
    assert set(config.flat()) == set(KEYS)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(KEYS)),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
    ),
)
def test_whatever_a_user_types_there_is_a_config_or_a_config_error(key: str, value: object) -> None:
    try:
        config = RunConfig.from_flat(flat_config() | {key: value})
    except ConfigError:
        return
    assert config.flat()[key] == value


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_no_profile_takes_the_adapter_of_a_single_site_for_a_round(profile: Path) -> None:
    changes = flatten(tomllib.loads(profile.read_text(encoding="utf-8")))
    assert RunConfig.from_flat(flat_config() | changes).min_replies >= 2


def test_a_federation_of_one_site_is_refused_in_a_line_that_names_both_keys() -> None:
    with pytest.raises(ConfigError, match=r"min-train-nodes = 2 is above strategy\.min-nodes = 1"):
        run_config(min_nodes=1)
    with pytest.raises(ConfigError, match=r"min-replies = 2 is above strategy\.min-nodes = 1"):
        run_config(min_nodes=1, min_train_nodes=1)
    assert run_config(min_nodes=1, min_train_nodes=1, min_replies=1).min_replies == 1


@pytest.mark.parametrize("profile", PROFILES, ids=lambda p: p.name)
def test_every_profile_gives_a_valid_config_that_differs_only_where_it_says(profile: Path) -> None:
    changes = flatten(tomllib.loads(profile.read_text(encoding="utf-8")))
    assert changes
    config = RunConfig.from_flat(flat_config() | changes).flat()
    for key, value in flat_config().items():
        assert config[key] == changes.get(key, value)


def test_there_are_the_profiles_that_the_design_names() -> None:
    assert {"demo.toml", "reference.toml", "extended.toml", "efficient.toml"} <= {
        p.name for p in PROFILES
    }


def test_the_defaults_are_the_published_recipe() -> None:
    config, profile = run_config(), REPOSITORY / "app" / "profiles" / "reference.toml"
    assert (
        RunConfig.from_flat(flat_config() | flatten(tomllib.loads(profile.read_text()))) == config
    )
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (32, 64, 0.075)
    assert (config.lr_max, config.lr_min, config.num_server_rounds) == (5e-5, 1e-6, 10)
    assert (config.batch_size, config.seq_length, config.max_steps) == (16, 512, 10)
    assert (config.fraction_train, config.min_nodes, config.quantization) == (0.1, 20, 4)


def test_the_learning_rate_is_flowertunes_cosine() -> None:
    config = run_config(lr_max=5e-5, lr_min=1e-6, num_server_rounds=10)
    assert config.learning_rate(10) == pytest.approx(1e-6, rel=1e-9)
    assert config.learning_rate(5) == pytest.approx((5e-5 + 1e-6) / 2, rel=1e-9)
    assert config.learning_rate(1) == pytest.approx(4.88008848e-5, rel=1e-6)  # by hand: cos 18°


def test_it_falls_along_a_line_where_one_says_so() -> None:
    config = run_config(lr_max=11e-5, lr_min=1e-5, num_server_rounds=4, schedule="linear")
    rates = [config.learning_rate(server_round) for server_round in (1, 2, 3, 4)]
    assert rates == pytest.approx([8.5e-5, 6e-5, 3.5e-5, 1e-5])
    with pytest.raises(ConfigError, match=r"learning-rate-schedule = 'step' must be .*linear"):
        run_config(schedule="step")


@settings(max_examples=60)
@given(
    st.integers(1, 200),
    st.floats(1e-6, 1),
    st.floats(0, 1).filter(lambda f: f == 0 or f > 1e-6),
    st.sampled_from(["cosine", "linear"]),
)
def test_the_learning_rate_falls_from_below_its_maximum_to_its_minimum(
    rounds: int, lr_max: float, fraction: float, schedule: str
) -> None:
    config = run_config(
        num_server_rounds=rounds, lr_max=lr_max, lr_min=lr_max * fraction, schedule=schedule
    )
    rates = [config.learning_rate(r) for r in range(1, rounds + 1)]
    assert rates[-1] == pytest.approx(config.lr_min)
    assert rates == sorted(rates, reverse=True)
    assert all(config.lr_min * (1 - 1e-12) <= r <= lr_max * (1 + 1e-12) for r in rates)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (" q_proj , v_proj ", ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
    ],
)
def test_target_modules_are_a_list_or_all_linear(text: str, targets: list[str] | str) -> None:
    assert run_config(target_modules=text).targets == targets
