"""A ClientApp that ends without having said so is missed at once.

Flower 1.36 waits a minute for its next heartbeat. SuperExec, whose child it is, knows better, and
leaves a file of the ClientApp's token in the SuperNode's own folder; the SuperNode then takes the
minute for over, and what follows is Flower's own: the order is answered with an error. (With
WARM_S=0 SuperExec is Flower's, and tells nobody.)

Nor does Flower wait more than 30 s for one that has been started to say so; then it starts another
for the same order. On a busy host it may take longer, and the others make the host busier: 50 sites
of one host had 304 of them when its memory was full. So each gets ``STARTS_IN_S``, unless it is
known to have ended.
"""

import hashlib
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, Status

STARTS_IN_S = 300
_MORE = timedelta(seconds=STARTS_IN_S - HEARTBEAT_DEFAULT_INTERVAL)
_PREFIX = "lost-"
_OVER = datetime(1970, 1, 1, tzinfo=UTC)


def tell(folder: Path, token: str) -> None:
    """SuperExec's part: the ClientApp of this token has ended, and not with 0."""
    with suppress(OSError):  # a full disk: then it takes the minute
        (folder / _file(token)).touch(mode=0o600)


def _file(token: str) -> str:
    return _PREFIX + hashlib.sha256(token.encode()).hexdigest()  # a token is too long for a name


def install(folder: Path) -> None:
    """Let this process's SuperNode look for it."""
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    claim = InMemoryNodeState.claim_task
    expire = InMemoryNodeState._cleanup_expired_task_tokens_locked

    def claim_for_longer(state: InMemoryNodeState, task_id: int) -> str | None:
        token = claim(state, task_id)
        with state.lock_task_store:
            if token in state.task_token_to_task_id:
                state.task_token_store[task_id].active_until += _MORE
        return token

    def expire_lost_too(state: InMemoryNodeState) -> None:
        told = {path.name: path for path in folder.glob(f"{_PREFIX}*")}
        # Of one that has said how it ended, Flower no longer knows the token; and it starts one
        # anew, in its own time, that has not come as far as running.
        for token, number in state.task_token_to_task_id.items():
            if _file(token) not in told:
                continue
            if state.task_store[number].status.status == Status.RUNNING:
                state.task_token_store[number].active_until = _OVER
            else:
                state.task_token_store[number].active_until -= _MORE
        for path in told.values():
            path.unlink(missing_ok=True)
        expire(state)

    InMemoryNodeState.claim_task = claim_for_longer  # type: ignore
    InMemoryNodeState._cleanup_expired_task_tokens_locked = expire_lost_too  # type: ignore
