"""README and pages name what is there, their links resolve, and their commands are run by a test.

python -m pytest tests/docs
"""

import ast
import re
from collections.abc import Iterator

import pytest

from app.site import check
from superlink import status
from supernode import check_rows
from tests.docs import settings
from tests.docs.checks import CHECKS, services
from tests.docs.pages import Page, all_pages
from tests.samples import REPOSITORY

README_BYTES = 12_000
PAGES = {page.path.relative_to(REPOSITORY).as_posix(): page for page in all_pages()}
README, DOCS = PAGES["README.md"], REPOSITORY / "docs"
MARKS = ("needs GPU", "needs hub", "needs another host")
# A command, as the pages have it -> what runs it: files, and words that stand in one of them.
RUN_BY = {
    r"make (install|lint|test)": (".ci/run", "make lint\n"),
    r"make test-faults": (".ci/run", "make test-faults"),
    r"make bundle": ("tests/containers/hospitals.py", '"make", "bundle"'),
    r"make test-containers": (".ci/run", "make test-containers"),
    r"make demo": ("tests/federation/test_run.py", '"superlink.onehost"'),
    r"docker compose( -f \S+)* up( -d)?": ("tests/containers/conftest.py", '("up", "-d")'),
    r"docker compose( -f \S+)* --profile eval down": (
        "tests/containers/*.py", '("--profile", "eval", "down")',
    ),
    r"docker compose( -f \S+)* run --rm eval": ("tests/containers/test_up.py", '"eval", "--limit"'),
    r"docker compose cp superlink:/results \./results": (
        "tests/containers/test_up.py", '("cp", "superlink:/results"',
    ),
    r"docker compose run --rm provision python3 -m superlink\.provision "
    r"(show|renew|rotate site-07|revoke site-07|reset)": (
        "tests/superlink/test_provision.py", '["superlink.provision", *options, *words]',
    ),
    r"docker compose run --rm status": ("tests/containers/test_tools.py", '(*RUN, "status"'),
    r"docker compose run --rm backup( --results)?": (
        "tests/containers/test_tools.py", '(*RUN, "backup", "--results")',
    ),
    r"docker compose run --rm restore /backup/\S+\.tar": (
        "tests/containers/test_tools.py", '"restore", f"/backup/{archive.name}"',
    ),
    r"docker compose run --rm provision cat /audit/audit\.jsonl": (
        "tests/containers/test_tools.py", '"provision", "cat", "/audit/audit.jsonl"',
    ),
    r"sudo install -d -o 10001 backup && export BACKUP_DIR=\./backup": (
        "tests/containers/test_tools.py", '"BACKUP_DIR": str(saved)',
    ),
    r"docker volume rm fedllm-medical_state": (
        "tests/federation/test_reset.py", 'glob("superlink.db*")',
    ),
    r"RESULTS_DIR=results \.venv/bin/python -m superlink\.page( report \d+)?": (
        "tests/federation/test_page.py", '"superlink.page", "report"',
    ),
    r"docker compose run --rm --no-deps serverapp python3 -m superlink\.page report \d+": (
        "tests/containers/test_up.py", '"superlink.page", "report"',
    ),
    r"\.venv/bin/python -m superlink\.tensorboard results/\d+": (
        "tests/superlink/test_tensorboard.py", '"superlink.tensorboard", str(folder)',
    ),
    r"\.venv/bin/python -m superlink\.connection localhost:9093 ca\.crt": (
        "tests/superlink/test_connection.py", '"superlink.connection", "localhost:9093"',
    ),
    r"\.venv/bin/python -m app\.plan( --run-config \S+)?": (
        "tests/app/test_plan.py", '"-m", "app.plan", "--run-config"',
    ),
    r"\.venv/bin/python -m superlink\.onehost\.compare \S+\.toml": (
        "tests/superlink/onehost/test_compare.py", '"superlink.onehost.compare", *options',
    ),
    r"\.venv/bin/python -m supernode\.pinned hash \.": (
        "superlink/onehost/processes.py", '"supernode.pinned", "hash"',  # of each local federation
    ),
    r"SITE_DIR=\$PWD/site-07 \.venv/bin/python -m supernode\.site "
    r"(pause|resume|apps|(approve|withdraw) SHA256 --by NAME)": (
        "tests/federation/test_policy.py", '"-m", "supernode.site"',
    ),
    r"\.venv/bin/python -m eval --data-dir DIR": ("tests/eval/test_cli.py", '"--data-dir"'),
    r"\.venv/bin/python -m eval pack > benchmarks\.tar": (
        "tests/hub/test_fetch.py", '"-m", "eval", "pack"',
    ),
    r"\.venv/bin/python -m eval export (--run \d+ )?--round \w+ (--merge )?--to \S+": (
        "tests/eval/taken_home.py", 'main(["export"',
    ),
    r"docker compose( -f \S+)* run --rm --no-deps eval export --round best --to \S+": (
        "tests/containers/test_up.py", '"eval", "export", "--round", "best"',
    ),
    r"docker compose cp superlink:/results/latest/eval/mine \./mine": (
        "tests/containers/test_up.py", '("cp", f"superlink:{to}"',
    ),
    r"\.venv/bin/python -m eval score \S+": ("tests/eval/test_cli.py", 'main(["score"'),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_is_there(name: str, check: str) -> None:
    assert list(CHECKS[check](PAGES[name])) == []


BROKEN = (
    ("files", "`app/confg.py`", "no file app/confg.py"),
    ("files", "`tests/federation/test_doors.py`", "no file tests/federation/test_doors.py"),
    ("files", "`test_doors.py`", "no file of the name test_doors.py"),
    ("files", "`metrics.json`", "no file of the name metrics.json"),
    ("modules", "`app.planning`", "no module or name app.planning"),
    ("modules", "`app.config.STRATEGYS`", "no module or name app.config.STRATEGYS"),
    ("modules", "`app.strategy`", "no module or name app.strategy"),  # it was there once
    ("modules", "`superlink.submitter`", "no module or name superlink.submitter"),
    ("modules", "`python -m app.config`", "python -m app.config: no such program"),
    ("modules", "`python -m evil --run x`", "python -m evil: no such program"),
    ("modules", "`python -m eval --every-round`", "python -m eval has no --every-round"),
    ("make targets", "`make demos`", "no make target demos"),
    ("make targets", "```sh\nmake dril\n```\n", "no make target dril"),
    ("compose", "`docker compose logs supernode-20`", "no service supernode-20"),
    ("compose", "`docker compose run --rm evaluate`", "compose run: no service evaluate"),
    ("compose", "`docker compose cp link:/results .`", "compose cp: no service link:/results"),
    ("compose", "`docker compose -f compose.gpu.yaml up`", "no compose file compose.gpu.yaml"),
    ("run-config keys", "`strategy.min-node`", "no run-config key strategy.min-node"),
    ("run-config keys", "`trian.seq-length`", "no run-config key trian.seq-length"),
    ("run-config keys", "`privacy.*`, `train.seq-length`", ""),
    ("run-config keys", "`min-node`", "other known word min-node"),
    ("run-config keys", "`--run-config 'sead=7'`", "unknown key sead"),
    ("run-config keys", "`RUN_CONFIG='seed=-1'`", "seed = -1 must be"),
    ("run-config keys", "`--run-config app/profiles/fast.toml`", "fast.toml"),
    ("run-config keys", "`PROFILE=fast docker compose up`", "no profile fast"),
    ("variables", "`FLEET_PORTS`", "no variable FLEET_PORTS"),
    ("variables", "```sh\nGPU=1 make demo\n```\n", "no variable GPU"),
    ("links", "[x](nowhere.md)", "link to nowhere.md: no such file"),
    ("links", "[x](README.md#try-me)", "link to README.md#try-me: no such heading"),
    ("links", "[x](#here)", "link to #here: no such heading"),
    ("links", '<img src="docs/x.png">', "link to docs/x.png: no such file"),
)


@pytest.mark.parametrize(("check", "text", "said"), BROKEN)
def test_a_broken_page_is_told_so(check: str, text: str, said: str) -> None:
    """Each kind of check is red where a page is wrong, or it would be no check."""
    found = list(CHECKS[check](Page(REPOSITORY / "README.md", text)))
    assert bool(found) == bool(said)
    assert not said or said in found[0]


def unrun(page: Page) -> Iterator[str]:
    """Commands that no test runs, and that no mark says why."""
    for command, comment in page.commands:
        marked = any(mark in comment for mark in MARKS)
        if not marked and not any(re.fullmatch(known, command) for known in RUN_BY):
            yield command


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_run_by_a_test_or_marked(name: str) -> None:
    assert list(unrun(PAGES[name])) == []


def test_a_command_that_nothing_runs_is_found() -> None:
    block = "```sh\nmake demo\nmake magic\nmake more   # needs GPU\nmake other # soon\n```\n"
    assert list(unrun(Page(DOCS / "x.md", block))) == ["make magic", "make other"]


@pytest.mark.parametrize("command", RUN_BY)
def test_what_is_said_to_run_a_command_does(command: str) -> None:
    where, words = RUN_BY[command]
    texts = [path.read_text(encoding="utf-8") for path in REPOSITORY.glob(where)]
    assert any(words in text for text in texts), f"{where} has no {words}"
    used = [c for page in PAGES.values() for c, _ in page.commands if re.fullmatch(command, c)]
    assert used, "no page has this command any more: take it out of RUN_BY"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.text.encode()) <= README_BYTES
    leads = {target.partition("#")[0] for target in README.links}
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} <= leads
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} <= leads


