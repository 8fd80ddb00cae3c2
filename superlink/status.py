"""Who is there, and what the newest runs said of each site.

    python -m superlink.status [--format json]

Online or not is the SuperLink's word (CONTROL_ADDRESS), and so is the app of a run; which site has
which key is the folder PUBLIC_DIR's; rows, device, versions, rounds and reasons are what runs have
left in RESULTS_DIR. Exit codes: 0 every site that has a key is online, 4 some are not, 1 it cannot
be told (one line says why), 2 wrong arguments.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.common.constant import HEARTBEAT_PATIENCE

from superlink import run_files
from superlink.control import UNREGISTERED, Control, ControlError, connected, public_keys

SCHEMA = 1  # another number: a field has another meaning, or is gone
SOME_AWAY = 4
UP_WITHIN_S = 30
ONLINE, OFFLINE, REGISTERED = "online", "offline", "registered"  # Flower's words; the third: never
UNKNOWN, REVOKED, PAUSED = "unknown", "revoked", "paused"
_HAS_PAUSED = "the site has paused"  # so the answer of one reads


@dataclass
class Site:
    """One site. ``last_seen`` is ISO 8601 in UTC; what nobody has said is empty or None."""

    site: str
    state: str
    last_seen: str = ""
    rows: int | None = None
    device: str = ""
    app: str = ""  # of the newest run that it was ready for: version, and SHA-256 of the FAB
    policy: str = ""  # SHA-256 of its policy.toml
    versions: dict[str, str] = field(default_factory=dict)
    last_round: dict[str, Any] | None = None  # run, round
    left_out: dict[str, Any] | None = None  # run, round (None: of the whole run), why


@dataclass
class Report:
    exit_code: int
    sites: list[Site]
    newest_run: dict[str, str] | None  # run, status, started, error
    notes: list[str]


def status(control: Control, public: Path, results: Path) -> Report:
    """What is known now.

    Raises:
        ControlError: no keys, or the SuperLink does not answer.
    """
    keys, revoked = public_keys(public), public_keys(public / "revoked")
    if not keys and not revoked:
        raise ControlError(f"no site-NN.pub in {public}; run superlink.provision first")
    control.wait_until_up(UP_WITHIN_S)
    nodes = {bytes(node.public_key): node for node in control.nodes()}
    sites = {name: _joined(name, nodes.get(key)) for name, key in keys.items()}
    out = sorted({name.rsplit("-", 1)[0] for name in revoked} - keys.keys())
    notes = list(_notes(nodes, keys, revoked))
    try:
        runs = [p.name for p in results.iterdir() if p.name.isdecimal() and not p.is_symlink()]
    except OSError as err:
        notes.append(f"RESULTS_DIR={results}: {err.strerror}: nothing is known of runs")
        runs = []
    apps = {str(run.run_id): f"{run.app_version} {run.app[:12]}".strip() for run in control.runs()}
    newest = _add_runs(sites, results, runs, apps)
    notes += _other_versions(sites.values())
    for site in sites.values():
        if site.state == ONLINE and site.left_out and _HAS_PAUSED in site.left_out["why"]:
            site.state = PAUSED
    away = any(site.state != ONLINE for site in sites.values())
    everybody = [*sites.values(), *(Site(name, REVOKED) for name in out)]
    everybody.sort(key=lambda site: (len(site.site), site.site))
    return Report(SOME_AWAY if away else 0, everybody, newest, notes)


def _joined(name: str, node: Any) -> Site:
    """``node``: Flower's NodeInfo, or None."""
    if node is None:
        return Site(name, UNKNOWN)
    if node.status == UNREGISTERED:
        return Site(name, REVOKED, node.last_deactivated_at)
    seen = node.last_deactivated_at
    if node.status == ONLINE:  # its last heartbeat
        since_s = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
        seen = datetime.fromtimestamp(since_s, UTC).isoformat(timespec="seconds")
    return Site(name, node.status, seen)


def _notes(
    nodes: dict[bytes, Any], keys: dict[str, bytes], revoked: dict[str, bytes]
) -> Iterator[str]:
    """What the list of sites cannot say: the SuperLink and the folder disagree."""
    let_in = {key for key, node in nodes.items() if node.status != UNREGISTERED}
    if unknown := [site for site, key in keys.items() if key not in nodes]:
        yield f"{', '.join(unknown)}: the SuperLink does not know the key; run superlink.register"
    if gone := [site for site, key in keys.items() if key in nodes.keys() - let_in]:
        yield f"{', '.join(gone)}: the key is unregistered for ever; superlink.provision rotate"
    if still := [file for file, key in revoked.items() if key in let_in]:
        yield f"{', '.join(still)}: a revoked key may still join; run superlink.register"
    if strangers := len(let_in - {*keys.values(), *revoked.values()}):
        yield (
            f"{strangers} more keys may join that belong to no site; flwr supernode list shows "
            "them, flwr supernode unregister shuts one out"
        )


