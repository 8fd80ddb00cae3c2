"""A site's policy.toml: what it may say, and what it keeps in."""

import json
import re
from contextlib import nullcontext
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.config import CODECS, STRATEGIES
from app.site.policy import NONE, Policy, PolicyFileError, RefusedError
from tests.samples import REPOSITORY, run_config

NOON = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
PRINT = "0123456789abcdef"
# Of each key a value, and a run that it forbids: by its field of the run config, or what else.
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "min-rows": (161, {}),  # the recipe trains on 160: 10 steps of 16
    "max-rows-per-round": (159, {}),
    "max-steps-per-round": (9, {}),
    "base-models": (["f" * 16], {}),
    "strategies": (["fedavg", "fedprox"], {"strategy_name": "fedavgopt"}),
    "codecs": (["int8", "int4"], {"codec": "int8", "codec_up": "bf16"}),
    "max-clip-norm": (0.5, {"clip_norm": 0.6}),
    "min-noise-multiplier": (1.5, {"clip_norm": 1.0, "noise_multiplier": 1.4}),
}
OF_THE_DAY: dict[str, Any] = {
    "max-rounds-per-day": 2, "max-messages-per-day": 4, "hours": "20:00-06:00",
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.toml").write_text(text)
    return folder


def toml(rules: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in rules.items())


def check(policy: Policy, rows: int = 5000, **changes: Any) -> None:
    config = run_config(**changes)
    policy.check_run(config, PRINT)
    policy.check_round(config, rows)


def test_without_a_file_there_is_no_rule(tmp_path: Path) -> None:
    policy = Policy.read(tmp_path)
    check(policy)
    policy.check_day(NOON, "train", ["train"] * 10_000)
    policy.check_evaluation()
    assert policy.sha256 == NONE
    assert str(policy) == "no policy.toml: the run's settings alone count"


def test_a_link_that_leads_nowhere_is_not_taken_for_no_rules(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").symlink_to(tmp_path / "not-in-the-container.toml")
    with pytest.raises(PolicyFileError, match=r"policy\.toml is a link that leads nowhere here"):
        Policy.read(tmp_path)


def test_what_is_in_force_is_said_with_its_hash(tmp_path: Path) -> None:
    policy = Policy.read(written(tmp_path, "# ours\nmin-rows = 7\ncodecs = ['int4']\n"))
    assert str(policy) == (
        f'policy.toml {policy.sha256[:12]} is in force: min-rows = 7, codecs = ["int4"]'
    )
    other = Policy.read(written(tmp_path, "min-rows = 7\n"))
    assert len({policy.sha256, other.sha256, NONE}) == 3


@pytest.mark.parametrize("key", RULES)
def test_a_run_that_does_not_fit_is_refused_by_the_line_and_another_is_not(
    tmp_path: Path, key: str
) -> None:
    value, asked = RULES[key]
    policy = Policy.read(written(tmp_path, f"# one\n\n{key} = {json.dumps(value)}\n"))
    with pytest.raises(RefusedError) as caught:
        check(policy, **asked)
    line = f"policy.toml, line 3: {key} = {json.dumps(value)}; "
    assert str(caught.value).startswith(line)
    assert len(str(caught.value)) > len(line)
    fits: dict[str, Any] = {
        "strategy_name": "fedavg", "codec_up": "int4", "clip_norm": 0.5, "noise_multiplier": 1.5,
    }  # fmt: skip
    easy = {"min-rows": 160, "max-rows-per-round": 160, "max-steps-per-round": 10}
    again = easy.get(key, [PRINT] if key == "base-models" else value)
    check(Policy.read(written(tmp_path, toml({key: again}))), **fits)


def test_a_floor_for_clipping_wants_clipping(tmp_path: Path) -> None:
    policy = Policy.read(written(tmp_path, "max-clip-norm = 1\n"))
    check(policy, clip_norm=1.0)
    with pytest.raises(RefusedError, match=r"privacy\.clip-norm = 0$"):
        check(policy, clip_norm=0.0)


def test_whole_epochs_count_by_the_sites_own_rows(tmp_path: Path) -> None:
    whole: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2.0, "batch_size": 10}
    policy = Policy.read(written(tmp_path, "max-steps-per-round = 10\nmin-rows = 50\n"))
    check(policy, rows=50, **whole)
    with pytest.raises(RefusedError, match="has 12 here"):
        check(policy, rows=51, **whole)
    with pytest.raises(RefusedError, match="trains on 49 rows"):
        check(policy, rows=49, **whole)


@pytest.mark.parametrize("key", OF_THE_DAY)
def test_enough_in_a_day_is_enough_until_the_next(tmp_path: Path, key: str) -> None:
    policy = Policy.read(written(tmp_path, toml({key: OF_THE_DAY[key]})))
    done = ["query", "train", "evaluate", "train"]
    with pytest.raises(RefusedError, match=f"line 1: {key} = "):
        policy.check_day(NOON, "train", done)
    policy.check_day(NOON.replace(hour=21), "train", ["query", "train", "evaluate"])
    if key == "max-rounds-per-day":
        policy.check_day(NOON, "evaluate", done)  # what was trained may still be scored
        with pytest.raises(RefusedError):
            policy.check_day(NOON, "query", done)  # for no other run, though


def test_hours_and_days_are_those_of_the_time_zone(tmp_path: Path) -> None:
    berlin = 'time-zone = "Europe/Berlin"\nhours = "08:00-13:00"\n'
    policy = Policy.read(written(tmp_path, berlin))
    policy.check_day(NOON - timedelta(minutes=1), "train", [])
    with pytest.raises(RefusedError, match=r'"08:00-13:00"; it is 13:00 Europe/Berlin'):
        policy.check_day(NOON, "train", [])
    assert policy.day(NOON.replace(hour=23)).astimezone(UTC) == NOON.replace(hour=23)
    over_night = Policy.read(written(tmp_path, 'hours = "22:00-06:00"\n'))
    for hour, fits in ((21, False), (22, True), (0, True), (5, True), (6, False)):
        now = NOON.replace(hour=hour)
        if fits:
            over_night.check_day(now, "train", [])
        else:
            with pytest.raises(RefusedError):
                over_night.check_day(now, "train", [])


WRONG = {
    "max-step-per-round = 3": "unknown key max-step-per-round; known: max-steps-per-round",
    "min-rows = 0": "min-rows = 0 must be a whole number, 1 or more",
    "min-rows = true": "min-rows = true must be a whole number, 1 or more",
    'min-rows = "7"': 'min-rows = "7" must be a whole number',
    "min-rows = 2026-11-30": 'min-rows = "2026-11-30" must be a whole number',
    "max-clip-norm = inf": "max-clip-norm = Infinity must be a number above 0",
    "min-noise-multiplier = nan": "min-noise-multiplier = NaN must be a number above 0",
    'hours = "8-13"': 'hours = "8-13" must be a text as "20:00-06:30"',
    'hours = "08:00-08:00"': "must be a text as",
    'hours = "08:00-24:00"': "must be a text as",
    'time-zone = "Mars/Olympus"': "the name of a time zone that this host knows",
    'time-zone = "../../etc/hosts"': "the name of a time zone that this host knows",
    "time-zone = 3": "the name of a time zone that this host knows",
    "strategies = []": "strategies = [] must be a list of one or more of fedavgopt,",
    'strategies = "fedavg"': "must be a list of one or more of",
    'codecs = ["int3"]': "must be a list of one or more of fp32, bf16, int8, int4",
    'base-models = ["abc"]': "fingerprints (16 hex digits)",
    "held-out-losses = 0": "held-out-losses = 0 must be true or false",
    'error-lines = "no"': 'error-lines = "no" must be true or false',
    "[rules]\nmin-rows = 7": "unknown key rules",
    "sha256 = 3": "unknown key sha256",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_meant_is_an_error_with_line_key_value_and_what_is_allowed(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(PolicyFileError) as caught:
        Policy.read(written(tmp_path, f"error-lines = true\n\n{text}\n".replace(
            "error-lines = true\n" if text.startswith("error-lines") else "\0", "#\n"
        )))  # fmt: skip
    assert str(caught.value).startswith("policy.toml, line 3: ")
    assert WRONG[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"min-rows", b"min-rows = 7\nmin-rows = 8\n", b"\xff = 3"])
def test_what_is_no_toml_is_an_error_of_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "policy.toml").write_bytes(content)
    with pytest.raises(PolicyFileError, match=r"^policy\.toml is no") as caught:
        Policy.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000])
