"""What the app's own check says of a GPU and of its memory, where there is one."""

from pathlib import Path
from typing import Any

import pytest

from app.site import check, device, memory
from app.site.device import Gpu
from tests.samples import run_config

# The other rows are asked by tests/supernode/test_check.py, as processes.


@pytest.mark.parametrize(("spare", "status"), [(0, "ok"), (-1, "error")])
def test_memory_is_held_against_what_the_recipe_needs(
    models_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    spare: int, status: str,
) -> None:  # fmt: skip
    config = run_config(model_name=str(tiny_model), quantization=4)
    site = check.Site(tmp_path, models_dir, config)
    check.base_model(site)
    assert site.base is not None
    weights = memory.stored(site.base.folder, 4, bf16=True)
    free = memory.needed(weights, site.base.linear_layers, config) + spare
    seen: list[Any] = []
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")

    def look(state: Path) -> Gpu:
        seen.append(state)
        return Gpu("NVIDIA H100", True, free * 2, free)

    monkeypatch.setattr(device, "look", look)
    rows = {row["row"]: row for row in check.asked(site)}
    assert seen == [tmp_path / "state"]
    assert rows["device"]["what"].startswith("GPU 2: torch computes on it: NVIDIA H100, ")
    assert rows["memory"]["status"] == status
    said = "GB needed (computed)" if status == "ok" else "trains the same"
    assert said in rows["memory"]["what"]


def test_a_librarys_words_are_not_passed_on(
    models_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = "Miller"

    def fails(site: check.Site) -> str:
        raise ValueError(f"Mrs {name} of ward 7")

    monkeypatch.setitem(check.ROWS, "rows", fails)
    site = check.Site(tmp_path, models_dir, run_config(model_name=str(tiny_model), quantization=4))
    rows = {row["row"]: row for row in check.asked(site)}
    assert rows["rows"]["what"] == "ValueError in this check, at the lines above"
    assert name not in str(rows) + "".join(capsys.readouterr())
