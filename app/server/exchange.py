"""One message to each of some nodes, and what comes back.

Flower's ``send_and_receive`` believes what a reply says about itself, and lets whatever it cannot
read end the run: one site could end it for all. Here each reply is fetched by the message that it
answers, and what goes wrong with it is that site's failure alone.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from app.server.untrusted import Reason

K = TypeVar("K")
# Between two looks: at least POLL_S, and POLL_EACH_S for every site still waited for, since each is
# asked for by itself. Flower's own is 3 s.
POLL_S, POLL_EACH_S = 1.0, 0.15
NPY_HEADER_BYTES = 128  # that Flower puts in front of an array; framing, not counted
NOBODYS = "0" * 64  # the id of no message
REFUSED = "the SuperLink takes no message for it: its key was revoked or replaced"


def exchange(
    grid: Grid,
    messages: Mapping[K, Message],
    timeout_s: float,
    arrived: Callable[[K, RecordDict], None] = lambda key, content: None,
    turns: Mapping[K, str] | None = None,
) -> tuple[dict[K, RecordDict], dict[K, str]]:
    """Send, then wait for all replies or ``timeout_s``.

    A message lives no longer than it is waited for: then no site gets it any more, and the
    SuperLink takes no reply to it. Asked for it after that, Flower deletes it and says so: what
    the last look brings is no failure of the site.

    Args:
        arrived: called with each reply's key and content as it comes, not only when all are there.
        turns: key -> name of a device. Those that share one work one after the other: ``timeout_s``
            is for each of them, so all are waited for so many times as long.

    Returns:
        The contents of the replies, and why others failed. A key in neither kept silent.

    Raises:
        httpx.HTTPError: the SuperLink itself fails, not only on the reply of one site.
    """
    turn_of = {key: (turns or {}).get(key, key) for key in messages}
    share = Counter(turn_of.values())
    lives_s = {key: timeout_s * share[turn_of[key]] for key in messages}
    started = time.monotonic()
    for key, message in messages.items():
        message.metadata.created_at = datetime.now(UTC).timestamp()  # its life counts from now
        message.metadata.ttl = lives_s[key]
    ids = list(grid.push_messages(list(messages.values())))
    waiting = dict(zip(messages, ids, strict=True))
    failed = {key: REFUSED for key, message_id in waiting.items() if not message_id}
    contents: dict[K, RecordDict] = {}
    late: set[K] = set()
    while True:
        left = waiting.keys() - contents.keys() - failed.keys() - late
        for key in left:
            over = time.monotonic() >= started + lives_s[key]
            reply = _pull(grid, waiting[key])
            if isinstance(reply, RecordDict):
                contents[key] = reply
                arrived(key, reply)
            elif over or (reply is not None and time.monotonic() >= started + lives_s[key]):
                late.add(key)
            elif reply is not None:
                failed[key] = Reason.of(reply)
        left -= contents.keys() | failed.keys() | late
        if not left:
            return contents, failed
        time.sleep(max(POLL_S, POLL_EACH_S * len(left)))


def _pull(grid: Grid, message_id: str) -> RecordDict | str | None:
    """The content of the reply to this message, why there is none, or None if there is none yet."""
    try:
        for reply in grid.pull_messages([message_id]):
            if reply.has_error():
                return reply.error.reason or "error without a reason"
            if not isinstance(reply.content, RecordDict):
                raise TypeError
            return reply.content
    except httpx.HTTPStatusError as err:
        # What Flower answers as well where it cannot read what a site has stored. Only if it can
        # do the same for nobody is it the SuperLink that fails.
        status = err.response.status_code
        if status < 500 or message_id == NOBODYS:
            raise
        _pull(grid, NOBODYS)
        return f"the SuperLink cannot read its reply (HTTP {status})"
    except httpx.HTTPError:
        raise
    except Exception as err:  # whatever Flower makes of what a site has put together
        return f"unreadable reply ({type(err).__name__})"
    return None


def uploaded_bytes(content: RecordDict) -> int:
    """Bytes of a reply's arrays. One that a site gives a thousand names was sent once."""
    records = content.array_records.values()
    arrays = {id(a): a for record in records for a in record.values()}
    return sum(max(len(a.data) - NPY_HEADER_BYTES, 0) for a in arrays.values())
