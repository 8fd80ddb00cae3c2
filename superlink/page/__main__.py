"""Show the runs in a browser, or write one as a file.

    python -m superlink.page                     serve it
    python -m superlink.page report RUN_ID       write results/<run-id>/report.html

| variable    | default    | what                                                               |
|-------------|------------|--------------------------------------------------------------------|
| RESULTS_DIR | (required) | the runs; only read, but for `report`                              |
| PAGE_HOST   | 127.0.0.1  | address to listen on (HTTP, no login: keep it on the loopback)     |
| PAGE_PORT   | 9080       | its port                                                           |
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import uvicorn

from superlink.page.document import write_standalone
from superlink.page.runs import UnknownRunError
from superlink.page.web import web


def _listening(host: str, port: str) -> socket.socket:
    """Raises SystemExit: nobody can listen there."""
    if not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise SystemExit(f"page: ERROR: PAGE_PORT={port}: a port is a number from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family)
    except OSError as err:
        raise SystemExit(
            f"page: ERROR: PAGE_HOST={host}, PAGE_PORT={port}: cannot listen there: {err.strerror}"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.page", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("report", help="write one run's page as a file").add_argument("run_id")
    args = parser.parse_args()
    results = Path(os.environ.get("RESULTS_DIR", ""))
    if not os.environ.get("RESULTS_DIR") or not results.is_dir():
        raise SystemExit(f"page: ERROR: RESULTS_DIR={results} is no folder; set it to the results")
    if args.command == "report":
        try:
            print(write_standalone(results, args.run_id))
        except UnknownRunError:
            raise SystemExit(f"page: ERROR: no run {args.run_id!r} in {results}") from None
        except OSError as err:
            raise SystemExit(f"page: ERROR: {results / args.run_id}: {err.strerror}") from None
        return 0
    host, port = os.environ.get("PAGE_HOST", "127.0.0.1"), os.environ.get("PAGE_PORT", "9080")
    listening = _listening(host, port)
    print(f"page: http://localhost:{port}/ shows the runs in {results}", flush=True)
    config = uvicorn.Config(
        web(results), log_level="warning", access_log=False, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
