"""The last lines of a site's log: what of them leaves with an error, and whose word that takes."""

import logging
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from flwr.app import Error, Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.server.strategy import RoundError
from app.server.untrusted import Reason
from app.site.gate import UNUSABLE, WITHHELD
from app.site.last_lines import LastLines, travels
from app.site.partition import SiteError
from app.site.policy import Policy, PolicyFileError
from app.wire.adapter import initial_adapter
from app.wire.failure import BEGINS, LINES
from tests.app.test_client_app import MARKER, NODE_ID, asked, node, strategy
from tests.app.test_gate import answered, audited, order
from tests.samples import ROWS, run_config, write_jsonl
from tests.stand_in_grid import StandInGrid

PROMPT = "data/train.jsonl: the instruction of all rows is no part of the questions"
COUNTS = "data/train.jsonl: 8 read, 0 empty, 0 repeated, 0 known, 0 too long, 0 cut, 8 used"


def quoting(*_: Any) -> None:
    raise ValueError(f"cannot compute on {ROWS[0]['input']} {MARKER}")


@pytest.fixture
def broken(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site at which a library fails late in every kind of work, and quotes a row in its error."""
    monkeypatch.setattr("app.site.training.train", quoting)
    monkeypatch.setattr("app.site.training.evaluate", quoting)
    monkeypatch.setattr("app.client_app._described", quoting)
    return site


def told(models_dir: Path, base: dict[str, Any], kind: str) -> str:
    """The whole text of the error that the site answers with."""
    config = run_config(**base)
    if kind == "query":
        return str(asked(config)["error"])
    with pytest.raises(SiteError) as caught:
        node(config)(order(models_dir, config, kind))
    return str(caught.value)


RULES = (
    "", "error-lines = true", "error-lines = false", "error-lines = 0", 'error-lines = "true"',
    "#error-lines = true", "error-lines = false\nerror-lines = true", "[error-lines]",
)  # fmt: skip
OTHERS = (
    "", "min-rows = 2", "min-rows = 1000", f"min-rows = {'9' * 5000}", "no-such-key = 1",
    "held-out-losses = false", 'strategies = ["fedprox"]', f"x = {'[' * 9999}", "max-rows",
)  # fmt: skip


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # fmt: skip
@given(
    texts=st.tuples(st.sampled_from(RULES), st.sampled_from(OTHERS)).flatmap(st.permutations),
    kind=st.sampled_from(["query", "train", "evaluate"]),
)
def test_whatever_a_policy_says_lines_travel_only_if_error_lines_allows_it(
    broken: Path, models_dir: Path, base: dict[str, Any], texts: list[str], kind: str
) -> None:
    (broken / "policy.toml").write_text("\n".join(texts))
    text = told(models_dir, base, kind)
    try:
        allowed = Policy.read(broken).error_lines
    except PolicyFileError:
        assert text == UNUSABLE
        return
    lines = Reason.of(text).lines
    if text.startswith("policy.toml, line "):
        assert lines == ()
    elif allowed:
        assert text.startswith(f"ValueError (the site's log says where){BEGINS}")
        assert lines[-1].startswith("ValueError in app.client_app line ")
    else:
        assert text == WITHHELD
    assert not [word for word in MARKER.split() if len(word) > 4 and word in text]


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_without_a_policy_they_travel_as_errors_do_and_the_record_is_as_before(
    broken: Path, models_dir: Path, base: dict[str, Any], kind: str
) -> None:
    reason = Reason.of(told(models_dir, base, kind))
    assert reason == "ValueError (the site's log says where)"
    *before, place = reason.lines
    assert place.startswith("ValueError in app.client_app line ")
    raised_at = quoting.__code__.co_firstlineno + 1
    assert place.endswith(f", {__name__} line {raised_at}")
    if kind == "query":
        assert before[1] == COUNTS
    if kind == "train":
        assert before[-1].startswith("round 1: 8 rows, loaded in ")
    (line,) = audited(broken)
    assert (line["outcome"], line["reason"]) == ("failed", str(reason))


def test_they_reach_the_operator_through_a_round_and_leave_its_reason_as_it_is(
    broken: Path, models_dir: Path, base: dict[str, Any], site_log: pytest.LogCaptureFixture
) -> None:
    config = run_config(**base, fraction_train=1.0)
    s = strategy(models_dir, config)
    assert isinstance(s.grid, StandInGrid)
    work = node(config)

    def as_flower(message: Message) -> Message:
        try:
            work(message)
        except SiteError as err:
            reason = str(type(err)) + ":<'" + str(err) + "'>"  # flwr.supernode.runtime
            return Message(Error(2, reason), reply_to=message)
        raise AssertionError

    s.grid.nodes[NODE_ID] = as_flower
    why = "<class 'app.site.partition.SiteError'>:<'ValueError (the site's log says where)'>"
    with pytest.raises(RoundError) as caught:
        s.train_round(1, initial_adapter(s.layout, config.seed))
    assert str(caught.value).endswith(f"(site-00: {why})")
    said = [r.getMessage() for r in site_log.records if r.getMessage().startswith("[round 1/")]
    at = next(n for n, text in enumerate(said) if f"without site-00: {why}" in text)
    begins = "[round 1/10]   last in the log of "
    first, second, third = (text.removeprefix(begins) for text in said[at + 1 :])
    assert first == f"site-00: {PROMPT}"
    assert second.startswith("site-00: round 1: 8 rows, loaded in ")
    assert third.startswith("site-00: ValueError in app.client_app line ")


def test_there_are_few_and_none_is_of_another_message_or_holds_a_loss(
    site: Path, models_dir: Path, base: dict[str, Any], site_log: pytest.LogCaptureFixture
) -> None:
    """Of a training that diverges: its steps, and where it was given up."""
    handlers = list(logging.getLogger("app").handlers)
    answered(models_dir, run_config(**base))
    diverging = base | {"lr_max": 1e38, "batch_size": 1, "max_steps": 12}
    reason = Reason.of(told(models_dir, diverging, "train"))
    assert reason == "FloatingPointError (the site's log says where)"
    assert reason.lines[:-1] == tuple(f"step {n} of 12" for n in range(4, 13))
    place = r"FloatingPointError in app\.client_app line \d+, app\.site\.training line \d+"
    assert re.fullmatch(place, reason.lines[-1])
    assert len(reason.lines) == LINES
    assert "step 12 of 12: loss nan" in site_log.text
    write_jsonl(site / "data" / "train.jsonl", [{"instruction": "", "input": "x", "output": []}])
    assert Reason.of(told(models_dir, base, "query")).lines == ()  # nothing was logged before it
    assert logging.getLogger("app").handlers == handlers


def test_rules_and_the_names_of_other_files_stay_in_the_sites_log(
    broken: Path, models_dir: Path, base: dict[str, Any], site_log: pytest.LogCaptureFixture
) -> None:
    (broken / "data" / "holdout.jsonl").rename(broken / "data" / f"holdout.{MARKER}.jsonl")
    (broken / "policy.toml").write_text("min-rows = 2\n")
    lines = Reason.of(told(models_dir, base, "query")).lines
    assert [line.partition(" in ")[0] for line in lines] == [PROMPT, COUNTS, "ValueError"]
    assert f"data/: holdout.{MARKER}.jsonl not read" in site_log.text
    assert "is in force: min-rows = 2" in site_log.text


def test_a_call_with_a_mistake_in_it_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with any handler of a log, which tells it and goes on."""
    logger = logging.getLogger("app.site.anything")
    monkeypatch.setattr(logging.getLogger("app"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("app"), "handlers", [])
    logging.getLogger("app").setLevel(logging.INFO)
    with LastLines() as last:
        logger.info("%d rows", "many", extra=travels())
        logger.info("%d rows", 3, extra=travels())
        logger.info("%d rows", 4)
    logger.info("%d rows", 5, extra=travels())
    assert list(last.kept) == ["3 rows"]


def test_a_place_whose_module_was_not_imported_has_no_name(
    broken: Path, models_dir: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = FunctionType(quoting.__code__, {"__name__": MARKER, "ROWS": ROWS, "MARKER": MARKER})
    monkeypatch.setattr("app.site.training.train", nowhere)
    line = Reason.of(told(models_dir, base, "train")).lines[-1]
    assert re.fullmatch(r"ValueError in app\.client_app line \d+, \? line \d+", line)
