"""The FAB of a folder is Flower's own, whatever else lies in the folder."""

import io
import shutil
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from supernode import fab
from tests.samples import REPOSITORY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With all that lies about where somebody works."""
    folder = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "app", folder / "app")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    (folder / ".gitignore").write_text("/app/mine.py\n/results/\n")
    for name in (
        ".venv/lib/app/x.py", ".git/app/x.py", ".flwr/app/x.py", "app/__pycache__/x.py",
        "__pycache__/app/x.py", "app/mine.py", "app/theirs.py", "results/app/x.py", "x.py",
        "app/.hidden/x.py", "app/.venv/x.py",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    (folder / "app" / "a_link.py").symlink_to(folder / "x.py")
    (folder / "a_link").symlink_to(folder / "app")
    return folder


@pytest.mark.parametrize("all_of_it", [False, True], ids=["as ours", "without fab-include"])
def test_it_is_what_flower_makes_of_it(checkout: Path, all_of_it: bool) -> None:
    if all_of_it:
        settings = (checkout / "pyproject.toml").read_text()
        line = 'fab-include = ["app/**/*.py"]'
        assert line in settings
        (checkout / "pyproject.toml").write_text(settings.replace(line, ""))
    shutil.rmtree(checkout / ".git")
    expected = build_fab_from_disk(checkout)
    names = set(zipfile.ZipFile(io.BytesIO(expected)).namelist())
    assert {"app/theirs.py", "app/.hidden/x.py"} <= names
    assert ("x.py" in names) == all_of_it
    assert fab.build(checkout) == expected


def test_gits_own_folder_and_links_change_nothing(checkout: Path) -> None:
    assert fab.build(checkout) == build_fab_from_disk(checkout)


def test_unpacked_it_is_the_same_app(checkout: Path, tmp_path: Path) -> None:
    made = fab.build(checkout)
    zipfile.ZipFile(io.BytesIO(made)).extractall(tmp_path / "alone")
    assert build_fab_from_disk(tmp_path / "alone") == made


def test_a_folder_without_an_app_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pyproject\.toml not found"):
        fab.build(tmp_path)
