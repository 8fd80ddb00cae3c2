"""What the SuperLink is asked for at its Control port is recorded: see superlink.audit.

The only place that sees it all: also what flwr does, and what somebody does with nothing of ours.
Questions are no acts.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.superlink.servicer.control.control_servicer import ControlServicer

from superlink import audit
from superlink.site_keys import fingerprint_of_pem

_QUESTIONS = ("List", "Get", "Show", "Stream", "Pull")
ACTS = {
    "StartRun": "submit", "StopRun": "stop",
    "RegisterNode": "register", "UnregisterNode": "unregister",
}  # fmt: skip


def install(folder: Path) -> None:
    """Let this process's Control API record into ``folder``/audit.jsonl.

    Raises:
        SystemExit: that folder cannot be written.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise SystemExit(
            f"superlink: AUDIT_DIR={folder} cannot be written by user {os.getuid()}; change its "
            "owner or set another folder"
        )
    for name, method in list(vars(ControlServicer).items()):
        if name[0].isupper() and not name.startswith(_QUESTIONS):
            setattr(ControlServicer, name, _recording(folder, name, method))


def _recording(folder: Path, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def asked(self: Any, request: Any, context: Any) -> Any:
        act, by = ACTS.get(name, name), context.peer()
        with audit.recorded(folder, act, _subject(self, request), by) as line:
            if name == "StartRun":
                line["app"] = hashlib.sha256(request.fab.content).hexdigest()
            reply = method(self, request, context)
            if name == "StartRun" and reply.run_id:
                line["subject"] = f"run {reply.run_id}"
            elif name == "StartRun":  # so Flower says that the app or its config is no good
                line |= {"outcome": audit.FAILED, "reason": "Flower has started no run"}
        return reply

    return asked


def _subject(servicer: Any, request: Any) -> str:
    """What a request names: a run, or a key."""
    key = getattr(request, "public_key", b"")
    if node_id := getattr(request, "node_id", 0):
        nodes = servicer.linkstate_factory.state().get_node_info(node_ids=[node_id])
        key = nodes[0].public_key if nodes else b""
    try:
        return fingerprint_of_pem(key) if key else _numbered(request, node_id)
    except ValueError:
        return "not a key"


def _numbered(request: Any, node_id: int) -> str:
    run_id = getattr(request, "run_id", 0)
    return f"node {node_id}" if node_id else f"run {run_id}" if run_id else ""