def test_pictures_are_small_and_run_nothing() -> None:
    for path in DOCS.glob("*.png"):
        assert path.stat().st_size < 150_000, path
    for path in DOCS.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<script|href|@import|url\((?!#)", text), path
        assert "prefers-color-scheme: dark" in text, path


def test_settings_are_those_of_the_code() -> None:
    assert settings.PAGE.read_text(encoding="utf-8") == settings.page(), (
        "docs/settings.md is stale: python -m tests.docs.settings"
    )


def test_every_setting_says_what_it_means() -> None:
    """But for those that the row above them explains as well."""
    rows = [line.split(" | ") for line in settings.run_config_keys()][1:]
    without = {row[0].strip("|` ") for row in rows if not row[-1].strip("| ")}
    assert without <= {
        "strategy.min-train-nodes", "strategy.min-evaluate-nodes", "strategy.max-retries",
        "strategy.max-update-norm", "communication.down", "communication.up",
    }  # fmt: skip


def test_the_architecture_has_a_line_for_every_module() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\S+\.py)` \| \S", page, re.MULTILINE)
    modules = [file for file, _ in settings.sources() if not file.endswith("__init__.py")]
    assert sorted(lines) == sorted(modules)


def test_the_operators_table_has_every_service() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", section("operator.md", "What runs where"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert named | {f"supernode-{n:02d}" for n in range(1, 19)} == services()


def test_the_check_on_the_hospitals_page_has_every_row() -> None:
    text = section("hospital.md", "The first day")
    shown = re.findall(r"^(?:ok     |WARNING|ERROR  )  (.{14})  \S", text, re.MULTILINE)
    assert [row.rstrip() for row in shown] == [*check_rows.ROWS, *check.ROWS]


def test_the_status_on_the_operators_page_has_every_column() -> None:
    (header,) = re.findall(r"^site  .*", section("operator.md", "Status"), re.MULTILINE)
    wanted = status.text(status.Report(0, [], None, [])).splitlines()[0]
    assert re.split(r" {2,}", header) == re.split(r" {2,}", wanted)


def section(file: str, title: str) -> str:
    text = (DOCS / file).read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


# Docker's, SQLAlchemy's, Python's; and one that the code puts together out of single words.
OF_OTHERS = ("could not select device driver", "Bind for", "QueuePool", "[Errno 13]", "[door]")


def said_by_the_code() -> str:
    """Every text in the code but docstrings, one a line; a gap where a value goes in."""
    texts: list[str] = []
    for _, tree in settings.sources():
        documents = {n.value for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and node not in documents:
                texts.append(str(node.value))
    return "\n".join(texts)


def untrue(messages: list[str], texts: str) -> list[str]:
    """Messages of which the code has no three words in a row, nor two, that are long enough."""

    def is_said(message: str) -> bool:
        words = re.sub(r"^\w+: (ERROR: )?", "", message).split(" ")
        runs = [" ".join(words[n : n + size]) for size in (3, 2) for n in range(len(words))]
        return any(run in texts for run in runs if len(run) >= 10)

    return [m for m in messages if not is_said(m) and not any(other in m for other in OF_OTHERS)]


def test_troubleshooting_has_messages_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    messages = [m for cell in cells for m in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 40
    assert untrue(messages, said_by_the_code()) == []
    assert untrue(["eval: ERROR: no cheese was bought"], said_by_the_code())


def test_the_pages_are_read_whole() -> None:
    """The parser sees what is there: a page without code would be no page of ours."""
    assert set(PAGES) >= {"README.md", "CONTRIBUTING.md", "docs/operator.md", "docs/log.md"}
    assert len(README.commands) > 8
    assert len(PAGES["docs/operator.md"].commands) > 14
