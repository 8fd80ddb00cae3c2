"""What a hospital decides while its SuperNode runs."""

import json
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory

from app.site import audit
from supernode import site
from supernode.apps import (
    APPROVED,
    AppsError,
    approve,
    approved,
    last_refused,
    note_refused,
    withdraw,
    withdrawn,
)  # fmt: skip
from supernode.pinned import ANY, app_sha256, install
from tests.supernode.test_pinned import packed

PIN, OTHER = "a" * 64, "b" * 64
PROJECT = b"""
[project]
name = "app"
version = "0.2.0\\u001b[31m"
[tool.flwr.app]
publisher = "x"
components = {serverapp = "app.x:server", clientapp = "app.x:client"}
"""
APP = packed([("pyproject.toml", PROJECT), ("app/x.py", b"1")])


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


def test_only_what_is_approved_can_be_withdrawn_and_by_somebody(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        assert run(monkeypatch, *words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert f"'{OTHER}' does not begin the SHA-256 of one approved app (none)" in said(
        "withdraw", OTHER, "--by", "Dr. Rot"
    )
    note_refused(state, OTHER, "0.2.0", 77)
    assert run(monkeypatch, "approve", OTHER, "--by", "Dr. Weiss") == 0
    for digits in ("c" * 64, "b" * 11, "b" * 12 + "c", ""):
        assert f"approved app ({OTHER}); give 12 digits" in said("withdraw", digits, "--by", "x")
    assert "is the app that this site is pinned to" in said("withdraw", PIN[:12], "--by", "x")
    assert "the name of who withdraws it is needed" in said("withdraw", OTHER, "--by", " ")
    assert len(approved(state)) == 1
    capsys.readouterr()
    assert run(monkeypatch, "withdraw", "b" * 12, "--by", "Dr. Rot") == 0
    assert capsys.readouterr().out == (
        f"withdrawn: app {OTHER} is not run from the next message on\n"
    )
    assert approved(state) == []
    assert "(none)" in said("withdraw", OTHER, "--by", "Dr. Rot")
    assert run(monkeypatch, "apps") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["pinned", "withdrawn", "refused"]
    assert shown[1].startswith(f"withdrawn {OTHER}  version 0.2.0, by Dr. Rot, 20")
    # Approved anew it is the one that runs; who said what before is still in the file.
    assert run(monkeypatch, "approve", OTHER, "--by", "Dr. Weiss") == 0
    (entry,) = approved(state)
    assert (entry["sha256"], entry["by"], withdrawn(state)) == (OTHER, "Dr. Weiss", [])
    assert [x["by"] for x in json.loads((state / APPROVED).read_text())] == [
        "Dr. Weiss", "Dr. Rot", "Dr. Weiss",
    ]  # fmt: skip


def test_whoever_withdraws_hears_that_any_app_is_run(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note_refused(state, OTHER, "0.2.0", 77)
    approve(state, OTHER, "x")
    monkeypatch.setenv("ALLOW_APP_UPDATES", "1")
    assert run(monkeypatch, "withdraw", OTHER, "--by", "x") == 0
    assert "WARNING: ALLOW_APP_UPDATES=1" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[{}]", "{", "[1]", '{"sha256": "x"}', '[{"withdrawn": "x"}]'])
def test_a_damaged_list_approves_nothing_and_is_named(state: Path, text: str) -> None:
    (state / APPROVED).write_text(text)
    note_refused(state, OTHER, "", 1)
    said = r"approved-apps\.json is no list of approved apps"
    with pytest.raises(AppsError, match=said):
        approve(state, OTHER, "x")
    with pytest.raises(AppsError, match=said):
        withdraw(state, OTHER, "x", PIN)


class Arriving:
    """Flower's SuperNode, as far as a message that arrives is taken up or refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pin: str, state: Path) -> None:
        for name in ("_pull_and_store_message", "_verify_fab", "FAB_VERIFICATION_ERROR"):
            monkeypatch.setattr(flower, name, getattr(flower, name))  # to be put back
        install(pin, "site-07", state)
        objects = ObjectStoreFactory()
        self.node, self.objects = NodeStateFactory(objects).state(), objects.store()
        self.node.set_node_id(7)

    def allowed(self, fab: bytes, run: int = 77) -> bool:
        """A message of this run comes, whose app this is: whether the ClientApp is given it."""
        message = Message(RecordDict(), dst_node_id=7, message_type=MessageType.QUERY)
        message.metadata.__dict__["_run_id"] = run
        message.metadata.__dict__["_message_id"] = message.object_id
        sent = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
        flower._pull_and_store_message(
            state=self.node,
            object_store=self.objects,
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=Run.create_empty,
            get_fab=lambda fab_hash, _: Fab(fab_hash, fab, {}),
            pull_object=lambda _, key: sent[key],
            confirm_message_received=lambda *_: None,
            trusted_entities=None,
        )
        replies = self.node.get_messages(is_reply=True)
        return message.metadata.message_id not in {m.metadata.reply_to_message_id for m in replies}


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
    assert not node.allowed(packed([("app/x.py", b"2")]), run=78)
    (state / APPROVED).write_text("damaged")
    assert not node.allowed(APP)


def test_a_withdrawn_app_is_not_run_from_the_next_message_of_its_run_on(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, sha256 = Arriving(monkeypatch, PIN, state), app_sha256(APP)
    note_refused(state, sha256, "", 1)
    approve(state, sha256, "Dr. Weiss")
    assert node.allowed(APP)
    assert node.allowed(APP)
    withdraw(state, sha256, "Dr. Rot", PIN)
    assert not node.allowed(APP)
    (line,) = map(json.loads, (state / "audit.jsonl").read_text().splitlines())
    assert (line["app"], line["outcome"]) == (sha256, audit.REFUSED)
    assert not node.allowed(APP, run=78)
    approve(state, sha256, "Dr. Weiss")
    assert node.allowed(APP)


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
