"""What ``supernode.check`` asks of this host and of the SuperLink: one function a row.

A row says what is so (a Doubt: as a warning), or raises with the cure: BadError, or SystemExit in
the words of the SuperNode's own start.
"""

import os
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from supernode.apps import AppsError, approved
from supernode.entrypoint import pinned_app
from supernode.keygen import fingerprint, loaded
from supernode.reach import direct, parsed, proxy_for, reached
from supernode.site_env import check_readable, completed
from supernode.superlink_check import LinkError, ask, certificate_end

SOON_DAYS = 30
# state/ keeps what coarse codecs left out, 52 MiB for each of four runs in the reference recipe.
LEAST_FREE_MIB, FEW_FREE_MIB = 256, 1024


class Doubt(str):
    """What a row says, as a warning."""


class BadError(Exception):
    """Why a row is an error, and the cure."""


@dataclass
class Site:
    """The environment, completed by site.env as far as it can be; and what earlier rows found."""

    env: dict[str, str]
    key: ec.EllipticCurvePrivateKey | None = None
    registered: bool | None = None
    why_unknown: str = ""  # why nobody knows whether it is registered
    name: str = "this site"

    @property
    def folder(self) -> Path:
        return Path(self.env.get("SITE_DIR", ""))

    @property
    def ca(self) -> Path:
        return self.folder / "superlink-ca.crt"

    def address(self) -> str:
        """Raises BadError: the settings are wrong, which has a row of its own."""
        try:
            reached(self.env.get("SUPERLINK", ""))
        except ValueError:
            raise BadError("not asked: the settings above come first") from None
        return self.env["SUPERLINK"]


def settings(site: Site) -> str:
    site.env |= completed(site.env)
    site.env |= direct(site.env, parsed(site.env["SUPERLINK"])[0])
    # Where gRPC looks; site.env may name them too.
    os.environ.update({k: v for k, v in site.env.items() if k.lower().endswith("_proxy")})
    number = int(site.env["PARTITION_ID"])
    site.name = f"site-{number:02d}"
    return f"{site.name}, one of {site.env['NUM_PARTITIONS']}, to {site.env['SUPERLINK']}"


def app(site: Site) -> str:
    pin = pinned_app(site.env)
    if not pin:
        return Doubt("any: ALLOW_APP_UPDATES=1 lets every run bring its own code; take it out")
    try:
        others = ", ".join(listed["sha256"][:12] for listed in approved(site.folder / "state"))
    except AppsError as err:
        raise BadError(str(err)) from None
    return f"{pin[:12]}, and approved here {others}" if others else f"{pin[:12]} and no other"


def key(site: Site) -> str:
    path = site.folder / "supernode.key"
    if not path.exists():
        raise BadError(
            f"{path} is missing: put the kit's there, or make one here with supernode.keygen "
            "(docker compose run --rm keygen)"
        )
    check_readable(path)
    site.key = loaded(path)
    if not site.key:
        raise BadError(f"{path} is no private key of a site; take it from the kit again")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise BadError(
            f"{path} has mode {mode:04o}, so others can read it: chmod 0600 (a file system without "
            "modes is no place for it)"
        )
    return f"{fingerprint(site.key.public_key())}, mode {mode:04o}"


def ca_certificate(site: Site) -> str:
    check_readable(site.ca)
    try:
        ends = min(c.not_valid_after_utc for c in x509.load_pem_x509_certificates(
            site.ca.read_bytes()
        ))  # fmt: skip
    except ValueError:
        raise BadError(f"{site.ca} is no PEM certificate; take it from the kit again") from None
    return _ending(ends, "ask the operator for a new superlink-ca.crt")


def _ending(ends: datetime, cure: str) -> str:
    days = (ends - datetime.now(UTC)).days
    said = f"ends {ends:%Y-%m-%d}, in {days} days"
    if days < 0:
        raise BadError(f"ended {ends:%Y-%m-%d} by this host's clock; {cure}, if the clock is right")
    return Doubt(f"{said}; {cure}") if days < SOON_DAYS else said


def name_lookup(site: Site) -> str:
    host, port = parsed(site.address())
    if proxy := proxy_for(site.env, host):
        return f"{host} is left to the proxy that {proxy} names"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as err:
        raise BadError(
            f"the name {host} cannot be resolved ({err.strerror}); check it, and this host's DNS"
        ) from None
    return f"{host} is {', '.join(sorted({str(address[0]) for *_, address in found}))}"


def connection(site: Site) -> str:
    address = site.address()
    try:
        ends = certificate_end(address, site.ca, site.env)
    except LinkError as err:
        site.why_unknown = "not asked: there is no connection"
        raise BadError(f"no TLS connection to {address}: {err}") from None
    proxy = proxy_for(site.env, parsed(address)[0])
    through = f", through the proxy that {proxy} names" if proxy else ""
    told = _ending(ends, "the operator's superlink.provision renews it")
    return type(told)(f"TLS{through}; the server's certificate {told}")


def clock(site: Site) -> str:
    """By the SuperLink's, whose answer says whether the key is registered as well."""
    address = site.address()
    if not site.key:
        site.why_unknown = "not asked: that needs the key"
    if site.why_unknown or not site.key:
        return Doubt(site.why_unknown)
    try:
        told = ask(address, site.ca, site.key)
    except LinkError as err:
        site.why_unknown = str(err)
        return Doubt(f"not known: {err}")
    site.registered = told.registered
    if told.registered is None:
        site.why_unknown = "not known: the clock comes first"
        raise BadError(
            f"it says {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, which the SuperLink refuses: more "
            "than 5 s ahead of its own, or 5 minutes behind; set it (NTP), here or there"
        )
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, near enough for the SuperLink"


def registered(site: Site) -> str:
    site.address()
    if site.registered is None:
        raise BadError(site.why_unknown)
    if not site.registered:
        raise BadError(
            "the SuperLink does not let this key in: its operator has not registered it yet "
            "(superlink.register, after superlink.provision admit where it was made here), or it "
            "was revoked"
        )
    return "the SuperLink lets this key in"


def disk(site: Site) -> str:
    state = site.folder / "state"
    if not state.is_dir() or not os.access(state, os.W_OK | os.X_OK):
        raise BadError(f"{state} is no folder that user {os.getuid()} can write; make it that")
    free_mib = shutil.disk_usage(state).free >> 20
    said = f"{free_mib} MiB free for {state}"
    if free_mib < LEAST_FREE_MIB:
        raise BadError(f"{said}, at least {LEAST_FREE_MIB} are needed; make room")
    return Doubt(f"{said}; below {FEW_FREE_MIB} is little") if free_mib < FEW_FREE_MIB else said


# In this order, by name; then come those of app.site.check.
ROWS: dict[str, Callable[[Site], str]] = {
    "settings": settings,
    "app": app,
    "key": key,
    "CA certificate": ca_certificate,
    "name": name_lookup,
    "connection": connection,
    "clock": clock,
    "registered": registered,
    "disk": disk,
}
