"""What `download` leaves in the cache is all that `prepare` needs. The hub is a small server."""

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from supernode.download import PrepareError, model_folder
from supernode.partitions import Split, prepare_data
from supernode.quantise import prepare_model
from tests.samples import write_jsonl

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # pragma: allowlist secret
MODEL, DATA = "somebody/model", "somebody/flashcards"
PIECE_BYTES, PAUSE_S = 10 * 2**20, 1.0
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(/tree/)?")
FILE = re.compile(rf"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/{COMMIT}/(.+)")
REPOSITORY = Path(__file__).parents[2]


class Hub(BaseHTTPRequestHandler):
    """The hub's answers about the folders ``root``/models/… and ``root``/datasets/…"""

    def __init__(self, root: Path, *rest: object) -> None:
        self.root = root
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if found := API.match(self.path):
            folder = self.root / found[1] / found[2]
            sizes = {p.name: p.stat().st_size for p in folder.iterdir()}
            facts: object = {
                "id": found[2],
                "sha": COMMIT,
                "siblings": [{"rfilename": name} for name in sizes],
            }
            if found[3]:
                facts = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            self._answer(json.dumps(facts).encode(), "application/json")
        elif found := FILE.match(self.path):
            self._answer((self.root / (found[1] or "models") / found[2] / found[3]).read_bytes())
        else:
            self._answer(b"")

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, content: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            # The client counts what it has in pieces of 10 MiB.
            for start in range(0, len(content), PIECE_BYTES):
                self.wfile.write(content[start : start + PIECE_BYTES])
                time.sleep(PAUSE_S if len(content) > PIECE_BYTES else 0)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """Address and server of a hub with a model and a data set of forty rows."""
    root = tmp_path / "hub"
    rows = [{"instruction": "Answer", "input": f"Q {n}?", "output": f"A {n}"} for n in range(40)]
    write_jsonl(root / "datasets" / DATA / "cards.jsonl", rows)
    (root / "datasets" / DATA / "README.md").write_text("---\nlicense: mit\n---\nCards.\n")
    (root / "models" / MODEL).parent.mkdir(parents=True)
    (root / "models" / MODEL).symlink_to(tiny_model)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server
    server.shutdown()


def settings(cache: Path, hub: str) -> dict[str, str]:
    named = {"MODEL_NAME": MODEL, "DATA_SOURCE": DATA, "MODEL_CACHE": str(cache)}
    return named | {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


def download(cache: Path, hub: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supernode.download"], cwd=REPOSITORY, check=False, text=True,
        capture_output=True, env={**os.environ, **settings(cache, hub), **env},
    )  # fmt: skip


def test_prepare_without_network_takes_what_download_left(
    hub: tuple[str, ThreadingHTTPServer], tmp_path: Path, tiny_model: Path
) -> None:
    cache, federation = tmp_path / "cache", tmp_path / "federation"
    done = download(cache, hub[0])
    assert done.returncode == 0, done.stderr
    hub[1].shutdown()
    hub[1].server_close()
    again = download(cache, hub[0])  # what is there is not asked for again
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    folder = prepare_model(tmp_path / "models", cache, MODEL, "none", None)
    assert json.loads((folder / "base.json").read_text())["name"] == MODEL
    weights = (model_folder(cache, MODEL, None) / "model.safetensors").read_bytes()
    assert weights == (tiny_model / "model.safetensors").read_bytes()
    assert "somebody/flashcards: 40 rows, 40 of them used" in prepare_data(
        federation, Split(DATA, 2), cache
    )
    rows = "".join(p.read_text() for p in federation.glob("site-*/data/*.jsonl"))
    assert rows.count('"output": "A ') == 40
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_download_says_how_far_it_is(
    hub: tuple[str, ThreadingHTTPServer], tmp_path: Path, terminal: bool
) -> None:
    """A bar in a terminal, lines elsewhere; nothing of it on stdout."""
    large = tmp_path / "hub" / "models" / "somebody" / "large"
    large.mkdir()
    (large / "config.json").write_text("{}")
    (large / "model.safetensors").write_bytes(bytes(4 * PIECE_BYTES))
    often = "import sys; from supernode import download, progress; progress.EVERY_S = 0.5; "
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run(
        [sys.executable, "-c", f"{often}sys.exit(download.main())"], cwd=REPOSITORY, check=True,
        text=True, stdout=subprocess.PIPE, stderr=theirs,
        env=os.environ | settings(tmp_path / "cache", hub[0]) | {"MODEL_NAME": "somebody/large"},
    )  # fmt: skip
    os.close(theirs)
    told = ""
    with suppress(OSError):  # a terminal's way to say that nobody is there any more
        while part := os.read(ours, 2**16):
            told += part.decode()
    print(told)
    assert re.fullmatch(r"download: base model .*\ndownload: data set .*\n", done.stdout)
    if terminal:
        assert re.search(
            r"\rdownload: +\d\d%\|.*\| [23].\.\dM/41\.9M \[00:0\d<00:\d\d, .*MB/s\]", told
        )
    else:
        lines = told.splitlines()
        assert all(line.startswith("download: ") for line in lines)
        assert re.fullmatch(
            r"download: \d+ %, [1-4]\d\.\dM of 41\.9MB, +\d+\.?\d*MB/s, 00:\d\d left", lines[-1]
        )


def test_a_download_that_was_cut_off_is_not_taken_for_a_complete_one(
    hub: tuple[str, ThreadingHTTPServer], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    assert download(cache, hub[0], DATA_SOURCE="bundled").returncode == 0
    (note,) = (cache / "downloaded").iterdir()
    note.unlink()  # as if it had ended before its last step
    with pytest.raises(PrepareError, match=r"somebody/model: not in .*run supernode\.download"):
        model_folder(cache, MODEL, None)


def test_a_hub_that_cannot_be_reached_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    done = download(tmp_path, "http://127.0.0.1:9", DATA_SOURCE="/data/own.jsonl")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("download: ERROR: base model somebody/model: not a local folder, and")
    with pytest.raises(PrepareError, match="data set somebody/flashcards: not in"):
        prepare_data(tmp_path / "federation", Split(DATA, 2), tmp_path)


def test_a_model_that_is_prepared_needs_no_hub(tmp_path: Path) -> None:
    (tmp_path / "models" / "somebody--model-nf4").mkdir(parents=True)
    there = {"MODELS_DIR": str(tmp_path / "models"), "QUANTIZATION": "nf4"}
    there |= {"DATA_SOURCE": "bundled"}
    assert download(tmp_path / "cache", "http://127.0.0.1:9", **there).returncode == 1
    kept = tmp_path / "models" / "somebody--model-nf4" / "base.json"  # written last
    kept.write_text("{}")  # by an older version: it has to be prepared anew
    assert download(tmp_path / "cache", "http://127.0.0.1:9", **there).returncode == 1
    kept.write_text('{"sha256": {}}')
    assert download(tmp_path / "cache", "http://127.0.0.1:9", **there).returncode == 0


def test_files_of_this_host_are_nothing_to_download(tmp_path: Path) -> None:
    done = download(tmp_path, "http://127.0.0.1:9", MODEL_NAME="/data/m", DATA_SOURCE="/data/d")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to download") == 2
    assert list(tmp_path.iterdir()) == []
