"""The operator's record: every act is in it before its answer, also those that failed."""

import json
import os
import re
import stat
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from superlink.audit import AuditError, recorded
from superlink.provision import main
from tests.full_disk import full_disk
from tests.samples import REPOSITORY

FIELDS = ["schema", "time", "act", "subject", "app", "by", "outcome", "reason"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_a_line_has_all_its_fields_whatever_became_of_the_act(tmp_path: Path) -> None:
    with recorded(tmp_path / "audit", "rotate", "site-07", "me") as line:
        line["app"] = "ab"
    with pytest.raises(ValueError, match="why"), recorded(tmp_path / "audit", "a", "b", "c"):
        raise ValueError("why\n\x1b[31mnot")
    with pytest.raises(KeyboardInterrupt), recorded(tmp_path / "audit", "a", "b", "c"):
        raise KeyboardInterrupt
    done, failed, left = lines(tmp_path / "audit")
    assert list(done) == list(failed) == list(left) == FIELDS
    time = datetime.fromisoformat(done.pop("time"))
    assert abs((datetime.now(UTC) - time).total_seconds()) < 3600
    assert list(done.values()) == [1, "rotate", "site-07", "ab", "me", "done", None]
    assert (failed["outcome"], failed["reason"]) == ("failed", "why [31mnot")
    assert (left["outcome"], left["reason"]) == ("failed", "KeyboardInterrupt")
    assert stat.S_IMODE((tmp_path / "audit" / "audit.jsonl").stat().st_mode) == 0o600


def test_the_page_for_operators_has_every_field_and_lines_that_have_them() -> None:
    page = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
    section = page[page.index("## Record of acts") : page.index("## Certificates and keys")]
    told = [
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.M)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert told == FIELDS
    shown = [json.loads(x) for x in section.splitlines() if x.startswith("{")]
    assert len(shown) >= 5
    assert all(list(x) == told for x in shown)


def test_an_act_that_cannot_be_recorded_fails_and_earlier_lines_stay(tmp_path: Path) -> None:
    with recorded(tmp_path, "a", "b", "c"):
        pass
    size = (tmp_path / "audit.jsonl").stat().st_size
    with (
        full_disk(size + 20),
        pytest.raises(AuditError, match=r"audit\.jsonl: .*; AUDIT_DIR"),
        recorded(tmp_path, "a", "b", "c"),
    ):
        pass
    assert (tmp_path / "audit.jsonl").stat().st_size == size
    assert len(lines(tmp_path)) == 1


def test_a_line_that_a_power_cut_has_torn_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_text('{"v": 1, "ti')
    for _ in range(2):
        with recorded(tmp_path, "a", "b", "c"):
            pass
    torn, *others = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert torn == '{"v": 1, "ti'
    assert [json.loads(line)["act"] for line in others] == ["a", "a"]


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    def write(name: str) -> None:
        for _ in range(20):
            with recorded(tmp_path, name * 3000, "", ""):
                pass

    writers = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(line["act"][0] for line in lines(tmp_path)) == sorted("abcd" * 20)


def test_the_commands_of_provision_are_recorded_and_looking_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AUDIT_DIR", raising=False)
    federation = tmp_path / "federation"

    def call(*words: str) -> int:
        given = ["superlink.provision", "--federation", str(federation), "--sites", "2", *words]
        monkeypatch.setattr(sys, "argv", given)
        return main()

    assert call() == call("show") == call("rotate", "site-01") == call("revoke", "site-00") == 0
    assert call("revoke", "site-00") == 1
    assert call("renew") == call("reset") == 0
    said = capsys.readouterr().err
    record = lines(federation / "audit")
    assert [(x["act"], x["subject"], x["outcome"]) for x in record] == [
        ("provision", "2 sites", "done"), ("rotate", "site-01", "done"),
        ("revoke", "site-00", "done"), ("revoke", "site-00", "failed"),
        ("renew", "2 sites", "done"), ("reset", "2 sites", "done"),
    ]  # fmt: skip
    assert record[3]["reason"] == said.strip().removeprefix("provision: ")
    assert {x["by"] for x in record} == {"superlink.provision"}
    federation = tmp_path / "mistyped"
    assert call("revoke", "site-00") == 1
    assert not federation.exists()
    monkeypatch.setenv("AUDIT_DIR", str(tmp_path / "elsewhere"))
    federation = tmp_path / "federation"
    assert call("rotate", "site-01") == 0
    assert [x["act"] for x in lines(tmp_path / "elsewhere")] == ["rotate"]
    # Where no line can be written, whoever did it is told.
    (tmp_path / "elsewhere" / "audit.jsonl").unlink()
    os.mkfifo(tmp_path / "elsewhere" / "audit.jsonl")
    assert call("rotate", "site-01") == 1
    assert "the act is not recorded" in capsys.readouterr().err
