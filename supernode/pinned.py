"""Flower's SuperNode, but it runs no other app than this site was given, or has approved.

    python -m supernode.pinned run SHA256|any SITE [flower-supernode's flags]
    python -m supernode.pinned hash FOLDER     the SHA-256 of the app of a checkout

A run brings its own Python code (the FAB), and Flower 1.36 runs whatever comes, unless it is
signed in Flower's hub. Its check of signatures is used here for a check of the app's SHA-256:
the site answers with Flower's own "invalid FAB" error, and no line of the code is run. It is of
names and contents, not of the zip: that differs by the system and the zlib which made it.
"""

import hashlib
import io
import json
import os
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ANY = "any"  # in the place of the SHA-256
UNCHECKED = "ALLOW_APP_UPDATES=1 is set: no app is checked, and one may heed no policy.toml"
MOST_BYTES = 64 << 20  # unpacked


def app_sha256(fab: bytes) -> str:
    """Of the names and contents in a FAB; empty if it is none, or a name is there twice."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
            names = {entry.filename for entry in entries}
            if len(names) < len(entries) or sum(e.file_size for e in entries) > MOST_BYTES:
                return ""
            for entry in entries:
                content = hashlib.sha256(archive.read(entry)).hexdigest()
                digest.update(f"{entry.filename}\0{content}\n".encode())
    except Exception:  # zipfile and its four decoders raise more than they say
        return ""
    return digest.hexdigest()


def install(pinned: str, site: str, state: Path) -> None:
    """Let this process's SuperNode accept the app of this SHA-256 only, and those approved.

    Of each message: an approval may be withdrawn while a run goes on. With ANY it accepts every
    app, and says so of each. ``state``: the site's; APPS_SEEN names the file that tells the
    ClientApps which app a run brought.
    """
    from flwr.app import Error
    from flwr.common.constant import ErrorCode
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower

    refusal = (
        f"{site} runs app {pinned[:12]} only, and this run brings another; the site's operator "
        "installs its version, or looks at it and approves it (python -m supernode.site), or sets "
        "ALLOW_APP_UPDATES=1 to run whatever comes"
    )
    receive = flower._pull_and_store_message
    run_id, kind = 0, ""
    seen: dict[str, str] = {}

    def receive_pinned(**given: Any) -> int | None:
        fetch = given["get_fab"]

        def note() -> Any:
            nonlocal kind
            received = given["receive"]()
            if received is not None:
                kind = received[0].metadata.message_type
            return received

        def fetch_unsigned(fab_hash: str, of_run: int) -> Fab:
            nonlocal run_id
            run_id = of_run
            fab: Fab = fetch(fab_hash, of_run)
            return Fab(fab.hash_str, fab.content, {"valid_license": "not asked for"})

        # Any trusted entity makes Flower verify; who they are does not matter to `verify`.
        changed = {"receive": note, "get_fab": fetch_unsigned, "trusted_entities": {"": ""}}
        return receive(**given | changed | {"state": _Verified(given["state"], still_runs)})

    def runs(app: str) -> bool:
        return pinned in (ANY, app) or app in _approved(state)

    def still_runs(of_run: int) -> bool:
        return runs(seen.get(str(of_run), ""))

    def verify(fab: Fab, trusted_entities: dict[str, str]) -> bool:
        found = app_sha256(fab.content)
        if runs(found):
            if pinned == ANY:
                print(f"supernode: WARNING: {UNCHECKED}: app {found[:12]} is run", flush=True)
            seen[str(run_id)] = found or "unknown"
            _write(Path(os.environ["APPS_SEEN"]), seen)
            return True
        print(f"supernode: ERROR: app {found[:12]} refused: {refusal}", flush=True)
        _note(state, found, fab.content, run_id, kind, refusal)
        return False

    flower._pull_and_store_message = receive_pinned  # type: ignore[assignment]
    flower._verify_fab = verify
    flower.FAB_VERIFICATION_ERROR = Error(ErrorCode.INVALID_FAB, refusal)


class _Verified:
    """A SuperNode's state that knows no run whose app may not run: Flower then verifies it anew."""

    def __init__(self, state: Any, still_runs: Callable[[int], bool]) -> None:
        self._state, self._still_runs = state, still_runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_run(self, run_id: int) -> Any:
        run = self._state.get_run(run_id)
        return run if run and self._still_runs(run_id) else None


def _approved(state: Path) -> set[str]:
    from supernode.apps import AppsError, approved

    try:
        return {app["sha256"] for app in approved(state)} - {""}
    except AppsError as err:
        print(f"supernode: ERROR: {err}", flush=True)
        return set()


def _note(state: Path, found: str, fab: bytes, run_id: int, kind: str, refusal: str) -> None:
    """Of a refused app: for whoever may approve it, and in the site's audit file."""
    from app.site import audit
    from supernode.apps import note_refused, version_of

    line = audit.entry(run_id, found or "unknown", kind)
    try:
        audit.append(state, line | {"outcome": audit.REFUSED, "reason": refusal})
        if found:
            note_refused(state, found, version_of(fab), run_id)
    except OSError as err:
        print(f"supernode: ERROR: {state} cannot be written: {err.strerror}", flush=True)


def _write(path: Path, seen: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(seen))
    part.replace(path)


def install_refusal() -> None:
    """Let this process end with EX_NOPERM (77) when the SuperLink refuses its key.

    Flower 1.36 then sends itself the signal of a Ctrl-C, and ends as if somebody had asked it to.
    """
    from flwr.supercore.retry import grpc_retry

    def end(*_: object) -> None:
        sys.stdout.flush()
        os._exit(os.EX_NOPERM)  # nobody is left to sign off at; what it has started ends with it

    vars(grpc_retry)["os"] = SimpleNamespace(getpid=os.getpid, kill=end)


def main() -> None:
    if sys.argv[1] == "hash":
        from supernode import fab

        return print(app_sha256(fab.build(Path(sys.argv[2]))))
    from flwr.supernode.cli import flower_supernode

    from supernode import deadline, polling
    from supernode.warm import lost, orders
    from supernode.warm.ending import end_with

    end_with(os.getppid(), signal.SIGTERM)  # time to sign off, as when it is asked to
    pin, site = sys.argv[2:4]
    install(pin, site, Path(os.environ["SITE_DIR"]) / "state")
    install_refusal()
    if socket := os.environ.get("WARM_SOCKET"):
        orders.install(Path(socket), float(os.environ["WARM_S"]))
    lost.install(Path(os.environ["APPS_SEEN"]).parent)
    deadline.install(site)
    polling.install()
    sys.argv = ["flower-supernode", *sys.argv[4:]]
    flower_supernode()


if __name__ == "__main__":
    main()
