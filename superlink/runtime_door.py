"""What the SuperLink's Runtime port answers: what a ServerApp needs, and nothing else.

Flower 1.36 serves its Control API on that port as well, to whoever reaches it: registering nodes,
starting runs, and automations that start more of them later. A ServerApp is code that somebody has
submitted, and it reaches this port.
"""

from logging import WARNING
from typing import Any

from flwr.common.logger import log
from flwr.superlink import main
from starlette.responses import PlainTextResponse

SERVED = frozenset(
    f"/v1/runtime/{name}"
    for name in (
        # of flower-superexec, which shows a secret
        "pull-pending-tasks",
        "claim-task",
        # of a ServerApp, which shows its run's token
        "pull-task-input",
        "push-task-output",
        "send-task-heartbeat",
        "push-logs",
        "get-nodes",
        "push-messages",
        "pull-messages",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)


def install() -> None:
    """Put the door before the app that Flower makes; before ``flower_superlink`` is called."""
    create = main.create_app

    def create_app(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        app.add_middleware(RuntimeDoor)
        return app

    main.create_app = create_app


class RuntimeDoor:
    """ASGI middleware: 404 for every path that is not in SERVED."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"] in SERVED:
            await self.app(scope, receive, send)
            return
        log(WARNING, "Runtime API: refused %s", ascii(scope["path"][:100]))
        await PlainTextResponse("not served here\n", 404)(scope, receive, send)
