"""What a hospital decides while its SuperNode runs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import MessageType
from flwr.supercore.fab import Fab
from flwr.supernode import start_client_internal as flower

from app.site import audit
from supernode import site
from supernode.apps import APPROVED, AppsError, approve, approved, last_refused, note_refused
from supernode.pinned import ANY, app_sha256, install
from tests.supernode.test_pinned import packed

PIN, OTHER = "a" * 64, "b" * 64
APP = packed([("pyproject.toml", b'[project]\nversion = "0.2.0\\u001b[31m"\n'), ("app/x.py", b"1")])


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a site whose folder and pin the environment names."""
    (tmp_path / "site" / "state").mkdir(parents=True)
    monkeypatch.setenv("SITE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("APP_SHA256", PIN)
    monkeypatch.setenv("APPS_SEEN", str(tmp_path / "apps-seen.json"))
    return tmp_path / "site" / "state"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["supernode.site", *words])
    return site.main()


def test_a_pause_stands_until_it_is_ended(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert run(monkeypatch, "pause") == 0
        assert (state / "paused").exists()
    for _ in range(2):
        assert run(monkeypatch, "resume") == 0
        assert not (state / "paused").exists()


def test_a_folder_that_is_no_sites_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SITE_DIR", str(tmp_path))
    assert run(monkeypatch, "pause") == 1
    assert "set SITE_DIR to the site's folder" in capsys.readouterr().err


def test_only_the_app_that_was_refused_last_can_be_approved_and_by_somebody(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "approve", OTHER, "--by", "Dr. Weiss") == 1
    assert "no app was refused here" in capsys.readouterr().err
    note_refused(state, OTHER, "0.2.0", 77)
    for digits in (PIN, "b" * 11, ""):
        assert run(monkeypatch, "approve", digits, "--by", "Dr. Weiss") == 1
        assert OTHER in capsys.readouterr().err
    assert run(monkeypatch, "approve", OTHER, "--by", " \n") == 1
    assert approved(state) == []
    assert run(monkeypatch, "approve", "b" * 12, "--by", "Dr. Weiss") == 0
    assert run(monkeypatch, "approve", OTHER, "--by", "Dr. Rot") == 0  # once is enough
    (entry,) = approved(state)
    assert (entry["sha256"], entry["version"], entry["by"]) == (OTHER, "0.2.0", "Dr. Weiss")
    capsys.readouterr()
    assert run(monkeypatch, "apps") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"pinned    {PIN}"
    assert said[1].startswith(f"approved  {OTHER}  version 0.2.0, by Dr. Weiss, 20")
    assert said[2].startswith(f"refused   {OTHER}  version 0.2.0, in run 77, 20")
    monkeypatch.setenv("ALLOW_APP_UPDATES", "1")
    assert run(monkeypatch, "apps") == 0
    assert (
        "WARNING: ALLOW_APP_UPDATES=1: whatever app a run brings is run" in capsys.readouterr().out
    )


@pytest.mark.parametrize("text", ["[{}]", "{", "[1]", '{"sha256": "x"}'])
def test_a_damaged_list_approves_nothing_and_is_named(state: Path, text: str) -> None:
    (state / APPROVED).write_text(text)
    note_refused(state, OTHER, "", 1)
    with pytest.raises(AppsError, match=r"approved-apps\.json is no list of approved apps"):
        approve(state, OTHER, "x")


class Arriving:
    """Flower's receiving of a message, as the SuperNode calls it: fetch the app, then verify it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pin: str, state: Path) -> None:
        for name in ("_pull_and_store_message", "_verify_fab", "FAB_VERIFICATION_ERROR"):
            monkeypatch.setattr(flower, name, getattr(flower, name))  # to be put back
        monkeypatch.setattr(flower, "_pull_and_store_message", self._receive)
        install(pin, "site-07", state)

    def _receive(self, receive: Any, get_fab: Any, trusted_entities: Any) -> bool:
        receive()
        return flower._verify_fab(get_fab("hash", 77), trusted_entities)

    def allowed(self, fab: bytes) -> bool:
        arrived = SimpleNamespace(metadata=SimpleNamespace(message_type=MessageType.QUERY))
        receive: Any = flower._pull_and_store_message
        return bool(
            receive(
                receive=lambda: (arrived, None),
                get_fab=lambda fab_hash, run_id: Fab(fab_hash, fab, {}),
                trusted_entities=None,
            )
        )


def test_a_refused_app_is_noted_and_once_approved_it_is_run(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node, sha256 = Arriving(monkeypatch, PIN, state), app_sha256(APP)
    assert not node.allowed(APP)
    assert f"supernode: ERROR: app {sha256[:12]} refused: site-07 runs" in capsys.readouterr().out
    assert last_refused(state) == (last_refused(state) or {}) | {
        "sha256": sha256, "version": "0.2.0 [31m", "run": "77",
    }  # fmt: skip
    (line,) = map(json.loads, (state / "audit.jsonl").read_text().splitlines())
    assert (line["kind"], line["run"], line["app"]) == ("query", "77", sha256)
    assert line["outcome"] == audit.REFUSED
    assert line["reason"].startswith("site-07 runs app aaaaaaaaaaaa only")
    approve(state, sha256, "Dr. Weiss")
    assert node.allowed(APP)
    assert json.loads((state.parents[1] / "apps-seen.json").read_text()) == {"77": sha256}
    assert not node.allowed(packed([("app/x.py", b"2")]))
    (state / APPROVED).write_text("damaged")
    assert not node.allowed(APP)


def test_what_is_no_app_can_neither_be_approved_nor_run(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Arriving(monkeypatch, PIN, state)
    note_refused(state, "", "", 1)
    (state / APPROVED).write_text(
        json.dumps([{"sha256": "", "version": "", "by": "x", "time": "x"}])
    )
    assert not node.allowed(b"no zip")


def test_where_any_app_is_run_each_is_named_loudly(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = Arriving(monkeypatch, ANY, state)
    assert node.allowed(APP)
    said = capsys.readouterr().out
    assert said.startswith("supernode: WARNING: ALLOW_APP_UPDATES=1 is set: no app is checked")
    assert app_sha256(APP)[:12] in said
