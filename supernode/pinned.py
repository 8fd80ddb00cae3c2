"""Flower's SuperNode, but it runs no other app than the one that this site was given.

    python -m supernode.pinned run SHA256|any SITE [flower-supernode's flags]
    python -m supernode.pinned hash FOLDER     the SHA-256 of the app of a checkout

A run brings its own Python code (the FAB), and Flower 1.36 runs whatever comes, unless it is
signed in Flower's hub. Its check of signatures is used here for a check of the app's SHA-256:
the site answers with Flower's own "invalid FAB" error, and no line of the code is run. It is of
names and contents, not of the zip: that differs by the system and the zlib which made it.
"""

import hashlib
import io
import os
import signal
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ANY = "any"  # in the place of the SHA-256
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
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError):
        return ""
    return digest.hexdigest()


def install(pinned: str, site: str) -> None:
    """Let this process's SuperNode accept the app of this SHA-256 only."""
    from flwr.app import Error
    from flwr.common.constant import ErrorCode
    from flwr.supercore.fab import Fab
    from flwr.supernode import start_client_internal as flower

    refusal = (
        f"{site} runs app {pinned[:12]} only, and this run brings another; the site's operator "
        "installs its version, or sets ALLOW_APP_UPDATES=1 to run whatever comes"
    )
    receive = flower._pull_and_store_message

    def receive_pinned(**given: Any) -> int | None:
        fetch = given["get_fab"]

        def fetch_unsigned(fab_hash: str, run_id: int) -> Fab:
            fab: Fab = fetch(fab_hash, run_id)
            return Fab(fab.hash_str, fab.content, {"valid_license": "not asked for"})

        # Any trusted entity makes Flower verify; who they are does not matter to `verify`.
        return receive(**given | {"get_fab": fetch_unsigned, "trusted_entities": {"": ""}})

    def verify(fab: Fab, trusted_entities: dict[str, str]) -> bool:
        found = app_sha256(fab.content)
        if found != pinned:
            print(f"supernode: ERROR: app {found[:12]} refused: {refusal}", flush=True)
        return found == pinned

    flower._pull_and_store_message = receive_pinned  # type: ignore[assignment]
    flower._verify_fab = verify
    flower.FAB_VERIFICATION_ERROR = Error(ErrorCode.INVALID_FAB, refusal)


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
        from flwr.cli.build import build_fab_from_disk

        return print(app_sha256(build_fab_from_disk(Path(sys.argv[2]))))
    from flwr.supernode.cli import flower_supernode

    from supernode import deadline, polling
    from supernode.warm import lost, orders
    from supernode.warm.ending import end_with

    end_with(os.getppid(), signal.SIGTERM)  # time to sign off, as when it is asked to
    pin, site = sys.argv[2:4]
    if pin != ANY:
        install(pin, site)
    install_refusal()
    if socket := os.environ.get("WARM_SOCKET"):
        orders.install(Path(socket), float(os.environ["WARM_S"]))
        lost.install(Path(socket).parent)
    deadline.install(site)
    polling.install()
    sys.argv = ["flower-supernode", *sys.argv[4:]]
    flower_supernode()


if __name__ == "__main__":
    main()
