"""Apps that this site runs beside its image's own, because somebody here has looked at them.

``state/approved-apps.json`` is the list: SHA-256, version, who, when. ``state/refused-app.json`` is
the app of the run that was refused last, which ``python -m supernode.site`` shows and approves.
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
    """The list, oldest first. Raises AppsError."""
    try:
        listed = json.loads((state / APPROVED).read_text())
        return [{k: str(app[k]) for k in ("sha256", "version", "by", "time")} for app in listed]
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
    if not _plain(by):
        raise AppsError("--by: the name of who approves it is needed")
    listed = approved(state)
    entry = {k: refused[k] for k in ("sha256", "version")} | {"by": _plain(by), "time": _now()}
    if all(app["sha256"] != entry["sha256"] for app in listed):
        _write(state / APPROVED, [*listed, entry])
    return entry


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_TEXT]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
