"""What the page answers, to whom, and what it makes of files that are not what they should be."""

import json
import os
import re
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from superlink.page.document import write_standalone
from superlink.page.runs import MOST_BYTES
from superlink.page.web import HOSTS, web
from tests.samples import REPOSITORY
from tests.superlink.page.made_runs import NEWEST, OTHER, events, facts, line, two_runs, write

OURS = (
    "title h2 svg rect figure figcaption text line path circle section ol li details summary form "
    "select option button label time span style b div p"
)
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return two_runs(tmp_path / "results")


@pytest.fixture
def page(results: Path) -> TestClient:
    return client(results)


def client(results: Path) -> TestClient:
    return TestClient(web(results), base_url="http://localhost:8080")


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_run_is_shown_with_its_sites_figures_and_events(page: TestClient) -> None:
    text = Elements(page.get(f"/runs/{NEWEST}").text).text
    for said in (
        "Bio-Medical-Llama-3-8B, fine-tuned by 4 sites together", "2 of 10", "NVIDIA H200",
        "no answer", "1,697", "75.0 %", "0.993", "1.800", "416.0", "0.21 % of 200,000",
        "[preflight] 3 of 20 SuperNodes online",
    ):  # fmt: skip
        assert said in text, said


def test_all_runs_are_listed_the_newest_first_and_two_are_laid_on_top(page: TestClient) -> None:
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
def test_what_is_not_there_is_said_in_one_line(page: TestClient, path: str, results: Path) -> None:
    (results / "latest").symlink_to(NEWEST)
    answer = page.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.count("\n") == 1


@pytest.mark.parametrize("path", ["/", f"/runs/{NEWEST}", "/page.js", "/metrics", "/runs/5"])
def test_nothing_comes_from_elsewhere_and_no_script_but_our_file_runs(
    page: TestClient, path: str
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
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", ""]
)
def test_another_name_for_this_host_gets_nothing(page: TestClient, host: str) -> None:
    answer = page.get(f"/runs/{NEWEST}", headers={"Host": host})
    assert answer.status_code == 421
    assert answer.text.count("\n") == 1
    assert NEWEST not in answer.text


@pytest.mark.parametrize("host", [*HOSTS, "LOCALHOST:8080", "127.0.0.1:18080", "[::1]:8080"])
def test_the_names_of_this_host_are_answered(page: TestClient, host: str) -> None:
    assert page.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_changed(page: TestClient, method: str) -> None:
    assert getattr(page, method)(f"/runs/{NEWEST}").status_code == 405


def test_what_has_not_changed_is_not_sent_again(page: TestClient, results: Path) -> None:
    tag = page.get(f"/runs/{NEWEST}").headers["etag"]
    again = page.get(f"/runs/{NEWEST}", headers={"If-None-Match": tag})
    assert again.status_code in (200, 304)  # 200: a minute has begun meanwhile
    with (results / NEWEST / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "log", "text": "something new"}) + "\n")
    changed = page.get(f"/runs/{NEWEST}", headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert "something new" in changed.text


def everywhere(value: Any, text: str) -> Any:
    """``value`` with every text and every key in it made ``text``, but those that are read."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [everywhere(v, text) for v in value]
    if isinstance(value, dict):
        return {k: everywhere(v, text) for k, v in value.items()} | {text: text}
    return value


@pytest.mark.parametrize(
    "text", [EVIL, '"><script>alert(1)</script>', "' onload='x", "</title><b>"]
)
def test_whatever_a_file_says_is_only_text(tmp_path: Path, text: str) -> None:
    told = [everywhere(e, text) | {"event": e["event"]} for e in events()]
    evil = everywhere(facts("5"), text)
    evil["sites"] = {text: {"device": text}}
    folder = write(tmp_path / "5", evil, [everywhere(line(1), text)], told)
    (folder / "eval").mkdir()
    report = {"datasets": {text: {"title": text}}, "subjects": [{"name": text}], "published": text}
    (folder / "eval" / "report.json").write_text(json.dumps(report))
    write(tmp_path / "6", evil | {"config": {text: text}})
    page = client(tmp_path)
    plain = {tag for tag, _ in Elements(client(two_runs(tmp_path / "x")).get("/").text).tags}
    for path in ("/", "/runs/5", "/runs/5?beside=6", "/runs/5/report.html"):
        read = Elements(page.get(path).text)
        tags = {tag for tag, _ in read.tags}
        assert "img" not in tags
        assert [v for t, v in read.tags if t == "script"] in (
            [],
            [{"src": "/page.js", "defer": ""}],
        )
        assert not [v for _, v in read.tags if any(k.startswith("on") for k in v)]
        assert tags <= plain | {*OURS.split()}
    assert text in Elements(page.get("/runs/5").text).text


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """Such an object in which some values are anything."""
    keys = draw(st.lists(st.sampled_from(sorted(whole)), max_size=3))
    return whole | {key: draw(ANYTHING) for key in keys}


@given(
    run=spoilt(facts("5")) | ANYTHING,
    rounds=st.lists(spoilt(line(1)) | ANYTHING, max_size=3),
    told=st.lists(st.sampled_from(events()).flatmap(spoilt) | ANYTHING, max_size=5),
    config=spoilt(facts("5")["config"]),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_file_whatever_it_holds_is_an_error_of_the_page(
    tmp_path: Path, run: Any, rounds: list[Any], told: list[Any], config: dict[str, Any]
) -> None:
    if isinstance(run, dict) and "config" in run:
        run = run | {"config": config}
    write(tmp_path / "5", json.dumps(run), rounds, told)
    page = client(tmp_path)
    for path in ("/", "/runs/5", "/runs/5?beside=5", "/metrics"):
        assert page.get(path).status_code == 200


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "run.json").write_text("[" * 100_000),
        lambda folder: (folder / "run.json").write_text('"\\ud800"'),
        lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n\x00\n"),
        lambda folder: (folder / "events.jsonl").write_text("no json\n"),
        lambda folder: os.truncate(folder / "events.jsonl", MOST_BYTES + 1),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(results: Path, spoil: Any) -> None:
    spoil(results / NEWEST)
    answer = client(results).get(f"/runs/{NEWEST}")
    assert answer.status_code == 200
    assert "Not readable: " in answer.text


def test_a_link_or_a_pipe_in_the_results_leads_nowhere(results: Path, tmp_path: Path) -> None:
    secret = write(tmp_path / "elsewhere", facts("9", error="of somebody else"))
    (results / "9").symlink_to(secret)
    folder = write(results / "8", None)
    (folder / "run.json").symlink_to(secret / "run.json")
    (folder / "events.jsonl").unlink()
    os.mkfifo(folder / "events.jsonl")
    page = client(results)
    assert page.get("/runs/9").status_code == 404
    assert "of somebody else" not in page.get("/runs/8").text
    assert "/runs/9" not in page.get("/").text


@pytest.mark.parametrize("run", [None, ""])
def test_a_folder_without_runs_or_with_an_empty_one_is_no_error(
    tmp_path: Path, run: str | None
) -> None:
    assert "No run has begun yet." in client(tmp_path).get("/").text
    assert client(tmp_path).get("/metrics").text == ""
    assert "No run has begun yet." in client(tmp_path / "gone").get("/").text
    (tmp_path / "5").mkdir()
    if run is not None:
        write(tmp_path / "5", run)
    assert "starting" in client(tmp_path).get("/runs/5").text


def test_prometheus_reads_the_newest_run(page: TestClient) -> None:
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
            "PAGE_HOST=192.0.2.1, PAGE_PORT=8080: cannot listen there",
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
