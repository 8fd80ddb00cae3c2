"""What a site lets in and out, with its real handlers: its policy, its record, its words."""

import json
import re
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.config import RunConfig
from app.server.answer import Answer
from app.site.audit import REFUSED, SENT
from app.site.base_model import find
from app.site.gate import UNUSABLE, WITHHELD
from app.site.partition import SiteError
from app.site.policy import NONE, Policy
from app.wire.adapter import Layout, initial_adapter
from app.wire.codec import decode, encode
from tests.app.test_client_app import asked, message, node
from tests.full_disk import full_disk
from tests.samples import ROWS, run_config, write_jsonl


def order(
    models_dir: Path, config: RunConfig, kind: str = "train", upload: str = "7:1:0", **taken: str
) -> Message:
    """Round 1 of a run, from the initial adapter."""
    layout = Layout.of(find(models_dir, config.model_name, 0).linear_layers, config)
    start = initial_adapter(layout, config.seed)
    made = message(encode(config.down, start, start), layout.hash)
    made.content.config_records["job"] = ConfigRecord(
        {"round": 1, "layout": layout.hash, "upload": upload, **taken}
    )
    made.metadata.message_type = kind
    return made


def answered(models_dir: Path, config: RunConfig, **given: str) -> Message:
    reply = node(config)(order(models_dir, config, **given))
    assert isinstance(reply, Message)
    return reply


def audited(site: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site / "state" / "audit.jsonl").read_text().splitlines()]


def rules(site: Path, text: str) -> str:
    """Put them in force; returns their hash."""
    (site / "policy.toml").write_text(text)
    return Policy.read(site).sha256


def change_of(reply: Message, config: RunConfig, start: Any) -> Any:
    payload = reply.content.array_records["adapter"]["payload"].numpy().tobytes()
    return decode(config.up, payload, start) - start


# Of these a run has two at most, or few would get as far as to send something.
CHANGES: list[dict[str, Any]] = [
    {"codec_up": "fp32"}, {"codec_up": "bf16"}, {"codec_up": "int8"}, {"error_feedback": False},
    {"clip_norm": 0.0}, {"clip_norm": 0.02}, {"clip_norm": 0.3}, {"strategy_name": "fedprox"},
    {"max_steps": -1, "batch_size": 1}, {"max_steps": -1, "batch_size": 4},
    {"max_steps": 1, "batch_size": 1}, {"max_steps": 1, "gradient_accumulation_steps": 2},
]  # fmt: skip
FITS: dict[str, Any] = {
    "codec_up": "int4", "clip_norm": 0.1, "strategy_name": "fedavg", "num_train_epochs": 1.0,
}  # fmt: skip


