"""What ``compare --deployment`` takes from a run's metrics.jsonl."""

from typing import Any

import pytest

from app.config import MIB
from app.server.strategy import RoundError
from superlink.onehost.deployed import recorded


def lines() -> list[dict[str, Any]]:
    """Three rounds: 2 MiB down and 1 up in each, and what a score costs beside."""
    return [
        {
            "round": n, "partitions": [0, n], "bytes_down": 2 * MIB, "bytes_up": MIB,
            "seconds": 1.5, "rejected": {"site-02": "late"} if n == 2 else {},
            "eval_loss": 3.0 - n / 8, "eval_loss_median": 9.0, "eval_token_accuracy": n / 8,
            "eval_token_accuracy_median": 0.9, "eval_rejected": {}, "eval_bytes_down": 7 * MIB,
            "eval_seconds": 70.0, "eval_loss_before": 3.125 - n / 8,
        }
        for n in (1, 2, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("every_round", "curve"),
    [
        (True, [[0.0, 3.0], [3.0, 2.875], [6.0, 2.75], [9.0, 2.625]]),
        (False, [[0.0, 3.0], [9.0, 2.625]]),
    ],
)
def test_a_runs_lines_are_a_record_as_of_one_process(
    every_round: bool, curve: list[list[float]]
) -> None:
    """The means of all tokens, and the training's adapters and seconds without the scores'."""
    assert recorded(lines(), 3, every_round) == {
        "loss": 2.625,
        "accuracy": 0.375,
        "mib": 9.0,
        "seconds": 4.5,
        "sites": [[0, 1], [0, 2], [0, 3]],
        "rejected": 1,
        "curve": curve,
    }


def test_what_not_every_site_has_scored_is_no_result() -> None:
    found = lines()
    found[1]["eval_rejected"] = {"site-01": "late"}
    with pytest.raises(RoundError, match=r"after round 2 not every site gives a score: .*site-01"):
        recorded(found, 3, every_round=False)
    found = lines()
    del found[2]["eval_loss"], found[2]["eval_rejected"]
    with pytest.raises(RoundError, match=r"after round 3 not every site .*: no held-out loss"):
        recorded(found, 3, every_round=True)
    found = lines()
    del found[0]["eval_loss_before"]
    with pytest.raises(RoundError, match="after round 0 not every site gives a score"):
        recorded(found, 3, every_round=True)


def test_a_round_that_cannot_be_read_is_no_result() -> None:
    with pytest.raises(RoundError, match=r"its metrics.jsonl has 2 of 3 rounds"):
        recorded(lines()[:2], 3, every_round=True)
