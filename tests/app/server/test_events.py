"""What a run tells while it goes on: each line whole, each kind with the fields promised."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import Error, Message

from app.server import events
from app.server.events import EventFile, event
from app.wire.adapter import initial_adapter
from app.wire.failure import joined
from tests.app.server.stand_in_sites import ALL, node, strategy
from tests.full_disk import full_disk


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """What the loggers of app say goes to this file, as in a run."""
    logger, path = logging.getLogger("app"), tmp_path / "events.jsonl"
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [EventFile(path)], False
    logger.setLevel(logging.DEBUG)
    yield path
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_a_line_of_the_log_is_an_event_and_one_that_is_told_has_its_fields(written: Path) -> None:
    logging.getLogger("app.server.anything").warning("two\nlines: %s", "ä")
    logging.getLogger("app").info("x", extra=event("start", rounds=3))
    first, second = lines(written)
    assert (first["event"], first["level"], first["text"]) == ("log", "warning", "two\nlines: ä")
    assert (second["event"], second["rounds"]) == ("start", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", str(first["time"]))


def test_what_a_full_disk_cuts_off_spoils_no_other_line(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("app")
    logger.info("first")
    with full_disk(written.stat().st_size + 20):
        logger.info("second")  # no error: the run goes on
        logger.info("third")
    logger.info("fourth")
    texts = []
    for line in written.read_text().splitlines():
        try:
            texts.append(json.loads(line)["text"])
        except ValueError:
            texts.append("torn")
    assert texts == ["first", "torn", "fourth"]


def promised() -> dict[str, str]:
    """By kind what it says of the fields, in the module's own table."""
    found: dict[str, str] = {}
    kind = ""
    for left, right in re.findall(r"^\| ([\w-]*) +\| (.*?) +\|$", events.__doc__ or "", re.M):
        kind = left or kind
        found[kind] = found.get(kind, "") + " " + right
    return found


def test_a_round_tells_who_trains_who_has_answered_and_who_was_left_out(written: Path) -> None:
    s = strategy(
        [0, 1, 2],
        {0: node(0), 1: node(1), 2: lambda m: None},
        **ALL,
        max_retries=0,
        fraction_evaluate=1.0,
    )
    adapter = initial_adapter(s.layout, 1)
    s.train_round(1, adapter)
    s.evaluate(1, adapter)
    told = lines(written)
    table = promised()
    for line in told:
        fields = line.keys() - {"time", "event", "level", "text"}
        words = set(re.findall(r"[a-z_]+", table[str(line["event"])]))
        assert fields <= words, line
    of_training = [
        line for line in told if line.get("of") == "train" or line["event"] == "training"
    ]
    assert [line["event"] for line in of_training] == ["training", "arrived", "arrived", "left-out"]
    assert of_training[0]["sites"] == ["site-00", "site-01", "site-02"]
    assert {str(line["site"]): line.get("bytes") for line in of_training[1:3]} == {
        "site-00": 4 * s.layout.size, "site-01": 4 * s.layout.size
    }  # fmt: skip
    late = of_training[3]
    assert (late["site"], str(late["why"])[:15]) == ("site-02", "no reply within")
    assert "evaluating" in [line["event"] for line in told]


def test_a_failing_sites_last_lines_stand_below_why_it_was_left_out(written: Path) -> None:
    text = joined("no\x07room", [f"step {n} of 12\x1b[31m" for n in range(1, 13)])

    def failing(message: Message) -> Message:
        return Message(Error(2, f"<class 'SiteError'>:<'{text}'>"), reply_to=message)

    s = strategy([0, 1], {0: node(0), 1: failing}, **ALL, fraction_evaluate=1.0)
    _, line = s.train_round(1, initial_adapter(s.layout, 1))
    assert line["rejected"] == {"site-01": "<class 'SiteError'>:<'no room'>"}
    told = lines(written)
    at = [line["event"] for line in told].index("left-out")
    assert told[at]["why"] == "<class 'SiteError'>:<'no room'>"
    below = told[at + 1 : at + 11]
    assert [line["text"] for line in below] == [
        f"[round 1/10]   last in the log of site-01: step {n} of 12 [31m" for n in range(1, 11)
    ]
    assert {line["event"] for line in below} == {"log"}
    assert "log of site-01" not in str(told[at + 11 :])
