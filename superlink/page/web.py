"""The page over HTTP: only reads, only to whoever asks for this host, and nothing from outside."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from time import time

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from superlink.page import document, prometheus
from superlink.page.runs import UnknownRunError, read_evaluation, run_ids, version

# Another name in a browser's request is that of a page elsewhere, whose owner lets its name lead
# here (DNS rebinding). `page` is the service's own, for a Prometheus beside it.
HOSTS = ("localhost", "127.0.0.1", "[::1]", "page")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
# Of files that others have written: they may look as they like, and do nothing.
_OF_OTHERS = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"}
HTML, PLAIN = "text/html; charset=utf-8", "text/plain; charset=utf-8"


def web(results: Path) -> FastAPI:
    """The application that shows the runs in ``results``."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)  # these load from elsewhere
    app.middleware("http")(_guarded)
    for error in (UnknownRunError, HTTPException):
        app.add_exception_handler(error, _in_one_line)

    @app.get("/")
    def all_runs(request: Request) -> Response:
        seen = "".join(version(results, run_id) for run_id in run_ids(results))
        return _if_changed(request, seen, lambda: document.listed(results))

    @app.get("/runs/{run_id}")
    def one_run(request: Request, run_id: str, beside: str = "") -> Response:
        seen = "".join(version(results, r) for r in (run_id, beside) if r)
        seen += str(len(run_ids(results)))
        return _if_changed(request, seen, lambda: document.served(results, run_id, beside))

    @app.get("/runs/{run_id}/report.html")
    def as_a_file(run_id: str) -> Response:
        page = document.standalone(results, run_id)
        return Response(page, headers={"Content-Security-Policy": _OF_OTHERS}, media_type=HTML)

    @app.get("/runs/{run_id}/evaluation")
    def evaluation(run_id: str) -> Response:
        page = read_evaluation(results, run_id)
        return Response(page, headers={"Content-Security-Policy": _OF_OTHERS}, media_type=HTML)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(prometheus.metrics(results), media_type=prometheus.CONTENT_TYPE)

    @app.get("/{name}")
    def asset(name: str) -> Response:
        if name not in _TYPES:
            raise HTTPException(404)
        return Response((document.ASSETS / name).read_bytes(), media_type=_TYPES[name])

    return app


def _if_changed(request: Request, seen: str, make: Callable[[], str]) -> Response:
    """304 where the asker has what there is. A minute later it is another page: time goes by."""
    tag = f'"{abs(hash((seen, int(time()) // 60))):x}"'
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(make(), headers={"ETag": tag}, media_type=HTML)


async def _guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    host = request.headers.get("host", "").lower()
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    if name not in HOSTS:
        text = f"this page answers to {', '.join(HOSTS)} only; see docs/operator.md, The page\n"
        response = Response(text, 421, media_type=PLAIN)
    else:
        response = await answer(request)
    for header, value in (_HEADERS | {"Content-Security-Policy": _POLICY}).items():
        response.headers.setdefault(header, value)
    return response


def _in_one_line(request: Request, err: Exception) -> Response:
    status = err.status_code if isinstance(err, HTTPException) else 404
    said = "no such page; all runs are at /" if isinstance(err, HTTPException) else str(err)
    return Response(f"{said}\n", status, media_type=PLAIN)
