"""The site's gate: each message that comes in, and each reply that goes out, passes here.

In: the site's policy is asked. Out: no text of the site's data, and a line in its audit file
before anything leaves; with an error the last lines of the log, where the policy lets errors out.
"""

import json
import logging
import os
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from app.config import ConfigError
from app.site import audit
from app.site.last_lines import LastLines, places, travels
from app.site.partition import SiteError
from app.site.policy import Policy, PolicyFileError, RefusedError
from app.wire.failure import joined

logger = logging.getLogger("app")
Work = Callable[[Message, Context, "Visit"], RecordDict]
Failed = Callable[[Context, str], RecordDict | None]
WITHHELD = "the site keeps its errors to itself (error-lines in its policy.toml); its log has this"
UNUSABLE = "the site's policy.toml cannot be used; its log says why"


class Visit:
    """One message at this site: the policy that it meets, and its line of the audit file."""

    def __init__(self, message: Message, context: Context, site: Path) -> None:
        self.state = site / "state"
        self.policy = Policy(error_lines=False)  # until it has been read: nobody knows what it says
        kind = message.metadata.message_type
        self.line = audit.entry(context.run_id, _app(context.run_id), kind)

    def note(self, **facts: Any) -> None:
        """Of the fields of ``audit.entry``."""
        self.line |= facts

    def enter(self, message: Message, site: Path) -> None:
        """Read the policy. Raises SiteError: it cannot be used, or the time is none for this."""
        self.note(bytes_received=_size(message.content))
        if job := message.content.config_records.get("job"):
            stated = job.get("round")
            self.note(round=stated if type(stated) is int else None)  # a run may state anything
        self.policy = Policy.read(site)
        self.note(policy=self.policy.sha256)
        paused = self.state / "paused"  # supernode/site.py
        if paused.exists():
            since = datetime.fromtimestamp(paused.stat().st_mtime, UTC)
            raise RefusedError(f"the site has paused, since {since:%Y-%m-%d %H:%M} UTC")
        now, kinds = datetime.now(UTC), []
        if self.policy.counts_by_day:
            lines = audit.since(self.state, self.policy.day(now))
            kinds = [line["kind"] for line in lines if line["outcome"] != audit.REFUSED]
        self.policy.check_day(now, self.line["kind"], kinds)

    def told(self, err: Exception, lines: Iterable[str] = ()) -> str:
        """What others hear of an error: worded by us, or its type alone, if the policy allows.

        A library's message may quote what it was given: a row of this site. Its type and the
        places in the code are enough to find the fault. ``lines``: the last of the log, which go
        with it.
        """
        if isinstance(err, PolicyFileError):
            logger.error("ERROR: %s", err)
            self.note(reason=str(err))
            return UNUSABLE
        if isinstance(err, SiteError | ConfigError | audit.AuditError):
            told = str(err)
        else:
            frames = "".join(traceback.format_tb(err.__traceback__))
            logger.error("%s in\n%s", type(err).__name__, frames, extra=travels(places(err)))
            told = f"{type(err).__name__} (the site's log says where)"
            if type(err).__name__ == "OutOfMemoryError":
                told += "; lower train.max-tokens-per-pass"
        logger.error("ERROR: %s", told)
        self.note(reason=told)
        if isinstance(err, RefusedError):  # no error: who runs the federation has to know the rule
            return told
        return joined(told, lines) if self.policy.error_lines else WITHHELD

    def leave(self, content: RecordDict | None, err: Exception | None) -> None:
        """Put the line into the audit file. Raises SiteError: it is not on the disk."""
        refused = isinstance(err, RefusedError)
        outcome = audit.REFUSED if refused else audit.FAILED if err else audit.SENT
        self.note(outcome=outcome, bytes_sent=_size(content))
        try:
            audit.append(self.state, self.line)
        except OSError as cause:
            raise SiteError(
                f"nothing leaves the site: state/{audit.FILE} cannot be written: {cause.strerror}"
            ) from None


def guarded(failed: Failed = lambda *_: None) -> Callable[[Work], Callable[..., Message]]:
    """Make a handler of Flower's out of one that gives a reply's content.

    Args:
        failed: the content of a reply that says why there is no other; None: Flower's error.
    """

    def decorate(work: Work) -> Callable[..., Message]:
        def handler(message: Message, context: Context) -> Message:
            site = Path(os.environ["SITE_DIR"])
            visit, error, told = Visit(message, context, site), None, ""
            content: RecordDict | None
            with LastLines() as last:
                try:
                    visit.enter(message, site)
                    content = work(message, context, visit)
                except Exception as err:
                    error, told = err, visit.told(err, last.kept)
                    content = failed(context, told)
            try:
                visit.leave(content, error)
            except SiteError as err:
                told = visit.told(err)
                content = failed(context, told)
            if content is None:
                raise SiteError(told)
            return Message(content, reply_to=message)

        return handler

    return decorate


class GuardedApp(ClientApp):
    """A ClientApp whose gate is met by messages of any type, also those that it has no handler for.

    Flower's own would send an error of its own for them, and take ``train.default`` for ``train``.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        known = message.metadata.message_type in audit.KINDS
        return super().__call__(message, context) if known else _not_answered(message, context)


@guarded()
def _not_answered(message: Message, context: Context, visit: Visit) -> RecordDict:
    raise RefusedError(f"the site answers messages of the types {', '.join(audit.KINDS)} only")


def _size(content: RecordDict | None) -> int:
    """Bytes of what a message holds: adapter, figures, settings; without framing and TLS."""
    return sum(record.count_bytes() for record in content.values()) if content else 0


def _app(run_id: int) -> str:
    """SHA-256 of the run's app, as this SuperNode has checked it (supernode/pinned.py)."""
    try:
        return str(json.loads(Path(os.environ["APPS_SEEN"]).read_text())[str(run_id)])
    except (KeyError, OSError, ValueError):
        return "unknown"