def _add_runs(
    sites: dict[str, Site], results: Path, runs: list[str], apps: dict[str, str]
) -> dict[str, str] | None:
    """Add to ``sites`` what the runs say, the newest first; returns what is known of that one."""
    of = {run: facts for run in runs if (facts := run_files.facts(results, run))}
    ordered = sorted(of, key=lambda run: run_files.text(of[run].get("started")), reverse=True)
    for run in ordered:
        ready, left_out = (run_files.table(of[run].get(k)) for k in ("sites", "left_out"))
        lines = run_files.lines(results, run)
        for name, site in sites.items():
            if site.rows is None and name in ready:
                _add_facts(site, run_files.table(ready[name]), apps.get(run, ""))
            if run == ordered[0]:
                site.left_out = _left_out(name, run, left_out, lines)
            if site.last_round is None:
                site.last_round = _last_round(name, run, lines)
        if all(s.rows is not None and s.last_round for s in sites.values()):
            break
    if not ordered:
        return None
    said = {key: run_files.text(of[ordered[0]].get(key)) for key in ("status", "started", "error")}
    return {"run": ordered[0], **said}


def _add_facts(site: Site, said: dict[str, Any], app: str) -> None:
    rows = said.get("num_examples")
    site.rows = rows if type(rows) is int else None
    site.device, site.app = run_files.text(said.get("device")), app
    site.policy = run_files.text(said.get("policy"))
    versions = run_files.table(said.get("versions"))
    site.versions = {run_files.text(k): run_files.text(v) for k, v in versions.items()}


def _last_round(name: str, run: str, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    for line in reversed(lines):
        partitions = line.get("partitions")
        if isinstance(partitions, list) and name in {f"site-{p!s:0>2}" for p in partitions}:
            return {"run": run, "round": line["round"]}
    return None


def _left_out(
    name: str, run: str, of_the_run: dict[str, Any], lines: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Of the whole run, or of its last round that asked this site."""
    if name in of_the_run:
        return {"run": run, "round": None, "why": run_files.text(of_the_run[name])}
    for line in reversed(lines):
        if _last_round(name, run, [line]):
            return None
        if name in (rejected := run_files.table(line.get("rejected"))):
            return {"run": run, "round": line["round"], "why": run_files.text(rejected[name])}
    return None


def _other_versions(sites: Any) -> Iterator[str]:
    """Sites whose packages are not those of most."""
    known = [site for site in sites if site.versions]
    for package in sorted({name for site in known for name in site.versions}):
        usual, _ = Counter(s.versions.get(package, "") for s in known).most_common(1)[0]
        for site in known:
            if (own := site.versions.get(package, "")) != usual:
                yield f"{site.site} has {package} {own or '(none)'}, most have {usual or 'none'}"


def text(report: Report) -> str:
    """For people: a line a site, what is worth a note, and the newest run."""
    newest = report.newest_run
    rows = [
        ("site", "state", "last seen", "rows", "device", "app", "policy", "last round", "left out")
    ]
    for site in report.sites:
        done, out = site.last_round, site.left_out
        which = f"{done['round']}" if done else "-"
        if done and newest and done["run"] != newest["run"]:
            which += f" of run {done['run']}"
        why = "" if not out else f"{_of(out)}{out['why']}"
        seen = site.last_seen[:19].replace("T", " ")
        told = "" if site.rows is None else str(site.rows)
        which_app = site.app, site.policy[:8]
        cells = (site.site, site.state, seen, told, site.device, *which_app, which, why)
        rows.append(tuple(cell or "-" for cell in cells))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"note: {note}" for note in report.notes]
    if newest:
        error = newest["error"] and f": {newest['error']}"
        lines.append(
            f"newest run: {newest['run']}, started {newest['started']}, {newest['status']}{error}"
        )
    return "\n".join(lines)


def _of(out: dict[str, Any]) -> str:
    return "" if out["round"] is None else f"round {out['round']}: "


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.status", description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=("text", "json"), default="text")
    args = parser.parse_args()
    public = Path(os.environ.get("PUBLIC_DIR", "federation/public"))
    address = os.environ.get("CONTROL_ADDRESS", "localhost:9093")
    results = Path(os.environ.get("RESULTS_DIR", "results"))
    try:
        report = status(connected(address, public / "ca.crt"), public, results)
    except ControlError as err:
        print(f"status: {err}", file=sys.stderr)
        return 1
    if args.format == "json":
        now = datetime.now(UTC).isoformat(timespec="seconds")
        head = {"schema": SCHEMA, "time": now, "superlink": address}
        print(json.dumps(head | asdict(report), indent=1))
    else:
        print(text(report))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
