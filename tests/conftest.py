"""Fixtures shared by all folders. Nothing here or in a test reaches for the network."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair, not a finding. (With CI set, as .ci/run does,
# Hypothesis draws the same examples each time: new ones are looked for at a desk.)
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
# A shell ignores Ctrl-C for what it starts in the background, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
_CACHE = tempfile.mkdtemp(prefix="fedllm-tests-")
os.environ |= {  # before any test imports a Hugging Face library
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": _CACHE,
    "HF_MODULES_CACHE": _CACHE,
    "TOKENIZERS_PARALLELISM": "false",
    "FLWR_TELEMETRY_ENABLED": "0",
    # Faster for tiny tensors, whatever else the machine does.
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    # On the CPU, unless somebody names a GPU (as a test with the marker gpu needs).
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
}

# Only now: both look at the environment when imported.
from supernode.quantise import prepare_model  # noqa: E402
from tests.tiny_model import build_tiny_model  # noqa: E402

# A file stays with one worker. What takes longest comes first, or one would end up at it alone.
_LONGEST = [
    f"federation/test_{name}.py"
    for name in (
        "resume", "warm", "drill", "codecs", "nodes", "time", "compare", "guards", "claims", "door",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[bool, int]:
        name = "/".join(item.path.parts[-2:])
        known = _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)
        return "federation" not in item.path.parts, known

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()  # or each training's collection would walk through all that was imported: 0.4 s


@pytest.fixture(scope="session", autouse=True)
def _remove_the_cache() -> Iterator[None]:
    yield
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny base model as a hub would hold it; not to be changed."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    build_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def models_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model prepared as none, nf4 and int8; not to be changed."""
    models = tmp_path_factory.mktemp("models")
    for kind in ("none", "nf4", "int8"):
        prepare_model(models, models / "unused-cache", str(tiny_model), kind, None)
    return models