def test_what_the_reader_of_toml_gives_up_on_is_an_error_of_one_line(
    tmp_path: Path, value: str
) -> None:
    with pytest.raises(PolicyFileError, match=r"^policy\.toml cannot be read: it has a number of"):
        Policy.read(written(tmp_path, f"error-lines = false\nmin-rows = {value}\n"))


def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").mkdir()
    with pytest.raises(PolicyFileError, match=r"policy\.toml cannot be read: Is a directory"):
        Policy.read(tmp_path)


def test_the_page_for_hospitals_has_a_policy_with_every_key(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "hospital.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shown = Policy.read(written(tmp_path, example))
    assert set(shown.lines) == {f.metadata["key"] for f in fields(Policy) if f.metadata}


def test_every_key_is_tried_here() -> None:
    keys = {f.metadata["key"] for f in fields(Policy) if f.metadata}
    assert keys == RULES.keys() | OF_THE_DAY.keys() | {
        "time-zone", "held-out-losses", "error-lines",
    }  # fmt: skip


SOME = st.fixed_dictionaries(
    {},
    optional={
        "min-rows": st.integers(1, 60),
        "max-rows-per-round": st.integers(1, 60),
        "max-steps-per-round": st.integers(1, 20),
        "strategies": st.lists(st.sampled_from(STRATEGIES), min_size=1),
        "codecs": st.lists(st.sampled_from(CODECS), min_size=1),
        "max-clip-norm": st.floats(0.01, 2),
        "min-noise-multiplier": st.floats(0.01, 2),
    },
)
ASKED = st.fixed_dictionaries(
    {
        "strategy_name": st.sampled_from(STRATEGIES),
        "codec_up": st.sampled_from(CODECS),
        "clip_norm": st.sampled_from([0.005, 0.3, 1.0, 5.0]),
        "noise_multiplier": st.sampled_from([0.0, 0.5, 3.0]),
        "max_steps": st.sampled_from([-1, 1, 3, 30]),
        "num_train_epochs": st.sampled_from([0.2, 1.0, 3.0]),
        "batch_size": st.integers(1, 9),
        "gradient_accumulation_steps": st.integers(1, 3),
    }
)


@settings(max_examples=300)
@given(rules=SOME, asked=ASKED, rows=st.integers(1, 60))
def test_what_passes_keeps_every_rule_and_what_is_refused_breaks_one(
    tmp_path_factory: pytest.TempPathFactory, rules: dict[str, Any], asked: dict[str, Any],
    rows: int,
) -> None:  # fmt: skip
    """Said here a second time, in other words."""
    policy = Policy.read(written(tmp_path_factory.getbasetemp() / "drawn", toml(rules)))
    config = run_config(**asked)
    steps = config.steps(rows)
    used = min(rows, steps * config.batch_size * config.gradient_accumulation_steps)
    kept = (
        rules.get("min-rows", 1) <= used <= rules.get("max-rows-per-round", 60)
        and steps <= rules.get("max-steps-per-round", 10**6)
        and asked["strategy_name"] in rules.get("strategies", STRATEGIES)
        and asked["codec_up"] in rules.get("codecs", CODECS)
        and asked["clip_norm"] <= rules.get("max-clip-norm", 5.0)
        and asked["noise_multiplier"] >= rules.get("min-noise-multiplier", 0.0)
    )
    with nullcontext() if kept else pytest.raises(RefusedError):
        check(policy, rows, **asked)
