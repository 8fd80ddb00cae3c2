"""The page in a browser: it follows the files without a reload, and shows whatever they hold."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from superlink.onehost.processes import free_port
from tests.browser import MISPLACED, Browser, in_browser
from tests.superlink.page.made_runs import NEWEST, OTHER, events, facts, line, two_runs, write
from tests.superlink.page.served import page_of, right_at_both_widths

pytestmark = in_browser
EVIL = "<img src=x onerror=alert(1)>" + "x" * 300


def test_what_is_written_is_shown_without_a_reload_and_what_was_opened_stays_open(
    tmp_path: Path,
) -> None:
    folder = two_runs(tmp_path) / NEWEST
    with page_of(tmp_path) as address, Browser() as browser:
        browser.open(f"{address}/runs/{NEWEST}")
        browser.value("document.querySelector('details').open = true; window.here = 'still'")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line(3)) + "\n")
        told = {"event": "log", "level": "warning", "text": EVIL, "time": events()[-1]["time"]}
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(told) + "\n")
        browser.wait_for("document.querySelector('#events li').innerText.includes('onerror')")
        browser.wait_for("document.querySelector('#head').innerText.includes('3 of 10')")
        assert browser.value("window.here") == "still"
        assert browser.value("document.querySelectorAll('img').length") == 0
        (folder / "run.json").write_text(json.dumps(facts(NEWEST, status="completed")))
        browser.wait_for("document.querySelector('#head .chip').textContent == 'completed'")
        assert browser.value("document.querySelector('details').open") is True
        assert browser.complaints == []
        assert {url for url in browser.asked if not url.startswith(address)} <= {"about:blank"}


def test_every_state_fits_a_phone_and_a_desk(tmp_path: Path) -> None:
    results = two_runs(tmp_path)
    evil = facts("5", status="failed", error=EVIL, sites={EVIL: {"device": EVIL}})
    evil["config"]["model.name"] = EVIL
    write(results / "5", evil, [line(n, (1, 100)) for n in range(1, 80)], [{"text": EVIL}])
    write(results / "6", None)
    with page_of(results) as address, Browser() as browser:
        paths = ["", *(f"runs/{r}" for r in (5, 6, OTHER, NEWEST)), f"runs/{NEWEST}?beside=5"]
        for path in paths:
            browser.open(f"{address}/{path}")
            right_at_both_widths(browser)
        assert browser.complaints == []


def test_a_server_that_is_gone_is_said_and_what_it_told_stays(tmp_path: Path) -> None:
    with Browser() as browser:
        with page_of(two_runs(tmp_path)) as address:
            browser.open(f"{address}/runs/{NEWEST}")
        browser.wait_for("!document.getElementById('away').hidden")
        assert "does not answer" in browser.text()
        assert "NVIDIA H200" in browser.text()


def test_what_finds_a_page_that_does_not_fit_can_find_one(tmp_path: Path) -> None:
    with page_of(two_runs(tmp_path)) as address, Browser() as browser:
        browser.open(f"{address}/runs/{NEWEST}")
        browser.width(390)
        browser.value("document.querySelector('h1').style.whiteSpace = 'nowrap'")
        browser.value("document.querySelector('figure svg[role] text').setAttribute('x', 900)")
        wide, clipped = browser.value(MISPLACED)
        assert "wide" in wide
        assert "clipped" in clipped


def test_what_the_host_has_broken_off_is_opened_again_and_is_no_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An error that can be had here, in the place of the one that another's network interface makes.
    monkeypatch.setattr("tests.browser.BROKEN_OFF", "net::ERR_CONNECTION_REFUSED")
    (tmp_path / "index.html").write_text("<link rel=icon href='data:,'><p>here")
    port, servers = free_port(), list[ThreadingHTTPServer]()

    def serve() -> None:
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        servers.append(ThreadingHTTPServer(("127.0.0.1", port), handler))
        servers[0].serve_forever()

    later = threading.Timer(1, serve)
    with Browser(30) as browser:
        later.start()
        try:
            browser.open(f"http://127.0.0.1:{port}/index.html")
            assert browser.text() == "here"
            assert len(browser.asked) > 1
            assert browser.complaints == []
        finally:
            later.cancel()
            for server in servers:
                server.shutdown()
                server.server_close()