@settings(
    max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
@given(
    drawn=st.lists(st.sampled_from(CHANGES), max_size=2),
    taken=st.sampled_from([{}, {"taken": "1:1:0"}]),
)
def test_whatever_a_run_asks_what_is_sent_obeys_the_policy(
    site: Path,
    models_dir: Path,
    base: dict[str, Any],
    drawn: list[dict[str, Any]],
    taken: dict[str, str],
) -> None:
    """Also where the server names an earlier upload, whose rest is of an unclipped change."""
    rules(site, "")
    careless = run_config(**base | {"codec_up": "int4", "lr_max": 1.0})
    answered(models_dir, careless, upload="1:1:0")
    rules(
        site,
        'strategies = ["fedavg"]\ncodecs = ["bf16", "int8", "int4"]\nmax-clip-norm = 0.1\n'
        "min-rows = 3\nmax-rows-per-round = 8\nmax-steps-per-round = 4\n",
    )
    config = run_config(**reduce(or_, drawn, base | FITS))
    before = len(audited(site))
    try:
        reply, refusal = answered(models_dir, config, **taken), ""
    except SiteError as err:
        refusal = str(err)
    (line,) = audited(site)[before:]
    if refusal:
        assert refusal.startswith("policy.toml, line ")
        assert (line["outcome"], line["reason"]) == (REFUSED, refusal)
        assert line["bytes_sent"] == line["rows"] == line["steps"] == 0
        return
    metrics = reply.content.metric_records["metrics"]
    used = min(8, int(metrics["steps"]) * config.rows_per_step)  # type: ignore[arg-type]
    assert (config.strategy_name, metrics["num-examples"]) == ("fedavg", 8)
    assert 3 <= used <= 8
    assert metrics["steps"] <= 4  # type: ignore[operator]
    layout = Layout.of(find(models_dir, config.model_name, 0).linear_layers, config)
    start = initial_adapter(layout, config.seed)
    payload = reply.content.array_records["adapter"]["payload"].numpy()
    assert payload.nbytes < 4 * layout.size  # packed: none of the codecs that are allowed is fp32
    length = float(np.linalg.norm(change_of(reply, config, start)))
    assert length <= 0.1 * 1.1  # what int4 rounds it by
    assert line["change_norm"] == pytest.approx(length)
    assert (line["outcome"], line["rows"], line["steps"]) == (SENT, used, metrics["steps"])


def test_a_site_that_pauses_says_so_and_does_nothing(
    site: Path, models_dir: Path, base: dict[str, Any]
) -> None:
    rules(site, "error-lines = false\n")
    config = run_config(**base)
    (site / "state").mkdir()
    (site / "state" / "paused").touch()
    told = str(asked(config)["error"])
    assert re.fullmatch(r"the site has paused, since 20\d\d-\d\d-\d\d \d\d:\d\d UTC", told)
    for kind in ("train", "evaluate"):
        with pytest.raises(SiteError, match=told):
            answered(models_dir, config, kind=kind)
    assert [x["outcome"] for x in audited(site)] == [REFUSED] * 3
    (site / "state" / "paused").unlink()
    assert "error" not in asked(config)


def test_a_line_says_what_came_and_what_went(
    site: Path, models_dir: Path, base: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("APPS_SEEN", str(tmp_path / "apps-seen.json"))
    (tmp_path / "apps-seen.json").write_text(json.dumps({"6": "d" * 64, "7": "c" * 64}))
    sha256 = rules(site, "min-noise-multiplier = 0.5\n")
    config = run_config(**base, clip_norm=0.2, noise_multiplier=0.5)
    answered(models_dir, config)
    answered(models_dir, config, kind="evaluate")
    assert asked(config)["policy"] == sha256
    train, evaluate, query = audited(site)
    size = Layout.of(find(models_dir, config.model_name, 0).linear_layers, config).size
    for line in (train, evaluate, query):
        assert (line["run"], line["policy"], line["outcome"]) == ("7", sha256, SENT)
        assert (line["app"], line["reason"]) == ("c" * 64, None)
    assert [line["kind"] for line in (train, evaluate, query)] == ["train", "evaluate", "query"]
    assert [line["round"] for line in (train, evaluate, query)] == [1, 1, None]
    assert [line["rows"] for line in (train, evaluate, query)] == [8, 2, 0]
    assert [line["steps"] for line in (train, evaluate, query)] == [2, 0, 0]
    assert (train["clip_norm"], train["noise_multiplier"]) == (0.2, 0.5)
    assert train["change_norm"] == pytest.approx(0.1 * size**0.5, rel=0.2)
    assert 0 < train["bytes_sent"] - 4 * size < 1000
    assert 0 < train["bytes_received"] - 4 * size < 1000
    assert 0 < evaluate["bytes_sent"] < 500
    assert query["bytes_received"] == 0 < query["bytes_sent"]


def test_the_run_that_does_not_fit_is_refused_before_and_in_the_round(
    site: Path, models_dir: Path, base: dict[str, Any]
) -> None:
    rules(site, "# hospital\nmax-steps-per-round = 1\n")
    config = run_config(**base)
    told = "policy.toml, line 2: max-steps-per-round = 1; a round of this run has 2 here"
    answer = Answer.of(asked(config))
    assert (answer.partition_id, answer.error) == (0, told)
    with pytest.raises(SiteError) as caught:
        answered(models_dir, config)
    assert str(caught.value) == told
    assert [(x["kind"], x["outcome"]) for x in audited(site)] == [
        ("query", REFUSED), ("train", REFUSED),
    ]  # fmt: skip


def test_held_out_losses_that_may_not_be_told_are_not_offered_and_not_given(
    site: Path, models_dir: Path, base: dict[str, Any]
) -> None:
    config = run_config(**base)
    assert Answer.of(asked(config)).num_holdout == 2
    rules(site, "held-out-losses = false\n")
    answer = Answer.of(asked(config))
    assert (answer.num_examples, answer.num_holdout) == (8, 0)
    assert set(answer.rows["holdout"].values()) == {0}
    with pytest.raises(SiteError, match="line 1: held-out-losses = false; the run asks for them"):
        answered(models_dir, config, kind="evaluate")


def test_error_lines_stay_at_home_if_the_policy_says_so_but_rules_are_told(
    site: Path, models_dir: Path, base: dict[str, Any], site_log: pytest.LogCaptureFixture
) -> None:
    config = run_config(**base)
    text = (site / "data" / "train.jsonl").read_text()
    write_jsonl(site / "data" / "train.jsonl", [{"instruction": "", "input": "x", "output": []}])
    line = "data/train.jsonl, line 1: no text in column 'output'"
    assert line in str(asked(config)["error"])
    rules(site, "error-lines = false\nmin-rows = 2\n")
    assert asked(config)["error"] == WITHHELD
    with pytest.raises(SiteError) as caught:
        answered(models_dir, config)
    assert str(caught.value) == WITHHELD
    assert site_log.text.count(line) == 3
    assert [line in x["reason"] for x in audited(site)] == [True] * 3
    (site / "data" / "train.jsonl").write_text(text)
    small = run_config(**base | {"batch_size": 1, "max_steps": 1})
    assert str(asked(small)["error"]).startswith("policy.toml, line 2: min-rows = 2; ")


def test_a_policy_that_cannot_be_used_stops_everything_and_is_quoted_in_the_sites_log_alone(
    site: Path, models_dir: Path, base: dict[str, Any], site_log: pytest.LogCaptureFixture
) -> None:
    config = run_config(**base)
    (site / "policy.toml").write_text("max-steps = 3\n")
    assert asked(config)["error"] == UNUSABLE
    for kind in ("train", "evaluate"):
        with pytest.raises(SiteError) as caught:
            answered(models_dir, config, kind=kind)
        assert str(caught.value) == UNUSABLE
    assert site_log.text.count("policy.toml, line 1: unknown key max-steps; known: ") == 3
    assert [x["policy"] for x in audited(site)] == [None] * 3


def test_the_day_is_counted_in_the_record_itself(
    site: Path, models_dir: Path, base: dict[str, Any]
) -> None:
    config = run_config(**base)
    rules(site, "max-rounds-per-day = 1\nmax-messages-per-day = 3\n")
    assert "error" not in asked(config)
    answered(models_dir, config)
    with pytest.raises(SiteError, match="line 1: max-rounds-per-day = 1; 1 were trained today"):
        answered(models_dir, config)
    rules(site, "max-messages-per-day = 3\n")
    answered(models_dir, config)  # the refusal does not count
    assert asked(config)["error"] == (
        "policy.toml, line 1: max-messages-per-day = 3; 3 were answered today"
    )
    record = site / "state" / "audit.jsonl"
    yesterday = [x | {"time": "2026-01-01T00:00:00+00:00"} for x in audited(site)]
    record.write_text("".join(json.dumps(x) + "\n" for x in yesterday))
    assert "error" not in asked(config)


@pytest.mark.parametrize("kind", ["train", "evaluate", "query"])
def test_a_full_disk_stops_the_reply_not_the_record(
    site: Path, models_dir: Path, base: dict[str, Any], kind: str
) -> None:
    config = run_config(**base)
    asked(config)
    record = site / "state" / "audit.jsonl"
    record.write_text(record.read_text() * 5000)  # longer than all else that is written here
    size = record.stat().st_size
    told = "nothing leaves the site: state/audit.jsonl cannot be written: File too large"
    with full_disk(size):
        if kind == "query":
            facts = asked(config)
            assert facts["error"] == told
            assert "num-examples" not in facts
        else:
            with pytest.raises(SiteError) as caught:
                answered(models_dir, config, kind=kind)
            assert str(caught.value) == told
    assert record.stat().st_size == size
    assert audited(site)[-1]["policy"] == NONE


def test_no_line_of_the_record_holds_a_word_of_the_data(
    site: Path, models_dir: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(**base)

    def quoting(*_: Any) -> None:
        raise ValueError(f"cannot encode {ROWS[0]['input']}")

    monkeypatch.setattr("app.site.examples.encode_all", quoting)
    with pytest.raises(SiteError):
        answered(models_dir, config)
    (line,) = audited(site)
    assert (line["outcome"], line["reason"]) == ("failed", "ValueError (the site's log says where)")
