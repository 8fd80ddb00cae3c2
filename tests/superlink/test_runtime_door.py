"""The Runtime port of the pinned Flower answers what a ServerApp needs, and nothing else."""

import asyncio
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from flwr.superlink import main

from superlink import runtime_door
from superlink.runtime_door import SERVED


def post(app: Any, path: str) -> tuple[int, str]:
    """Status and text of the answer to an empty protobuf request, with the path as it is."""
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "root_path": "",
        "path": unquote(path),  # as uvicorn has it
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"content-type", b"application/protobuf")],
    }
    sent: list[dict[str, Any]] = []
    coming = [{"type": "http.request", "body": b""}]

    async def receive() -> dict[str, Any]:
        return coming.pop() if coming else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    with suppress(Exception):  # sent as a 500 before
        asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent).decode(errors="replace")


def paths(app: Any) -> set[str]:
    routes = [context.route for context in iter_route_contexts(app.routes)]
    return {r.path for r in routes if isinstance(r, APIRoute)} | {"/docs", "/openapi.json"}


@pytest.fixture(scope="module")
def bare() -> Any:
    """Flower's own app, of the version that is installed."""
    return main.create_app()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(main, "create_app", main.create_app)  # to be as it was afterwards
    runtime_door.install()
    return main.create_app()


def test_flower_serves_its_control_api_there_to_whoever_comes(bare: Any) -> None:
    """Or the door is not needed any more."""
    control = {p for p in paths(bare) if p.startswith("/v1/control/")}
    assert {"/v1/control/start-run", "/v1/control/register-node"} <= control
    assert post(bare, "/v1/control/list-nodes")[0] == 200  # no login, no token


def test_behind_the_door_is_what_a_serverapp_needs(bare: Any, guarded: Any) -> None:
    assert paths(bare) >= SERVED  # Flower still calls them so
    for path in paths(bare):
        assert (post(guarded, path)[0] == 404) == (path not in SERVED), path


@pytest.mark.parametrize(
    "path",
    [
        "/v1/runtime/../control/list-nodes",
        "/v1/runtime/get-nodes/../../control/list-nodes",
        "//v1/control/list-nodes",
        "/v1/control/list-nodes/",
        "/v1/control/list-nodes?x=/v1/runtime/get-nodes",
        "/v1/%63ontrol/list-nodes",
        "/v1/runtime/get-nodes%2f..%2f..%2fcontrol%2flist-nodes",
        "/V1/CONTROL/LIST-NODES",
    ],
)
def test_no_spelling_of_a_control_route_gets_through(guarded: Any, path: str) -> None:
    assert post(guarded, path) == (404, "not served here\n")


def test_a_refusal_is_one_line_whatever_the_path(
    guarded: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    post(guarded, "/v1/control/%1b[31m%0aforged" + "x" * 500)
    lines = [r.getMessage() for r in caplog.records] or capsys.readouterr().err.splitlines()
    (line,) = [x for x in lines if "Runtime API: refused" in x]
    assert "\\x1b[31m\\nforged" in line
    assert len(line) < 250
