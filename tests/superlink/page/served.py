"""The page's own process, and how it looks on a phone and on a desk."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from superlink.onehost.processes import free_port
from tests.browser import MISPLACED, Browser
from tests.samples import REPOSITORY

WIDTHS = (390, 1280)


@contextmanager
def page_of(results: Path) -> Iterator[str]:
    """The page's program, as compose starts it; gives its address."""
    port = str(free_port())
    env = {**os.environ, "RESULTS_DIR": str(results), "PAGE_PORT": port}
    command = [sys.executable, "-m", "superlink.page"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True
    ) as served:
        try:
            assert served.stdout
            assert f"localhost:{port}" in served.stdout.readline()  # it listens before it says so
            yield f"http://localhost:{port}"
        finally:
            served.terminate()


def right_at_both_widths(browser: Browser) -> None:
    for width in WIDTHS:
        browser.width(width)
        assert browser.value(MISPLACED) == [], width
