"""What a page names must be there: each check gives a line for whatever is not.

Code (between backticks, in fenced blocks) is checked, prose is not, but for its links.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import yaml

from app.config import STRATEGIES, ConfigError, merged_config
from app.site.policy import Policy
from eval.benchmarks import BENCHMARKS
from superlink.onehost.compare import KEYS
from tests.docs.pages import Page
from tests.docs.settings import (
    CODE,
    PROGRAMS,
    compose_variables,
    program_rows,
    sources,
    variables_in,
)
from tests.samples import REPOSITORY, flat_config

ROOMS = (*CODE, "tests")
KINDS = "py|md|toml|yaml|jsonl|json|html|crt|key|env|sha256|safetensors|svg|png"
# A person's own files and hosts, in examples.
EXAMPLES = {"rows.jsonl", "generation_medqa_fl.jsonl", "superlink.example"}
EXAMPLES |= {"codecs.toml", "codecs.jsonl", "codecs.md", "codecs.svg"}
# Variables of others: OpenMP's, the hub client's.
OTHERS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE"}
# Words with hyphens that are no run-config keys.
HYPHENATED = {"fedllm-medical", "nelder-mead", "nf4-bf16", "flower-superlink"}
HYPHENATED |= {f.metadata["key"] for f in fields(Policy) if f.metadata} | {*KEYS}
OTHER_PROGRAMS = {"pytest", "ruff", "mypy", "venv"}  # of python -m
IN_TABLE = re.compile(r"`([A-Z_]+)`").findall


@cache
def services(file: str = "compose.yaml") -> set[str]:
    return set(yaml.safe_load((REPOSITORY / file).read_text())["services"])


def all_services() -> set[str]:
    """Of this host's federation, and of a site's kit."""
    return services() | services("superlink/kit/compose.yaml")


@cache
def volumes() -> set[str]:
    return set(yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["volumes"])


@cache
def variables() -> set[str]:
    """Of the programs, of compose, and make's."""
    read = {name for _, tree in sources() for name, _ in variables_in(tree)}
    told = {name for file in PROGRAMS for row in program_rows(file) for name in IN_TABLE(row)}
    makes = re.findall(r"^(\w+)\s*[?:]?=|\$\((\w+)\)", (REPOSITORY / "Makefile").read_text(), re.M)
    ours = {name for pair in makes for name in pair} | set(compose_variables())
    return read | told | ours | OTHERS


@cache
def names_of_files() -> set[str]:
    """Of the checkout, and of what the programs write: these stand in their code."""
    rooms = (*ROOMS, "docker", "docs", ".ci")
    there = {p.name for room in rooms for p in (REPOSITORY / room).rglob("*")}
    there |= {p.name for p in REPOSITORY.iterdir()}
    written = {
        name
        for room in CODE
        for path in (REPOSITORY / room).rglob("*.py")
        for name in re.findall(r"[\w-]+\.\w+", path.read_text(encoding="utf-8"))
    }
    return written | there | EXAMPLES


def files(page: Page) -> Iterator[str]:
    """Paths of the checkout, and names of files."""
    rooms = "|".join(map(re.escape, (*ROOMS, "docker", "docs", ".ci")))
    for code in page.code:
        for path in re.findall(rf"(?<![\w/.:-])(?:{rooms})/[\w./-]*", code):
            if not (REPOSITORY / path.rstrip(".")).exists():
                yield f"no file {path}"
        for name in re.findall(rf"(?<![\w*<>.-])[\w-]+\.(?:{KINDS})\b(?![\w(])", code):
            if name not in names_of_files() and not re.match(r"site-\d\d", name):
                yield f"no file of the name {name}"


