"""Start the SuperLink from its environment: all its ports and flags are here.

| variable       | default         | what                                                |
|----------------|-----------------|-----------------------------------------------------|
| SUPERLINK_DIR  | (required)      | from provision: certificates, server.key, secret    |
| STATE_DIR      | (required)      | folder of the SQLite database                       |
| RESULTS_DIR    | (required)      | where the ServerApp writes checkpoints              |
| FLEET_ADDRESS  | 0.0.0.0:9092    | SuperNodes connect here (gRPC, TLS)                 |
| CONTROL_ADDRESS| 127.0.0.1:9093  | flwr connects here (gRPC, TLS, no user login)       |
| RUNTIME_ADDRESS| (none)          | superlink.serverapp connects here (TLS, secret); if |
|                |                 | unset, ServerApps are child processes               |
| RUNTIME_PORT   | 9091            | of 127.0.0.1, for those child processes             |
| SITES_DIR      | (required then) | who is who, from register; the ServerApp reads it   |
| AUDIT_DIR      | audit/ beside   | audit.jsonl: who asked for what                     |
|                | SUPERLINK_DIR   |                                                     |
| HEALTH_PORT    | 9190            | liveness, on 127.0.0.1 only                         |
| FLWR_LOG_LEVEL | INFO            | DEBUG: also what Flower's processes poll            |
"""

import errno
import os
import socket
import sys
from pathlib import Path

from superlink import link_log
from supernode.reach import AddressError, direct, parsed

DATABASE_LOCK_TIMEOUT_MS = 120_000
_ADVICE = {
    errno.EADDRINUSE: "another program does; end it, or set another port",
    errno.EADDRNOTAVAIL: "this host has no such address; 0.0.0.0 is all that it has",
    errno.EACCES: "a port below 1024 is root's; set another",
    socket.EAI_NONAME: "check the name, or give an address of this host",
}


def arguments(env: dict[str, str]) -> list[str]:
    """The command line. TLS and SuperNode authentication are no options.

    Raises:
        SystemExit: a folder or certificate is missing; the message names it.
    """
    apart = env.get("RUNTIME_ADDRESS")  # ServerApps in a container of their own
    folders = {}
    for name in ("SUPERLINK_DIR", "STATE_DIR", "RESULTS_DIR", *(() if apart else ("SITES_DIR",))):
        if not env.get(name):
            raise SystemExit(f"superlink: {name} is not set")
        folders[name] = Path(env[name])
    certificates = folders["SUPERLINK_DIR"]
    for file in ("ca.crt", "server.crt", "server.key", *(["runtime.secret"] if apart else [])):
        if not (certificates / file).is_file():
            raise SystemExit(
                f"superlink: {certificates / file} is missing; run superlink.provision first"
            )
    for name in ("STATE_DIR",) if apart else ("STATE_DIR", "RESULTS_DIR"):
        folders[name].mkdir(parents=True, exist_ok=True)
        if not os.access(folders[name], os.W_OK):
            raise SystemExit(
                f"superlink: {name}={folders[name]} cannot be written by user {os.getuid()}; "
                "change its owner or set another folder"
            )
    fleet = env.get("FLEET_ADDRESS", "0.0.0.0:9092")
    control = env.get("CONTROL_ADDRESS", "127.0.0.1:9093")
    runtime = apart or f"127.0.0.1:{env.get('RUNTIME_PORT', '9091')}"
    health = f"127.0.0.1:{env.get('HEALTH_PORT', '9190')}"
    for name, address in (
        ("FLEET_ADDRESS", fleet),
        ("CONTROL_ADDRESS", control),
        ("RUNTIME_ADDRESS" if apart else "RUNTIME_PORT", runtime),
        ("HEALTH_PORT", health),
    ):
        _check_free(name, address)
    return [
        "flower-superlink",
        "--ssl-ca-certfile", str(certificates / "ca.crt"),
        "--ssl-certfile", str(certificates / "server.crt"),
        "--ssl-keyfile", str(certificates / "server.key"),
        "--enable-supernode-auth",
        "--database", str(folders["STATE_DIR"] / "superlink.db"),
        "--disable-runtime-dependency-installation",
        "--fleet-api-address", fleet,
        "--control-api-address", control,
        "--host", parsed(runtime)[0], "--port", str(parsed(runtime)[1]),
        "--health-server-address", health,
        *(_apart(certificates) if apart else ()),
    ]  # fmt: skip


def _apart(certificates: Path) -> list[str]:
    """ServerApps run elsewhere, and whoever wants their work shows the secret."""
    return [
        "--isolation", "process",
        "--appio-ssl-ca-certfile", str(certificates / "ca.crt"),
        "--appio-ssl-certfile", str(certificates / "server.crt"),
        "--appio-ssl-keyfile", str(certificates / "server.key"),
        "--superexec-auth-secret-file", str(certificates / "runtime.secret"),
    ]  # fmt: skip


def _check_free(name: str, address: str) -> None:
    """Raises SystemExit with the system's own reason if nobody can listen there now."""
    try:
        host, port = parsed(address)
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as after a restart
            probe.bind(target)
    except AddressError as err:
        raise SystemExit(f"superlink: {name}: {err}") from None
    except OSError as err:
        advice = _ADVICE.get(err.errno or 0, "set another")
        raise SystemExit(
            f"superlink: {name}: nobody can listen at {address}: {err.strerror}; {advice}"
        ) from None


def main() -> None:
    sys.argv = arguments(dict(os.environ))
    os.environ |= direct(os.environ) | {
        "PATH": link_log.path(),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import SQLITE_PRAGMAS
    from flwr.superlink.cli import flower_superlink

    from superlink import control_acts, fleet_door, run_events, runtime_door

    link_log.set_up()
    fleet_door.install(Path(os.environ["RESULTS_DIR"]))
    run_events.install(Path(os.environ["RESULTS_DIR"]))
    runtime_door.install()
    beside = Path(os.environ["SUPERLINK_DIR"]).parent / "audit"  # where provision has it too
    control_acts.install(Path(os.environ.get("AUDIT_DIR") or beside))
    # Flower 1.36 gives up a database lock after 5 s, and no flag changes that. With 20 busy
    # SuperNodes on one host it then answers "Internal server error", after which a SuperNode,
    # or the process that starts ServerApps, is gone for good.
    others = [p for p in SQLITE_PRAGMAS if p[0] != "busy_timeout"]
    patched = (("busy_timeout", str(DATABASE_LOCK_TIMEOUT_MS)), *others)
    sql_mixin.SQLITE_PRAGMAS = patched  # type: ignore[attr-defined, assignment]
    flower_superlink()


if __name__ == "__main__":
    main()
