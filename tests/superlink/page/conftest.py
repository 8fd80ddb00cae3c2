"""Two runs in a results folder, and the page of them."""

from pathlib import Path

import pytest

from tests.superlink.page.asking import Page
from tests.superlink.page.made_runs import two_runs


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return two_runs(tmp_path / "results")


@pytest.fixture
def page(results: Path) -> Page:
    return Page(results)
