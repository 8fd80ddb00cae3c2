"""One message to each of some nodes, and what comes back.

Flower's ``send_and_receive`` believes what a reply says about itself, and lets whatever it cannot
read end the run: one site could end it for all. Here each reply is fetched by the message that it
answers, and what goes wrong with it is that site's failure alone.
"""

import time
from collections.abc import Mapping
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

K = TypeVar("K")
# Between two looks: at least POLL_S, and POLL_EACH_S for every site still waited for, since each is
# asked for by itself. Flower's own is 3 s.
POLL_S, POLL_EACH_S = 1.0, 0.15
REFUSED = "the SuperLink takes no message for it: its key was revoked or replaced"


def exchange(
    grid: Grid,
    messages: Mapping[K, Message],
    timeout_s: float,
    turns: Mapping[K, str] | None = None,
) -> tuple[dict[K, RecordDict], dict[K, str]]:
    """Send, then wait for all replies or ``timeout_s``.

    Args:
        turns: key -> name of a device that several sites share. They work one after the other, so
            ``timeout_s`` counts anew from each reply of one of them.

    Returns:
        The contents of the replies, and why others failed. A key in neither kept silent.

    Raises:
        httpx.HTTPError: the SuperLink itself fails.
    """
    ids = list(grid.push_messages(list(messages.values())))
    waiting = dict(zip(messages, ids, strict=True))
    failed = {key: REFUSED for key, message_id in waiting.items() if not message_id}
    contents: dict[K, RecordDict] = {}
    shared = {key: (turns or {}).get(key) or key for key in waiting}
    since = dict.fromkeys(shared.values(), time.monotonic())
    late: set[K] = set()
    while True:
        left = waiting.keys() - contents.keys() - failed.keys() - late
        for key in left:
            reply = _pull(grid, waiting[key])
            if isinstance(reply, RecordDict):
                contents[key] = reply
            elif reply is not None:
                failed[key] = one_line(reply)
            if reply is not None:
                since[shared[key]] = time.monotonic()
        left -= contents.keys() | failed.keys()
        late |= {key for key in left if time.monotonic() >= since[shared[key]] + timeout_s}
        left -= late
        if not left:
            return contents, failed
        time.sleep(max(POLL_S, POLL_EACH_S * len(left)))


def one_line(text: str) -> str:
    """What a site says, fit for a log: it may write what it likes, and as much."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:500]


def _pull(grid: Grid, message_id: str) -> RecordDict | str | None:
    """The content of the reply to this message, why there is none, or None if there is none yet."""
    try:
        for reply in grid.pull_messages([message_id]):
            if reply.has_error():
                return reply.error.reason or "error without a reason"
            if not isinstance(reply.content, RecordDict):
                raise TypeError
            return reply.content
    except httpx.HTTPError:
        raise
    except Exception as err:  # whatever Flower makes of what a site has put together
        return f"unreadable reply ({type(err).__name__})"
    return None
