"""What a hospital decides while its SuperNode runs: to pause, and which other apps it runs.

    python -m supernode.site pause         in no run from the next message on
    python -m supernode.site resume        take part again
    python -m supernode.site apps          the apps that run here, and the one that was refused last
    python -m supernode.site approve SHA256 --by NAME      the one that was refused last
    python -m supernode.site withdraw SHA256 --by NAME     what was approved: not run any more

SITE_DIR is the site's folder; in a kit's container: docker compose exec supernode python3 -m
supernode.site pause (supernode-07 where one compose file runs all sites). What is decided stands in
state/, counts from the next message on, and holds until it is decided otherwise.
"""

import argparse
import os
import sys
from pathlib import Path

from supernode.apps import AppsError, approve, approved, last_refused, withdraw, withdrawn

PAUSED = "paused"  # app/site/gate.py looks for it
ANY_RUNS = "WARNING: ALLOW_APP_UPDATES=1: whatever app a run brings is run"


def main() -> int:
    parser = argparse.ArgumentParser(prog="supernode.site", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pause", "resume", "apps"):
        commands.add_parser(name)
    for name in ("approve", "withdraw"):
        decided = commands.add_parser(name)
        decided.add_argument("sha256", metavar="SHA256", help="12 digits of it or more")
        decided.add_argument("--by", required=True, metavar="NAME", help="who decides it")
    args = parser.parse_args()
    state = Path(os.environ.get("SITE_DIR", ".")) / "state"
    try:
        if not state.is_dir():
            raise AppsError(f"{state} is no folder; set SITE_DIR to the site's folder")
        if args.command == "pause":
            (state / PAUSED).touch()
            print("paused: from the next message on this site takes part in no run")
        elif args.command == "resume":
            (state / PAUSED).unlink(missing_ok=True)
            print("not paused: this site takes part in runs")
        elif args.command == "apps":
            print("\n".join(_apps(state)))
        elif args.command == "approve":
            entry = approve(state, args.sha256, args.by)
            print(f"approved: app {entry['sha256']}, version {entry['version'] or 'unknown'}")
        else:
            entry = withdraw(state, args.sha256, args.by, _pin())
            print(f"withdrawn: app {entry['withdrawn']} is not run from the next message on")
            if os.environ.get("ALLOW_APP_UPDATES") == "1":
                print(ANY_RUNS)
    except (AppsError, OSError) as err:
        print(f"supernode.site: ERROR: {err}", file=sys.stderr)
        return 1
    return 0


def _pin() -> str:
    stored = Path(__file__).parents[1] / "app.sha256"
    return os.environ.get("APP_SHA256") or (stored.read_text().strip() if stored.is_file() else "")


def _apps(state: Path) -> list[str]:
    lines = [f"pinned    {_pin() or 'none is known here: set APP_SHA256 as for the SuperNode'}"]
    if os.environ.get("ALLOW_APP_UPDATES") == "1":
        lines.append(ANY_RUNS)
    lines += [
        f"{word:9} {app[key]}  version {app['version'] or 'unknown'}, by {app['by']}, {app['time']}"
        for word, key, apps in (
            ("approved", "sha256", approved(state)),
            ("withdrawn", "withdrawn", withdrawn(state)),
        )
        for app in apps
    ]
    if refused := last_refused(state):
        lines.append(
            f"refused   {refused['sha256']}  version {refused['version'] or 'unknown'}, in run "
            f"{refused['run']}, {refused['time']}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
