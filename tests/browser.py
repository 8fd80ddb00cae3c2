"""Chromium, steered over its own protocol: pages as people see them while they change."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.request import urlopen

import pytest
from websockets.sync.client import ClientConnection, connect

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# REQUIRE_BROWSER=1 (as in .ci/run) makes a missing one a failure instead.
in_browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("REQUIRE_BROWSER"),
    reason="no chromium or google-chrome here",
)
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars remote-debugging-port=0"
)
BROKEN_OFF = "net::ERR_NETWORK_CHANGED"
# No text may be cut off by its picture, no page wider than its window, no picture without size.
MISPLACED = """(() => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) wrong.push(`the page is ${root.scrollWidth} wide`);
  for (const svg of document.querySelectorAll("figure svg[role]")) {
    const all = svg.getBoundingClientRect();
    if (all.width < 200 || all.height < 30) wrong.push("a picture without size");
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < all.left - 1 || box.right > all.right + 1 || box.bottom > all.bottom + 1)
        wrong.push(`clipped: ${text.textContent}`);
    }
  }
  return wrong;
})()"""


class Browser:
    """One tab; use as a context manager.

    A network interface of this host that comes or goes, such as a container's, has Chromium break
    off what it is loading, from this host as well (https://issues.chromium.org/issues/41465264).
    That says nothing of a page: it is opened again, and what it asks for later it asks for anew.

    Attributes:
        complaints: errors of scripts, and what a Content-Security-Policy has refused.
        asked: the addresses that its pages have asked for.
    """

    def __init__(self, timeout_s: float = 300) -> None:
        assert BROWSER, "no chromium or google-chrome here"
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self._timeout_s, self._calls, self._broken_off = timeout_s, 0, False
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = [f"--{flag}" for flag in [*FLAGS.split(), f"user-data-dir={self._profile.name}"]]
        self._process = subprocess.Popen(
            [BROWSER, *flags, "about:blank"], stderr=subprocess.DEVNULL
        )
        self._socket = self._connected()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _connected(self) -> ClientConnection:
        listens = Path(self._profile.name) / "DevToolsActivePort"
        while not listens.is_file() or listens.read_text().count("\n") < 1:
            assert self._process.poll() is None, "the browser ended at once"
            time.sleep(0.05)
        port = listens.read_text().split()[0]
        with urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            tabs = json.load(answer)
        tab = next(tab for tab in tabs if tab["type"] == "page")
        # No pings: how soon a busy machine's browser answers one is no finding.
        return connect(
            tab["webSocketDebuggerUrl"], max_size=None, compression=None, ping_interval=None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> Any:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": params}))
        while True:
            said = self._read()
            if said.get("id") == self._calls:
                assert "error" not in said, said
                return said["result"]

    def _read(self) -> Any:
        said = json.loads(self._socket.recv(self._timeout_s))
        about = said.get("params", {})
        if said.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(about["exceptionDetails"]["text"])
        elif said.get("method") == "Log.entryAdded" and about["entry"]["level"] == "error":
            if BROKEN_OFF not in about["entry"]["text"]:
                self.complaints.append(about["entry"]["text"])
        elif said.get("method") == "Network.loadingFailed":
            self._broken_off |= about["errorText"] == BROKEN_OFF
        elif said.get("method") == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        return said

    def open(self, address: str) -> None:
        """Go there, and wait until it is there."""
        self._broken_off = True
        while self._broken_off:
            self._broken_off = False
            self.call("Page.navigate", url=address)
            while self._read().get("method") != "Page.loadEventFired":
                pass

    def value(self, script: str) -> Any:
        """What this expression gives in the page; of a promise what it comes to."""
        done = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until this expression is true in the page."""
        look = f"const look = () => ({condition}) ? done() : setTimeout(look, 50);"
        self.value(f"new Promise((done) => {{ {look} look(); }})")

    def text(self) -> str:
        return str(self.value("document.body.innerText"))

    def width(self, pixels: int) -> None:
        """As on a screen of this width."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1,
            mobile=pixels < 600,
        )  # fmt: skip

    def picture(self, path: Path) -> None:
        """The whole page, to its end, as a PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
