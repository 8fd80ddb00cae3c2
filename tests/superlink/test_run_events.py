"""The events of a run at the Control port: the lines of its file, and no more than those."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState

from superlink import run_events


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As Flower's handler asks: for run 7, in ``tmp_path``."""
    monkeypatch.setattr(SqlLinkState, "get_task_events", None)
    run_events.install(tmp_path)
    (tmp_path / "7").mkdir()

    def ask(after: int | None = None) -> Any:
        return SqlLinkState.get_task_events(
            object(), run_id=7, task_ids=[1], after_task_event_id=after  # type: ignore[arg-type]
        )  # fmt: skip

    return ask


def test_each_line_comes_once_and_one_without_an_end_when_it_has_it(
    tmp_path: Path, asked: Callable[..., Any]
) -> None:
    assert asked() == []
    file = tmp_path / "7" / "events.jsonl"
    file.write_bytes(b'{"event": "start"}\n{"a": "\xff\r"}\n{"eve')
    first, second = asked()
    assert (first.data, second.data) == ('{"event": "start"}', '{"a": "\ufffd\r"}')
    assert [e.data for e in asked(first.id)] == [second.data]
    assert asked(second.id) == []
    with file.open("ab") as more:
        more.write(b'nt": "ready"}\n')
    assert [e.data for e in asked(second.id)] == ['{"event": "ready"}']


def test_a_link_in_the_place_of_the_file_is_not_followed(
    tmp_path: Path, asked: Callable[..., Any]
) -> None:
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "7" / "events.jsonl").symlink_to(tmp_path / "key")
    assert asked() == []
