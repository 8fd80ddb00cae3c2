"""Runs in a results folder, as a ServerApp leaves them: one at work, one that is over."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from app.config import MIB
from tests.samples import flat_config

BEGAN = datetime(2026, 11, 30, 8, 0, tzinfo=UTC)
OTHER, NEWEST = "7", "18155706404137891248"
ADAPTER = 52 * MIB


def at(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def line(server_round: int, sites: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
    """Of metrics.jsonl, with what the page reads."""
    return {
        "round": server_round,
        "partitions": list(sites),
        "train_loss": 3.7 / server_round,
        "eval_loss_median": 3.6 / server_round,
        "eval_loss_median_before": 3.75,
        "shares": [0.25, 0.75],
        "alphas": [1.0661, 0.9934],
        "bytes_down": 2 * ADAPTER,
        "bytes_up": 2 * ADAPTER,
        "mb_sent": 208.0 * server_round,
    }


def facts(run_id: str, **more: Any) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "running",
        "started": at(0),
        "versions": {"flwr": "1.36.0"},
        "config": flat_config(),
        "bytes_sent": 416 * MIB,
        "resumed_from": [],
        "sites": {
            f"site-{n:02d}": {"num_examples": 1697 + n, "num_holdout": 64, "device": "NVIDIA H200"}
            for n in range(4)
        },
        "left_out": {"site-04": "no answer to the preflight"},
    } | more


def events() -> list[dict[str, Any]]:
    """Two rounds are complete; in the third one site has answered, one is late, one at work."""

    def told(seconds: float, kind: str, text: str, **fields: Any) -> dict[str, Any]:
        return {"time": at(seconds), "event": kind, "level": "info", "text": text, **fields}

    sites = ["site-01", "site-02", "site-03"]
    ready = facts("")["sites"]
    return [
        told(0, "start", "a run begins", rounds=10),
        told(1, "waiting", "[preflight] 3 of 20 SuperNodes online", online=3, needed=20),
        told(60, "ready", "4 sites ready", sites=ready, left_out={"site-04": "no answer"}),
        told(61, "training", "training", round=2, attempt=0, sites=sites),
        told(300, "round", "[round 2/10] train loss", round=2, left_s=2400.0),
        told(301, "training", "training", round=3, attempt=0, sites=sites),
        told(350, "arrived", "site-01", round=3, site="site-01", of="train", bytes=ADAPTER),
        told(360, "left-out", "x", round=3, site="site-03", of="train", why="no reply within 60 s"),
    ]


def write(folder: Path, run: object = None, rounds: object = (), told: object = ()) -> Path:
    """A run's folder with these files; a text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if run is not None:
        (folder / "run.json").write_text(run if isinstance(run, str) else json.dumps(run))
    for name, lines in (("metrics.jsonl", rounds), ("events.jsonl", told)):
        if not isinstance(lines, str):
            lines = "".join(json.dumps(one) + "\n" for one in lines)  # type: ignore[attr-defined]
        (folder / name).write_text(lines)
    return folder


def two_runs(results: Path) -> Path:
    """An older one that is over, and one at work."""
    over = facts(OTHER, status="completed", started=at(-9000), finished=at(-60))
    over["config"]["strategy.name"] = "fedavg"
    write(results / OTHER, over, [line(n) for n in range(1, 11)])
    write(results / NEWEST, facts(NEWEST), [line(1), line(2)], events())
    return results
