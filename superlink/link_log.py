"""The log of the SuperLink's processes: one line an event, and colours for a terminal only.

    python -m superlink.link_log PROGRAM …      one of Flower's programs, with such a log

What Flower asks itself every second is no event; ``FLWR_LOG_LEVEL=DEBUG`` shows it.
"""

import logging
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

PROGRAMS = Path(__file__).parent / "bin"  # Flower starts them by their bare names
# Who waits asks these again and again; of a registered key another line says the node's id.
_POLLED = (
    "[Fleet.PullMessages]", "ControlServicer.ListNodes", "ControlServicer.ListRuns",
    "ControlServicer.StreamLogs", "ControlServicer.RegisterNode",
)  # fmt: skip
# A site's check asks whether its key may join (supernode/superlink_check.py), and it may.
_ASKED = "[ApiError:2003]", "Heartbeat interval 0.0 is out of bounds"


def path() -> str:
    """A PATH in which these come first, then Flower's own."""
    ways = str(PROGRAMS), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return os.pathsep.join(ways)


def set_up() -> None:
    """Let this process's log be so."""
    from flwr.supercore import logger as flower

    flower.update_console_handler(colored=sys.stderr.isatty())
    if flower.console_handler.level > logging.DEBUG:
        flower.FLOWER_LOGGER.addFilter(_is_event)
        logging.getLogger("uvicorn.access").addFilter(_failed)


def _is_event(record: logging.LogRecord) -> bool:
    said = str(record.msg)
    return bool(said) and not said.startswith(_POLLED) and not all(part in said for part in _ASKED)


def _failed(record: logging.LogRecord) -> bool:
    """Of a call of the Runtime API; its arguments end with the HTTP status."""
    return not isinstance(record.args, tuple) or int(str(record.args[-1])) >= 400


def main() -> None:
    set_up()
    sys.path[0] = str(Path(sys.executable).parent)  # as Flower's own programs have it
    del sys.argv[0]
    (program,) = entry_points(group="console_scripts", name=sys.argv[0])
    program.load()()


if __name__ == "__main__":
    main()
