"""The demo's table of rounds."""

import json
from pathlib import Path
from typing import Any

from superlink.onehost.__main__ import table

LINE: dict[str, Any] = {
    "round": 1, "partitions": [2, 13], "train_loss": 3.7, "bytes_down": 2**20, "bytes_up": 2**20,
    "seconds": 71.4,
}  # fmt: skip
EVALUATED = {
    "eval_loss": 99.0, "eval_loss_before": 99.0, "eval_token_accuracy": 0.0,
    "eval_token_accuracy_before": 0.0, "eval_loss_median": 3.2, "eval_loss_median_before": 3.6,
    "eval_token_accuracy_median": 0.4, "eval_token_accuracy_median_before": 0.35,
    "eval_bytes_down": 2**19,
}  # fmt: skip


def rows(folder: Path, *lines: dict[str, Any]) -> list[list[str]]:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [row.split("  ") for row in table(folder).splitlines()]


def test_loss_and_accuracy_are_the_sites_medians_not_the_means(tmp_path: Path) -> None:
    _, row = rows(tmp_path, LINE | EVALUATED)
    shown = [cell.strip() for cell in row if cell]
    assert shown == [
        "1", "02 13", "3.7000", "3.6000 -> 3.2000", "0.3500 -> 0.4000", "2.50", "71",
    ]  # fmt: skip


def test_a_round_without_an_evaluation_or_without_one_before_it_has_its_line(
    tmp_path: Path,
) -> None:
    alone = {k: v for k, v in EVALUATED.items() if not k.endswith("_before")}
    _, first, second = rows(tmp_path, LINE, LINE | alone)
    assert [cell.strip() for cell in first if cell][3:5] == ["-", "-"]
    assert [cell.strip() for cell in second if cell][3:5] == ["3.2000", "0.4000"]
