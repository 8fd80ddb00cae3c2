"""What happens in a run, for whoever follows it at the Control port: its events.jsonl as it grows.

Flower 1.36 has a call for it, StreamRunEvents, which is allowed, and ends, as that for a run's log;
but in its database only agents have events. Here the lines of the run's file are in their place.
"""

from pathlib import Path
from typing import Any

from flwr.proto.task_pb2 import TaskEvent
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState

from superlink.run_files import read


def install(results: Path) -> None:
    """Let this process's Control API read them below ``results``."""

    def get_task_events(
        _state: Any, *, run_id: int, task_ids: Any = None, after_task_event_id: int | None = None
    ) -> list[TaskEvent]:
        """The lines after that event; the id of one is where it ends in the file."""
        end, found = after_task_event_id or 0, []
        data = read(results / str(run_id), "events.jsonl", end) or b""
        for line in data.split(b"\n")[:-1]:  # behind the last end of one another is on its way
            end += len(line) + 1
            found.append(TaskEvent(id=end, data=line.decode(errors="replace")))
        return found

    SqlLinkState.get_task_events = get_task_events  # type: ignore[assignment, method-assign]
