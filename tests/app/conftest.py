"""Nobody waits for a site that keeps silent."""

import pytest

from app.server import exchange, preflight
from tests.stand_in_grid import Clock


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(exchange, "time", made)
    monkeypatch.setattr(preflight, "time", made)
    return made
