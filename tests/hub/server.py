"""A hub for tests: olah, and before it a front that refuses, cuts off or dawdles as the hub may.

olah is a mirror of the hub that people run in their own houses; it serves git repositories with the
hub's API. It needs another FastAPI than Flower, hence a Python of its own (``make install``).
"""

import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from superlink import certificates
from tests.samples import REPOSITORY

OLAH = REPOSITORY / ".venv" / "olah" / "bin" / "olah-cli"
PIECE_BYTES = 10 * 2**20  # in which the hub's client counts what it has
CONFIG = """
[basic]
mirrors-path = ["{folder}/served"]
repos-path = "{folder}/of-others"
hf-netloc = "127.0.0.1:9"
[accessibility]
offline = true
"""
_LISTENS = "Uvicorn running on "
_direct = build_opener(ProxyHandler({}))


class Asked(NamedTuple):
    """A request that the front got."""

    method: str
    path: str
    headers: Mapping[str, str]  # by names in lower case

    def names(self, file: str) -> bool:
        return "/resolve/" in self.path and self.path.endswith(f"/{file}")


class Refusal(NamedTuple):
    """What the hub says no with: its client goes by these two headers."""

    status: int
    code: str = ""
    message: str = ""


def repository(folder: Path, kind: str, name: str, files: Mapping[str, bytes]) -> str:
    """Have olah serve ``files`` as ``name`` ("models" or "datasets"); the commit's hash."""
    work = folder / "served" / kind / name
    for file, content in files.items():
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).write_bytes(content)
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    for command in (
        ("init", "--quiet", "--initial-branch=main"),
        ("add", "--all"),
        (*who, "-c", "commit.gpgsign=false", "commit", "--quiet", "--message=files"),
    ):
        subprocess.run(["git", *command], cwd=work, check=True)
    asked = ["git", "rev-parse", "HEAD"]
    return subprocess.run(asked, cwd=work, check=True, capture_output=True, text=True).stdout[:40]


@contextmanager
def olah(folder: Path) -> Iterator[str]:
    """Its address, on a port that the system chose."""
    assert OLAH.exists(), "make install"
    config = folder / "olah.toml"
    config.write_text(CONFIG.format(folder=folder))
    process = subprocess.Popen(
        [OLAH, "-c", config, "--host", "127.0.0.1", "--port", "0", "--log-path", folder / "logs"],
        cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout
    try:
        said: list[str] = []
        while not said or _LISTENS not in said[-1]:
            line = process.stdout.readline()
            assert line, f"olah has ended: {''.join(said)}"
            said.append(line)
        Thread(target=process.stdout.read, daemon=True).start()  # or it would wait for a reader
        yield said[-1].partition(_LISTENS)[2].split()[0]
    finally:
        process.kill()
        process.wait()


class Front(ThreadingHTTPServer):
    """Passes on what it is asked, and keeps it in ``asked``.

    A test sets ``refuse``, ``stands_for`` (a revision, and the local commit that has its files),
    ``cuts`` (after so many bytes of the next file of so many, one after the other), ``pause_s``
    (between pieces of a file).
    """

    def __init__(self, hub: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[Asked] = []
        self.refuse: Callable[[Asked], Refusal | None] = lambda _: None
        self.stands_for: tuple[str, str] = ("", "")
        self.cuts: list[int] = []
        self.pause_s = 0.0
        Thread(target=self.serve_forever, daemon=True).start()

    def speak_tls(self, folder: Path) -> Path:
        """From now on with a certificate of a CA of its own, whose file it returns."""
        ca_key, key = certificates.new_key(), certificates.new_key()
        ca = certificates.ca_certificate(ca_key)
        certificates.write_certificate(folder / "ca.crt", ca)
        served = certificates.server_certificate(key, ca_key, ca, ["127.0.0.1"])
        certificates.write_certificate(folder / "front.crt", served)
        certificates.write_key(folder / "front.key", key)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(folder / "front.crt", folder / "front.key")
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.address = self.address.replace("http://", "https://")
        return folder / "ca.crt"


class _Handler(BaseHTTPRequestHandler):
    server: Front

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers)
        self.server.asked.append(asked)
        if refusal := self.server.refuse(asked):
            self.send_response(refusal.status)
            self.send_header("X-Error-Code", refusal.code)
            self.send_header("X-Error-Message", refusal.message)
            self.end_headers()
            return
        theirs, local = self.server.stands_for
        path = self.path.replace(theirs, local) if theirs else self.path
        try:
            answer = _direct.open(Request(self.server.hub + path, method=self.command))  # noqa: S310
        except HTTPError as err:
            answer = err
        with answer:
            content = answer.read()
            headers = {n: v for n, v in answer.headers.items() if n.lower() != "transfer-encoding"}
        if local and headers.get("x-repo-commit") == local:
            headers["x-repo-commit"] = theirs
        self._send(answer.status, headers, content)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        if self.command == "GET":
            headers["content-length"] = str(len(content))
        wanted = self.headers.get("Range", "")
        if self.command == "GET" and wanted and status == 200:  # which olah does not know
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
            headers["content-length"] = str(len(content))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        of_a_file = "/resolve/" in self.path and self.command == "GET"
        if of_a_file and self.server.cuts and len(content) > self.server.cuts[0]:
            content = content[: self.server.cuts.pop(0)]
        for start in range(0, len(content), PIECE_BYTES):
            self.wfile.write(content[start : start + PIECE_BYTES])
            time.sleep(self.server.pause_s if len(content) > PIECE_BYTES else 0)

    def log_message(self, *_: object) -> None:
        pass
