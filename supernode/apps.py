"""Apps that this site runs beside its image's own, because somebody here has looked at them.

``state/approved-apps.json`` has a line of what was decided after the other: the SHA-256 that was
approved (``sha256``) or whose approval was withdrawn (``withdrawn``), its version, who, when.
``state/refused-app.json`` is the app of the run that was refused last, which ``python -m
supernode.site`` shows and approves.
"""

import io
import json
import tomllib
import zipfile
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

APPROVED, LAST_REFUSED = "approved-apps.json", "refused-app.json"
_TEXT = 100  # characters of a version or a name that are kept


class AppsError(Exception):
    """The list cannot be read, or an app not approved; one line says why."""


def approved(state: Path) -> list[dict[str, str]]:
    """What is approved now, oldest first. Raises AppsError."""
    return [entry for entry in _last_words(state) if "sha256" in entry]


def withdrawn(state: Path) -> list[dict[str, str]]:
    """Whose approval was withdrawn, and not given anew; oldest first. Raises AppsError."""
    return [entry for entry in _last_words(state) if "withdrawn" in entry]


def _last_words(state: Path) -> list[dict[str, str]]:
    last: dict[str, dict[str, str]] = {}
    for entry in _decided(state):
        app = entry.get("sha256") or entry.get("withdrawn") or ""
        last.pop(app, None)
        last[app] = entry
    return list(last.values())


def _decided(state: Path) -> list[dict[str, str]]:
    try:
        found = []
        for entry in json.loads((state / APPROVED).read_text()):
            app = "withdrawn" if "withdrawn" in entry else "sha256"
            found.append({k: str(entry[k]) for k in (app, "version", "by", "time")})
        return found
    except FileNotFoundError:
        return []
    except OSError as err:
        raise AppsError(f"{state / APPROVED} cannot be read: {err.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise AppsError(
            f"{state / APPROVED} is no list of approved apps; delete it and approve anew"
        ) from None


def version_of(fab: bytes) -> str:
    """As the app's own pyproject.toml says; it may say anything. Empty if nothing."""
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(fab)) as archive:
        project = tomllib.loads(archive.read("pyproject.toml").decode())["project"]
        return _plain(str(project["version"]))
    return ""


def note_refused(state: Path, sha256: str, version: str, run_id: int) -> None:
    """Raises OSError."""
    said = {"sha256": sha256, "version": version, "run": str(run_id), "time": _now()}
    _write(state / LAST_REFUSED, said)


def last_refused(state: Path) -> dict[str, str] | None:
    """What ``note_refused`` wrote last."""
    try:
        said = json.loads((state / LAST_REFUSED).read_text())
        return {k: str(said[k]) for k in ("sha256", "version", "run", "time")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def approve(state: Path, sha256: str, by: str) -> dict[str, str]:
    """Put the app that was refused last into the list; returns its entry.

    ``sha256``: at least its first 12 digits, so that it is the one that somebody has looked at.

    Raises:
        AppsError: it is another one, or nobody's name is given; OSError.
    """
    refused = last_refused(state)
    if not refused:
        raise AppsError("no app was refused here; there is nothing to approve")
    if len(sha256) < 12 or not refused["sha256"].startswith(sha256):
        raise AppsError(
            f"{sha256!r} does not begin the SHA-256 of the app that was refused last "
            f"({refused['sha256']}); give 12 digits of it or more"
        )
    entry = {k: refused[k] for k in ("sha256", "version")} | _signed(by, "approves")
    if all(app["sha256"] != entry["sha256"] for app in approved(state)):
        _write(state / APPROVED, [*_decided(state), entry])
    return entry


def withdraw(state: Path, sha256: str, by: str, pinned: str) -> dict[str, str]:
    """Take an approval back; returns the entry that says so.

    ``sha256``: at least the app's first 12 digits. ``pinned``: that of the site's own app.

    Raises:
        AppsError: it is the site's own, or not approved, or nobody's name is given; OSError.
    """
    if len(sha256) >= 12 and pinned.startswith(sha256):
        raise AppsError(
            f"{sha256} is the app that this site is pinned to, which needs no approval; to run "
            "nothing, pause (supernode.site pause)"
        )
    listed = approved(state)
    found = [app for app in listed if len(sha256) >= 12 and app["sha256"].startswith(sha256)]
    if len(found) != 1:
        there = ", ".join(app["sha256"] for app in listed) or "none"
        raise AppsError(
            f"{sha256!r} does not begin the SHA-256 of one approved app ({there}); give 12 digits "
            "of it or more"
        )
    entry = {"withdrawn": found[0]["sha256"], "version": found[0]["version"]}
    entry |= _signed(by, "withdraws")
    _write(state / APPROVED, [*_decided(state), entry])
    return entry


def _signed(by: str, does: str) -> dict[str, str]:
    if not _plain(by):
        raise AppsError(f"--by: the name of who {does} it is needed")
    return {"by": _plain(by), "time": _now()}


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_TEXT]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
