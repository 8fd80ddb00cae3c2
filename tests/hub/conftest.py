"""A real hub, once a session, with a model and data sets; the commands that users type."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supernode.download import DATA, MODEL
from tests.hub.server import Front, olah, repository
from tests.samples import REPOSITORY

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What olah serves: tests add repositories of other names."""
    folder = tmp_path_factory.mktemp("olah")
    repository(folder, "models", MODEL, {p.name: p.read_bytes() for p in tiny_model.iterdir()})
    rows = [{"instruction": "Answer", "input": f"Q {n}?", "output": f"A {n}"} for n in range(40)]
    cards = {"medical_meadow_wikidoc_medical_flashcards.json": json.dumps(rows).encode()}
    repository(folder, "datasets", DATA, cards | {"README.md": b"---\nlicense: mit\n---\nCards.\n"})
    return folder


@pytest.fixture(scope="session")
def mirror(served: Path) -> Iterator[str]:
    """Address of olah itself."""
    with olah(served) as address:
        yield address


@pytest.fixture
def front(mirror: str) -> Iterator[Front]:
    """Passes all on to olah, unless the test has it do something else."""
    with Front(mirror) as server:
        yield server
        server.shutdown()


def environment(folder: Path, hub: str, **settings: str) -> dict[str, str]:
    """Of a command that may ask this hub, and has its folders in ``folder``."""
    env = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy")}
    names = {"MODEL_CACHE": "cache", "MODELS_DIR": "models", "FEDERATION_DIR": "federation"}
    env |= {variable: str(folder / name) for variable, name in names.items()}
    return env | {"HF_HOME": str(folder), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"} | settings


@pytest.fixture
def run(tmp_path: Path) -> Command:
    """Run ``python -m`` with these arguments: first the hub, settings as keywords."""

    def command(hub: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=REPOSITORY, check=False, text=True,
            capture_output=True, env=environment(tmp_path, hub, **settings),
        )  # fmt: skip

    return command
