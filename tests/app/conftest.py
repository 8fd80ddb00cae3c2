"""Nobody waits for a site that keeps silent; and a site for tests of its side."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.server import exchange, preflight
from supernode.verify import verify
from tests.samples import ROWS, write_jsonl
from tests.stand_in_grid import Clock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(exchange, "time", made)
    monkeypatch.setattr(preflight, "time", made)
    return made


@pytest.fixture
def site(tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SuperNode's environment around this folder."""
    folder = tmp_path / "site"
    for part, rows in (("train", ROWS[:8]), ("holdout", ROWS[8:10])):
        write_jsonl(folder / "data" / f"{part}.jsonl", rows)
    for name, value in (
        ("SITE_DIR", folder),
        ("MODELS_DIR", models_dir),
        ("MODELS_VERIFIED", tmp_path / "verified.json"),
        ("DEVICE", "cpu"),
        ("LOCK_DIR", tmp_path),
    ):
        monkeypatch.setenv(name, str(value))
    verify(models_dir, tmp_path / "verified.json", {})
    return folder


@pytest.fixture
def base(tiny_model: Path) -> dict[str, Any]:
    return {
        "model_name": str(tiny_model), "quantization": 0, "lora_r": 4, "lora_alpha": 8,
        "batch_size": 4, "max_steps": 2, "gradient_checkpointing": False, "lr_max": 0.01,
        "min_nodes": 1, "min_train_nodes": 1, "min_replies": 1, "max_retries": 0,
        "fraction_evaluate": 1.0,
    }  # fmt: skip


@pytest.fixture
def site_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("app").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("app").removeHandler(caplog.handler)
