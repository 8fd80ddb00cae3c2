"""The container suite needs a Docker engine with compose v2; elsewhere it is skipped.

REQUIRE_DOCKER=1 (as in .ci/run) makes a missing engine a failure instead.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def compose(
    *arguments: str, files: Sequence[str] = ("compose.yaml",), project: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``docker compose`` in the repository; never raises."""
    command = ["docker", "compose", *(["-p", project] if project else [])]
    for file in files:
        command += ["-f", file]
    return subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, env={**os.environ, **env}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [i for i in items if Path(__file__).parent in Path(i.path).parents]
    for item in here:
        item.add_marker(pytest.mark.docker)
    if here and not os.environ.get("REQUIRE_DOCKER"):
        try:
            reason = subprocess.run(
                ["docker", "version"], capture_output=True, text=True, check=False
            )
            missing = reason.stderr.strip() if reason.returncode else ""
        except OSError as err:
            missing = str(err)
        if missing:
            for item in here:
                item.add_marker(pytest.mark.skip(reason=f"no Docker engine: {missing[:120]}"))
