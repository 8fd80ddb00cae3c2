"""requirements.lock holds what pyproject.toml asks for, all that this needs, and nothing else."""

import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.lock import LOCK, PROJECT, Entry, locked_here, read
from tests.samples import REPOSITORY

TEXT = LOCK.read_text(encoding="utf-8")
OLAHS_LOCK = REPOSITORY / "tests" / "hub" / "requirements.lock"
CURE = "make lock"


def pyproject() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return project


def asked_for(project: Mapping[str, Any]) -> list[Requirement]:
    """By pyproject.toml itself, in all extras."""
    base, extras = project["project"]["dependencies"], project["project"]["optional-dependencies"]
    return [Requirement(r) for listed in (base, *extras.values()) for r in listed]


@cache
def installed(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


@cache
def stated(name: str) -> list[Requirement]:
    """What this package says that it needs, anywhere; nothing if it is not installed."""
    return [Requirement(r) for r in requires(name) or []] if installed(name) else []


def needs(name: str, extras: set[str]) -> list[Requirement]:
    """What it says that it needs on this machine, with these extras."""
    return [
        r for r in stated(name)
        if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in {"", *extras})
    ]  # fmt: skip


def needed(requirements: list[Requirement], entries: list[Entry]) -> dict[str, set[str]]:
    """Everything that these need in the end, with the extras that are asked of it.

    By what each package says. Where that is not at hand the lock is believed, which has below each
    entry who asks for it: of packages that are not installed (ray, CUDA), for other machines, and
    of another build (a torch for the CPU needs no CUDA).
    """
    found: dict[str, set[str]] = {}
    todo = list(requirements)
    while todo:
        asked = todo.pop()
        name = canonicalize_name(asked.name)
        if name in found and asked.extras <= found[name]:
            continue
        found[name] = found.get(name, set()) | asked.extras
        unknown = "+" in (installed(name) or "+")
        todo += needs(name, found[name])
        todo += [
            Requirement(e.name) for e in entries if name in e.via and (unknown or not e.is_for_here)
        ]
    return found


def differences(project: Mapping[str, Any], text: str) -> list[str]:
    """A line for whatever lock and pyproject.toml do not agree on."""
    requirements, entries = asked_for(project), read(text)
    lines = []
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        versions = [e for e in entries if e.name == name]
        if not versions:
            lines.append(f"{requirement}: missing")
        lines += [
            f"{requirement}: {e.version} does not satisfy it"
            for e in versions
            if not e.satisfies(requirement.specifier)
        ]
    direct = {canonicalize_name(r.name) for r in requirements}
    lines += [
        f"{e.name}: asked for by pyproject.toml no more"
        for e in entries
        if PROJECT in e.via and e.name not in direct
    ]
    wanted = needed(requirements, entries)
    return lines + [f"{e.name}: nothing needs it" for e in entries if e.name not in wanted]


def test_the_lock_and_pyproject_agree() -> None:
    assert differences(pyproject(), TEXT) == [], CURE


def without(extra: str, name: str) -> Callable[[dict[str, Any]], None]:
    def change(project: dict[str, Any]) -> None:
        listed = project["project"]["optional-dependencies"][extra]
        listed[:] = [r for r in listed if Requirement(r).name != name]

    return change


def with_base(requirement: str) -> Callable[[dict[str, Any]], None]:
    return lambda project: project["project"]["dependencies"].append(requirement)


DISAGREE = (
    (with_base("numpy<2"), "numpy<2: 2.4.6 does not satisfy it"),
    (with_base("left-pad>=1"), "left-pad>=1: missing"),
    (without("node", "gguf"), "gguf: asked for by pyproject.toml no more"),
    (without("dev", "pytest-xdist"), "execnet: nothing needs it"),
    # Of an extra of another package, and not installed here.
    (without("bench", "flwr"), "ray: nothing needs it"),
    (without("bench", "flwr"), "rpds-py: nothing needs it"),
)


@pytest.mark.parametrize(("change", "said"), DISAGREE)
def test_a_pyproject_that_changed_alone_is_found(
    change: Callable[[dict[str, Any]], None], said: str
) -> None:
    project = pyproject()
    change(project)
    assert said in differences(project, TEXT)


@pytest.mark.parametrize(
    ("line", "via", "said"),
    [
        ("left-pad==1.0", "", "left-pad: nothing needs it"),
        ("left-pad==1.0", "    # via requests", "left-pad: nothing needs it"),
        ("left-pad==1.0", "    # via right-pad", "left-pad: nothing needs it"),
        ("left-pad==1.0", f"    # via {PROJECT}", "left-pad: nothing needs it"),
        ("left-pad==1.0 ; sys_platform == 'win32'", "", "left-pad: nothing needs it"),
    ],
)
def test_an_entry_that_nothing_needs_is_found(line: str, via: str, said: str) -> None:
    assert said in differences(pyproject(), f"{TEXT}\n{line}\n{via}\n")


@pytest.mark.parametrize(
    "line",
    [
        "torch==2.13.0+cpu", "numpy>=2", "numpy==2.*", "numpy", "numpy[dev]==2.4.6",
        "--find-links wheels", "numpy==2.4.6 --hash=sha256:0", "numpy @ file:///numpy.whl",
    ],
)  # fmt: skip
def test_nothing_but_exact_versions_of_any_build_is_read(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read(f"{line}\n")


def test_what_a_locked_package_needs_is_locked_in_a_version_that_it_takes() -> None:
    """Of the packages that are installed, as they say themselves."""
    entries = [e for e in read(TEXT) if e.is_for_here]
    locked = {e.name: e for e in entries}
    wrong = [
        f"{name} needs {r}"
        for name, extras in needed(asked_for(pyproject()), entries).items()
        for r in needs(name, extras)
        if (other := canonicalize_name(r.name)) != "pip"  # the venv's own: no lock changes it
        if other not in locked or not locked[other].satisfies(r.specifier)
    ]
    assert wrong == [], CURE


def test_these_tests_run_with_the_locked_versions() -> None:
    have = {name: (version, installed(name)) for name, version in locked_here().items()}
    other = {
        name: f"locked {locked}, installed {there}"
        for name, (locked, there) in have.items()
        if there and Version(there).public != locked
    }
    assert other == {}, "make install"
    assert have["torch"][1]
    assert have["pytest"][1]


def test_the_hub_of_the_tests_has_a_python_with_what_its_own_lock_says() -> None:
    entries = read(OLAHS_LOCK.read_text(encoding="utf-8"))
    (wanted,) = (Requirement(r) for r in pyproject()["dependency-groups"]["olah"])
    (olah,) = (e for e in entries if e.name == wanted.name)
    assert olah.satisfies(wanted.specifier), CURE
    assert [e.name for e in entries if not e.via] == []
    folders = [str(f) for f in (REPOSITORY / ".venv" / "olah").glob("lib/*/site-packages")]
    there = {canonicalize_name(d.name): d.version for d in distributions(path=folders)}
    assert {e.name: e.version for e in entries if e.is_for_here}.items() <= there.items(), (
        "make install"
    )


def test_what_builds_the_package_has_exact_versions_too() -> None:
    """pip builds in an environment of its own, which the lock does not reach."""
    builders = [Requirement(r) for r in pyproject()["build-system"]["requires"]]
    assert [str(r) for r in builders if not str(r.specifier).startswith("==")] == []
    assert "hatchling" in {r.name for r in builders}
