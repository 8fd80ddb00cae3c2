"""Models and data sets by name: what a download leaves in the cache is all that a run needs."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from supernode.download import DATA, MODEL, PrepareError, model_folder
from supernode.quantise import prepare_model
from tests.hub.conftest import Command, environment
from tests.hub.server import PIECE_BYTES, Front, repository
from tests.samples import REPOSITORY

DEAD = "http://127.0.0.1:9"
PAUSE_S = 1.0


@pytest.mark.faults  # a model is loaded, written and trained: tens of seconds
def test_the_references_model_and_data_are_prepared_by_name_and_again_offline(
    mirror: str, run: Command, tmp_path: Path, tiny_model: Path
) -> None:
    cache, federation = tmp_path / "cache", tmp_path / "federation"
    command = ("supernode.prepare", "all", "--quantization", "none", "--sites", "2")
    made = run(mirror, *command)
    assert made.returncode == 0, made.stderr
    (base,) = (tmp_path / "models").glob("*/base.json")
    facts = json.loads(base.read_text())
    assert facts["name"] == MODEL
    weights = model_folder(cache, MODEL, None) / "model.safetensors"
    assert weights.read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    rows = {p: p.read_text() for p in federation.glob("site-*/data/*.jsonl")}
    assert sum(text.count('"output": "A ') for text in rows.values()) == 40
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    shutil.rmtree(federation)
    again = run(DEAD, "supernode.prepare", "data", "--sites", "2", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert made.stdout.endswith(again.stdout)
    assert f"prepare: {DATA}: 40 rows, 40 of them used" in again.stdout.splitlines()
    assert {p: p.read_text() for p in federation.glob("site-*/data/*.jsonl")} == rows
    folder = prepare_model(tmp_path / "anew", cache, MODEL, "none", None)  # offline, as tests are
    assert json.loads((folder / "base.json").read_text())["fingerprint"] == facts["fingerprint"]
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_what_download_left_is_not_asked_for_again(
    front: Front, run: Command, tmp_path: Path
) -> None:
    done = run(front.address, "supernode.download")
    assert done.returncode == 0, done.stderr
    count = len(front.asked)
    again = run(front.address, "supernode.download")
    assert (again.returncode, again.stdout, len(front.asked)) == (0, done.stdout, count)


def test_a_mirror_may_have_a_certificate_of_its_own_ca_and_a_login_in_its_address(
    front: Front, run: Command, tmp_path: Path
) -> None:
    ca = front.speak_tls(tmp_path)
    address = front.address.replace("https://", "https://me:pa55@")
    command = ("supernode.download", "--source", "bundled")
    refused = run(address, *command)
    assert refused.returncode == 1
    assert f"and {front.address} cannot be reached ([SSL: CERTIFICATE_VERIFY_FAILED] " in (
        refused.stderr
    )
    assert "and CA_FILE (its CA)" in refused.stderr
    assert "pa55" not in refused.stderr
    done = run(address, *command, CA_FILE=str(ca))
    assert (done.returncode, done.stderr) == (0, "")
    assert {a.headers.get("authorization") for a in front.asked} == {"Basic bWU6cGE1NQ=="}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_download_says_how_far_it_is(
    served: Path, front: Front, tmp_path: Path, terminal: bool
) -> None:
    """A bar in a terminal, lines elsewhere; nothing of it on stdout."""
    name = f"somebody/large-{terminal}"
    weights = bytes(4 * PIECE_BYTES)
    repository(served, "models", name, {"config.json": b"{}", "model.safetensors": weights})
    front.pause_s = PAUSE_S
    often = "import sys; from supernode import download, progress; progress.EVERY_S = 0.5; "
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal:
        termios.tcsetwinsize(theirs, (24, 80))
    done = subprocess.run(
        [sys.executable, "-c", f"{often}sys.exit(download.main())"], cwd=REPOSITORY, check=True,
        text=True, stdout=subprocess.PIPE, stderr=theirs,
        env=environment(tmp_path, front.address, MODEL_NAME=name),
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
        # On a busy host the data set's few bytes take long enough for a line of their own.
        lines = [line for line in lines if "of 41.9MB" in line]
        assert re.fullmatch(
            r"download: \d+ %, [1-4]\d\.\dM of 41\.9MB, +\d+\.?\d*MB/s, 00:\d\d left", lines[-1]
        )


def test_a_download_that_was_cut_off_is_not_taken_for_a_complete_one(
    mirror: str, run: Command, tmp_path: Path
) -> None:
    assert run(mirror, "supernode.download", "--source", "bundled").returncode == 0
    (note,) = (tmp_path / "cache" / "downloaded").iterdir()
    note.unlink()  # as if it had ended before its last step
    with pytest.raises(PrepareError, match=rf"{MODEL}: not in .*run supernode\.download"):
        model_folder(tmp_path / "cache", MODEL, None)


def test_a_file_that_is_cut_off_goes_on_after_the_pieces_that_came(
    served: Path, front: Front, run: Command, tmp_path: Path
) -> None:
    name, weights = "somebody/cut", bytes(range(256)) * (4 * PIECE_BYTES // 256)
    repository(served, "models", name, {"model.safetensors": weights})
    front.cuts = [PIECE_BYTES * 5 // 2, PIECE_BYTES * 3 // 2]
    done = run(front.address, "supernode.download", "--name", name, "--source", "bundled")
    assert done.returncode == 0, done.stderr
    ranges = [a.headers.get("range") for a in front.asked if a.names("model.safetensors")]
    assert ranges[-2:] == [f"bytes={2 * PIECE_BYTES}-", f"bytes={3 * PIECE_BYTES}-"]
    assert (model_folder(tmp_path / "cache", name, None) / "model.safetensors").read_bytes() == (
        weights
    )


def test_where_a_file_is_always_cut_off_the_whole_ones_are_kept_and_it_begins_anew(
    front: Front, run: Command, tmp_path: Path, tiny_model: Path
) -> None:
    front.cuts = [0] * 100  # until its client gives up
    done = run(front.address, "supernode.download", "--source", "bundled")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"download: ERROR: base model {MODEL}: no folder here, and {front.address}"
    )
    assert line.endswith("run it again, what is whole is kept")
    front.cuts, front.asked = [], []
    assert run(front.address, "supernode.download", "--source", "bundled").returncode == 0
    folder = model_folder(tmp_path / "cache", MODEL, None)
    assert {p.name for p in folder.iterdir()} == {p.name for p in tiny_model.iterdir()}
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_model_that_is_prepared_needs_no_hub(run: Command, tmp_path: Path) -> None:
    command = ("supernode.download", "--name", "somebody/model", "--source", "bundled")
    kept = tmp_path / "models" / "somebody--model-nf4" / "base.json"  # written last
    kept.parent.mkdir(parents=True)
    assert run(DEAD, *command, QUANTIZATION="nf4").returncode == 1
    kept.write_text("{}")  # by an older version: it has to be prepared anew
    assert run(DEAD, *command, QUANTIZATION="nf4").returncode == 1
    kept.write_text('{"sha256": {}}')
    assert run(DEAD, *command, QUANTIZATION="nf4").returncode == 0


def test_files_of_this_host_are_nothing_to_download(run: Command, tmp_path: Path) -> None:
    done = run(DEAD, "supernode.download", "--name", "/data/m", "--source", "/data/d")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to download") == 2
    assert list(tmp_path.iterdir()) == []
