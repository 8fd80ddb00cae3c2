"""Who may import whom, read from the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.samples import REPOSITORY

OURS = ("app", "superlink", "supernode", "eval")
# Folder or file -> what it may import of ours; the longest that fits is a file's own. A site's
# code runs at the site, the server's beside the SuperLink: neither has the other's.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "app/": (),
    "app/config.py": ("app.allowed",),
    "app/wire/": ("app.wire", "app.config"),
    "app/server/": ("app.server", "app.wire", "app.config"),
    "app/server_app.py": ("app.server", "app.wire", "app.config"),
    "app/site/": ("app.site", "app.wire", "app.config"),
    "app/client_app.py": ("app.site", "app.wire", "app.config"),
    "app/plan.py": ("app.site", "app.wire", "app.config"),
    "superlink/": ("superlink", "app.config", "supernode.fab", "supernode.reach"),
    # Server and sites in one process: on one host, in no image's program.
    "superlink/onehost/rounds.py": ("superlink.onehost", "app", "supernode"),
    "superlink/onehost/deployed.py": ("superlink", "app.config", "app.server", "app.site"),
    "superlink/onehost/compare.py": (
        "superlink", "app.config", "app.server", "app.site", "app.wire", "supernode",
    ),
    "superlink/onehost/comparison.py": ("eval.charts",),
    "superlink/page/": (
        "superlink.page", "superlink.run_files", "app.config", "eval.charts", "eval.summary",
    ),
    "supernode/": ("supernode",),
    "supernode/partitions.py": ("supernode", "app.site.rows", "app.site.row_files"),
    "supernode/data_source.py": ("supernode", "app.site.rows", "app.site.row_files"),
    "supernode/pinned.py": ("supernode", "app.site.audit"),
    "eval/": (
        "eval", "app.config", "app.server.best", "app.server.checkpoint", "app.site.base_model",
        "app.site.chat", "app.site.partition.SiteError", "app.site.prompts", "app.site.row_files",
        "app.site.verified", "app.wire.adapter.PROMPT", "supernode.hub", "supernode.source",
    ),
}  # fmt: skip
# A whole federation on one host is made of the rest of superlink/, which does not know of it.
ONE_HOST = "superlink.onehost"
HEAVY = {"torch", "transformers", "peft"}
HEAVY_FILES = {
    "app/site/base_model.py", "app/site/chat.py", "app/site/examples.py", "app/site/gpu_check.py",
    "app/site/packing.py", "app/site/training.py", "supernode/download.py",
    "supernode/quantise.py", "supernode/source.py", "supernode/trial.py",
}  # fmt: skip
# An import costs seconds in every process: in these only where it is used.
LAZY_FILES = {
    "app/site/base_model.py", "app/site/chat.py", "app/site/examples.py", "app/site/gpu_check.py",
    "supernode/download.py", "supernode/quantise.py", "supernode/source.py", "supernode/trial.py",
    "eval/__main__.py",
}  # fmt: skip
SOURCES = sorted(
    p.relative_to(REPOSITORY).as_posix()
    for package in OURS
    for p in (REPOSITORY / package).rglob("*.py")
)


def parsed(file: str) -> ast.Module:
    return ast.parse((REPOSITORY / file).read_text(encoding="utf-8"), file)


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement under ``tree`` and the dotted name it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node, name.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports from the root"
            for name in node.names:
                yield node, f"{node.module}.{name.name}"


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def lazy_imports(tree: ast.AST) -> set[ast.stmt]:
    """The import statements inside functions, or for the type checker only."""
    places = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return {statement for place in places for statement, _ in imports(place)}


def test_there_is_something_to_check() -> None:
    assert {Path(s).parts[0] for s in SOURCES} == set(OURS)
    assert set(SOURCES) >= HEAVY_FILES | LAZY_FILES
    assert {f for f in HEAVY_FILES if f.startswith("app/")} == {
        f for f in HEAVY_FILES if f.startswith("app/site/")
    }
    assert {p for p in MAY_IMPORT if not any(s.startswith(p) for s in SOURCES)} == set()


@pytest.mark.parametrize("file", SOURCES)
def test_each_room_imports_only_what_it_may(file: str) -> None:
    allowed = MAY_IMPORT[max((p for p in MAY_IMPORT if file.startswith(p)), key=len)]
    here = file.startswith("superlink/onehost/")
    wrong = [
        f"{file}:{statement.lineno} imports {name}"
        for statement, name in imports(parsed(file))
        if (within(name, (*OURS, "tests")) and not within(name, allowed))
        or (within(name, (ONE_HOST,)) and not here)
    ]
    assert not wrong


def test_what_travels_needs_numpy_and_safetensors_only() -> None:
    """dp-accounting reckons for ``app.plan``, where it is installed."""
    wire = [f for f in SOURCES if f.startswith("app/wire/")]
    needed = {name.split(".")[0] for f in wire for _, name in imports(parsed(f))}
    needed -= {"app", *sys.stdlib_module_names}
    assert needed == {"numpy", "safetensors", "dp_accounting"}


@pytest.mark.parametrize("file", SOURCES)
def test_torch_is_imported_only_where_a_model_is_computed(file: str) -> None:
    tree = parsed(file)
    lazy = lazy_imports(tree)
    heavy = [(s, name) for s, name in imports(tree) if name.split(".")[0] in HEAVY]
    if file not in HEAVY_FILES and not file.startswith("eval/"):
        assert not [f"{file}:{s.lineno} imports {name}" for s, name in heavy]
    elif file in LAZY_FILES:
        assert not [f"{file}:{s.lineno} imports {name}" for s, name in heavy if s not in lazy]


def test_docker_is_a_folder_of_files_not_a_package() -> None:
    # A docker/__init__.py, or a module, would hide the Docker SDK.
    assert not list((REPOSITORY / "docker").rglob("*.py"))


@pytest.mark.parametrize(
    "module", ["app.server_app", "app.client_app", "app.server.preflight", "app.plan"]
)
def test_neither_server_nor_preflight_nor_plan_pays_for_torch(module: str) -> None:
    code = (
        f"import sys, {module}; heavy = {sorted(HEAVY)!r} + ['datasets', 'bitsandbytes']; "
        "print(*[m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_git_ignores_no_source_file_or_test() -> None:
    """An ignore pattern for results at the top must not hide a folder of tests."""
    sources = [
        str(p)
        for f in ("app", "superlink", "supernode", "eval", "tests")
        for p in (REPOSITORY / f).rglob("*.py")
    ]
    done = subprocess.run(
        ["git", "check-ignore", *sources], cwd=REPOSITORY, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout == ""
