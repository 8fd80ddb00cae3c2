"""What the page answers, and to whom."""

import json
import os
import re
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from superlink.page.document import write_standalone
from superlink.page.web import HOSTS
from tests.samples import REPOSITORY
from tests.superlink.page.asking import Elements, Page
from tests.superlink.page.made_runs import NEWEST, OTHER, facts, line, write


def test_a_run_is_shown_with_its_sites_figures_and_events(page: Page) -> None:
    text = Elements(page.get(f"/runs/{NEWEST}").text).text
    for said in (
        "Bio-Medical-Llama-3-8B, fine-tuned by 4 sites together", "2 of 10", "NVIDIA H200",
        "no answer", "1,697", "75.0 %", "0.993", "1.800", "416.0", "0.21 % of 200,000",
        "[preflight] 3 of 20 SuperNodes online",
    ):  # fmt: skip
        assert said in text, said


def test_all_runs_are_listed_the_newest_first_and_two_are_laid_on_top(page: Page) -> None:
    html = page.get("/").text
    assert re.findall(r'<a href="/runs/(\d+)">', html) == [NEWEST, OTHER]
    both = Elements(page.get(f"/runs/{NEWEST}?beside={OTHER}").text)
    assert f"run {OTHER}" in both.text
    assert "strategy.namefedavgoptfedavg" in both.text  # a setting that differs
    assert "Held-out loss" in both.text
    assert (
        "strategy.name" not in Elements(page.get(f"/runs/{OTHER}?beside={OTHER}").text).text[:600]
    )


@pytest.mark.parametrize(
    "path",
    [
        "/runs/5", "/runs/latest", "/runs/%2e%2e", "/runs/..%2f..%2fetc%2fpasswd",
        f"/runs/{NEWEST}%2f..%2f{OTHER}", f"/runs/{NEWEST}?beside=../7", f"/runs/{NEWEST}%00",
        "/runs/٧", "/runs/-7", "/runs/7.0", f"/runs/{'9' * 21}", "/runs/5/report.html",
        f"/runs/{NEWEST}/evaluation", "/page.py", "/..%2fweb.py", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_what_is_not_there_is_said_in_one_line(page: Page, path: str, results: Path) -> None:
    (results / "latest").symlink_to(NEWEST)
    answer = page.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.count("\n") == 1


@pytest.mark.parametrize("path", ["/", f"/runs/{NEWEST}", "/page.js", "/metrics", "/runs/5"])
def test_nothing_comes_from_elsewhere_and_no_script_but_our_file_runs(
    page: Page, path: str
) -> None:
    answer = page.get(path)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    for tag, values in (
        Elements(answer.text).tags if "html" in answer.headers["content-type"] else ()
    ):
        loads = {k: v for k, v in values.items() if k in ("src", "href", "action", "data")}
        assert all(v.startswith("/") for v in loads.values()), (tag, values)
        assert not [k for k in values if k.startswith("on") or k == "style"], (tag, values)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:9080", "localhost.evil.example", ""]
)
def test_another_name_for_this_host_gets_nothing(page: Page, host: str) -> None:
    answer = page.get(f"/runs/{NEWEST}", Host=host)
    assert answer.status_code == 421
    assert answer.text.count("\n") == 1
    assert NEWEST not in answer.text


@pytest.mark.parametrize("host", [*HOSTS, "LOCALHOST:9080", "127.0.0.1:19080", "[::1]:9080"])
def test_the_names_of_this_host_are_answered(page: Page, host: str) -> None:
    assert page.get("/", Host=host).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(page: Page, method: str) -> None:
    assert page.ask(method, f"/runs/{NEWEST}", {}).status_code == 405


def test_what_has_not_changed_is_not_sent_again(page: Page, results: Path) -> None:
    tag = page.get(f"/runs/{NEWEST}").headers["etag"]
    again = page.get(f"/runs/{NEWEST}", If_None_Match=tag)
    assert again.status_code in (200, 304)  # 200: a minute has begun meanwhile
    with (results / NEWEST / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "log", "text": "something new"}) + "\n")
    changed = page.get(f"/runs/{NEWEST}", If_None_Match=tag)
    assert changed.status_code == 200
    assert "something new" in changed.text


def test_a_run_that_was_cut_off_is_not_at_work_once_another_goes_on_from_it(
    page: Page, results: Path
) -> None:
    chain = [{"run_id": OTHER, "last_round": 10}, {"run_id": NEWEST, "last_round": 2}]
    now = datetime.now(UTC).isoformat(timespec="milliseconds")  # or it would count as silent
    write(results / "11", facts("11", resumed_from=chain, started=now), [line(1), line(2)])
    text = Elements(page.get("/runs/11").text).text
    assert f"goes on after round 2 of run {NEWEST}" in text
    cut_off = Elements(page.get(f"/runs/{NEWEST}").text).text
    assert "cut off ended after round 2; another run goes on from there" in cut_off
    states = re.findall(r'class="chip ([\w-]+)"', page.get("/").text)
    assert states == ["running", "cut-off", "completed"]


def test_the_round_that_goes_home_is_named(page: Page, results: Path) -> None:
    assert "best round" not in Elements(page.get(f"/runs/{NEWEST}").text).text
    best = {"round": 1, "held_out_loss": 1.7, "sites": 4}
    write(results / NEWEST, facts(NEWEST, best=best), [line(1), line(2)])
    assert "best round1held-out loss 1.700" in Elements(page.get(f"/runs/{NEWEST}").text).text


def test_prometheus_reads_the_newest_run(page: Page) -> None:
    answer = page.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = dict(re.findall(r'^fedllm_(\w+)\{run="\d+"\} (\S+)$', answer.text, re.MULTILINE))
    assert f'run="{NEWEST}"' in answer.text
    expected = {"rounds": "10", "rounds_done": "2", "sites": "4", "sites_left_out": "1",
                "sent_bytes": str(416 * 2**20), "held_out_loss": "1.8"}  # fmt: skip
    assert expected.items() <= found.items()
    comments = [c for c in answer.text.splitlines() if c.startswith("#")]
    assert len(comments) == 2 * len(found)


def test_the_file_holds_all_and_runs_and_loads_nothing(results: Path) -> None:
    file = write_standalone(results, NEWEST)
    assert file == results / NEWEST / "report.html"
    read = Elements(file.read_text(encoding="utf-8"))
    policy = next(v["content"] for t, v in read.tags if t == "meta" and "http-equiv" in v)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in read.tags}
    assert "[preflight] 3 of 20 SuperNodes online" in read.text
    assert not list(file.parent.glob(".*"))


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        ([], {"RESULTS_DIR": ""}, "RESULTS_DIR=. is no folder"),
        ([], {"RESULTS_DIR": "/nowhere"}, "RESULTS_DIR=/nowhere is no folder"),
        ([], {"PAGE_PORT": "http"}, "PAGE_PORT=http: a port is a number from 1 to 65535"),
        (
            [],
            {"PAGE_HOST": "192.0.2.1"},
            "PAGE_HOST=192.0.2.1, PAGE_PORT=9080: cannot listen there",
        ),
        ([], {}, "cannot listen there: Address already in use"),
        (["report", "../5"], {}, "no run '../5' in"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    results: Path, words: list[str], env: dict[str, str], said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = {} if env else {"PAGE_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, "-m", "superlink.page", *words],
            cwd=REPOSITORY, check=False, capture_output=True, text=True,
            env={**os.environ, "RESULTS_DIR": str(results), **port, **env},
        )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(rf"page: ERROR: .*{re.escape(said)}.*\n", done.stderr)