def module_file(name: str) -> tuple[Path, list[str]] | None:
    """The longest part of a dotted name that is a module or package, and the rest."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:n])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py"), parts[n:]
        if (path / "__init__.py").is_file():
            return path / "__init__.py", parts[n:]
    return None


def modules(page: Page) -> Iterator[str]:
    """Dotted names of ours, and what python -m is given with its flags."""
    for code in page.code:
        for name in re.findall(rf"(?<![\w/.-])((?:{'|'.join(ROOMS)})(?:\.[A-Za-z_]\w*)+)", code):
            found = module_file(name)
            source = found[0].read_text(encoding="utf-8") if found else ""
            whole = found and set(found[1]) <= set(re.findall(r"\w+", source))
            if not whole and name not in EXAMPLES and not re.search(rf"\.({KINDS})$", name):
                yield f"no module or name {name}"
        if run := re.search(r"-m ([\w.]+)(.*)", code):
            yield from _runnable(run[1], run[2])


def _runnable(name: str, rest: str) -> Iterator[str]:
    if name in OTHER_PROGRAMS:
        return
    path = REPOSITORY.joinpath(*name.split("."))
    main = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    source = main.read_text(encoding="utf-8") if main.is_file() else ""
    if "__main__" not in source and main.name != "__main__.py":
        yield f"python -m {name}: no such program"
    for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", rest.split("`")[0]):
        if f'"{flag}"' not in source:
            yield f"python -m {name} has no {flag}"


def targets(page: Page) -> Iterator[str]:
    """What make is asked for."""
    known = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for code in page.code:
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", code):
            if target not in known:
                yield f"no make target {target}"


_WITH_VALUE = {"-f", "--profile", "-v", "-e", "--exclude", "-C"}
_OF_SERVICES = {"run", "logs", "exec", "restart", "wait", "stop", "up", "cp"}


def compose(page: Page) -> Iterator[str]:
    """Services and files that docker compose is given, and names of SuperNodes."""
    for code in page.code:
        for name in re.findall(r"(?<![\w./-])supernode-[\w]+", code):
            if name not in all_services():
                yield f"no service {name}"
        for call in re.findall(r"docker compose ([^;&|)]*)", code):
            words, command = shlex.split(call.replace("'", "").replace('"', "")), ""
            while words:
                word = words.pop(0)
                if word in _WITH_VALUE and words:
                    value = words.pop(0)
                    if word == "-f" and not (REPOSITORY / value).is_file():
                        yield f"no compose file {value}"
                elif not command and not word.startswith("-"):
                    command = word
                elif command and not word.startswith("-"):
                    if command in _OF_SERVICES and word.split(":")[0] not in all_services():
                        yield f"docker compose {command}: no service {word}"
                    break


def keys(page: Page) -> Iterator[str]:
    """Run-config keys, and pairs and profiles that a run is given: they must be accepted."""
    known = set(flat_config())
    tables = "|".join(sorted({k.split(".")[0] for k in known if "." in k}))
    last = {k.split(".")[-1] for k in known}
    others = {*STRATEGIES, *BENCHMARKS, *HYPHENATED, *all_services(), *volumes()}
    for code in page.code:
        of_tables = rf"(?<![\w./-])(?:{tables})\.[a-z][\w.-]*\*?"
        hyphenated = r"(?<![\w./-])[a-z]+(?:\.[a-z-]+)*\.[a-z]+(?:-[a-z]+)+(?![\w.])"
        for key in {*re.findall(of_tables, code), *re.findall(hyphenated, code)}:
            stem = key.rstrip(".*")
            if re.search(r"\.(jsonl?|csv|parquet)$", key):
                continue
            if stem not in known and not any(k.startswith(f"{stem}.") for k in known):
                yield f"no run-config key {key}"
        word = re.fullmatch(r"([a-z][a-z0-9]*(?:-[a-z0-9]+)+)(?: = \S+)?", code)
        if word and word[1] not in last | known | others:
            yield f"no run-config key or other known word {word[1]}"
        given = re.findall(r"--run-config(?:=| )('[^']+'|[^\s'`]+)", code)
        given += re.findall(r"RUN_CONFIG=('[^']+'|[^\s'`]+)", code)
        for pairs in given:
            try:
                text = pairs.strip("'")
                path = str(REPOSITORY / text) if text.endswith(".toml") else text
                merged_config(REPOSITORY, [path])
            except ConfigError as err:
                yield f"--run-config {pairs}: {err}"
        for profile in re.findall(r"PROFILE=(\w+)", code):
            if not (REPOSITORY / "app" / "profiles" / f"{profile}.toml").is_file():
                yield f"no profile {profile}"


def environment(page: Page) -> Iterator[str]:
    """Environment variables: names in capitals with an underscore, or with = behind them."""
    for code in page.code:
        found = re.findall(r"(?<![\w$.-])[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b(?!\()", code)
        found += re.findall(r"(?:^|\s)([A-Z][A-Z0-9_]{2,})=", code)
        for name in found:
            if name not in variables():
                yield f"no variable {name}"


def links(page: Page) -> Iterator[str]:
    """Relative links: the file, and the heading in it."""
    for target in page.links:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path
        if not path.exists():
            yield f"link to {target}: no such file"
        elif anchor:
            there = page if not file else Page.read(path)
            if anchor not in there.anchors:
                yield f"link to {target}: no such heading"


CHECKS: dict[str, Callable[[Page], Iterator[str]]] = {
    "files": files,
    "modules": modules,
    "make targets": targets,
    "compose": compose,
    "run-config keys": keys,
    "variables": environment,
    "links": links,
}
