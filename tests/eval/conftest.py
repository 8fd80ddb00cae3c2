"""What the tests of taking an adapter home share."""

import json
import shutil
from pathlib import Path

import pytest

from tests.eval.taken_home import HUB_ID, Home, train


@pytest.fixture(scope="session")
def home(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    models = Path(shutil.copytree(models_dir, folder / "models"))
    results = {}
    for path in models.glob("*/base.json"):
        base = json.loads(path.read_text()) | {"name": HUB_ID}
        path.write_text(json.dumps(base))
        results[base["kind"]] = folder / base["kind"]
        train(results[base["kind"]], base)
    return Home(models, results)
