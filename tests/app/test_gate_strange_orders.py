"""Messages that no server of ours sends: each meets the gate, and has its line in the record."""

import math
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from app import client_app
from app.config import RunConfig
from app.site.audit import FAILED, OTHER, REFUSED
from app.site.gate import WITHHELD
from app.site.partition import SiteError
from tests.app.test_client_app import NODE_ID
from tests.app.test_gate import audited, order
from tests.samples import run_config


def given(config: RunConfig, message: Message) -> Message:
    """To the ClientApp itself, as Flower does it."""
    flat = cast(dict[str, Any], config.flat())
    of_node: dict[str, Any] = {"partition-id": 0, "num-partitions": 1}
    return client_app.app(message, Context(7, NODE_ID, of_node, RecordDict(), flat))


@pytest.mark.parametrize("kind", ["train.other", "train.default", "query.x", "system"])
def test_a_message_of_another_type_is_refused_in_our_words(
    site: Path, base: dict[str, Any], kind: str
) -> None:
    with pytest.raises(SiteError, match="answers messages of the types query, train, evaluate"):
        given(run_config(**base), Message(RecordDict(), dst_node_id=1, message_type=kind))
    (line,) = audited(site)
    assert (line["kind"], line["outcome"]) == (OTHER, REFUSED)
    (site / "state" / "paused").touch()
    with pytest.raises(SiteError, match="the site has paused"):
        given(run_config(**base), Message(RecordDict(), dst_node_id=1, message_type=kind))


@pytest.mark.parametrize("kind", ["train.default", "evaluate.default"])
def test_a_type_that_flower_takes_for_another_is_not_answered_past_the_counts(
    site: Path, models_dir: Path, base: dict[str, Any], kind: str
) -> None:
    config = run_config(**base)
    with pytest.raises(SiteError, match="answers messages of the types"):
        given(config, order(models_dir, config, kind=kind))


@pytest.mark.parametrize("stated", ["7" * 5_000_000, math.nan, b"\xff", True, [1, 2]])
def test_a_round_that_is_no_number_is_not_recorded_and_costs_no_line(
    site: Path, models_dir: Path, base: dict[str, Any], stated: Any
) -> None:
    config = run_config(**base)
    strange = order(models_dir, config, kind="evaluate")
    job = strange.content.config_records["job"]
    strange.content.config_records["job"] = ConfigRecord(dict(job) | {"round": stated})
    given(config, strange)
    (line,) = audited(site)
    assert line["round"] is None
    assert (site / "state" / "audit.jsonl").stat().st_size < 2000


def test_a_message_without_content_has_its_line_and_hears_nothing(
    site: Path, base: dict[str, Any]
) -> None:
    """It is given up before the policy has been read: that may forbid it."""
    question = Message(RecordDict(), dst_node_id=1, message_type="train")
    empty = Message(Error(0, "x"), reply_to=question)
    with pytest.raises(SiteError) as caught:
        given(run_config(**base), empty)
    assert str(caught.value) == WITHHELD
    assert [line["outcome"] for line in audited(site)] == [FAILED]
