"""What a hospital decides while its SuperNode runs: to pause, and which other apps it runs.

    python -m supernode.site pause         in no run from the next message on
    python -m supernode.site resume        take part again
    python -m supernode.site apps          the apps that run here, and the one that was refused last
    python -m supernode.site approve SHA256 --by NAME      the one that was refused last

SITE_DIR is the site's folder; in a kit's container: docker compose exec supernode python3 -m
supernode.site pause (supernode-07 where one compose file runs all sites). What is decided stands in
state/, and holds until it is decided otherwise.
"""

import argparse
import os
import sys
from pathlib import Path

from supernode.apps import AppsError, approve, approved, last_refused

PAUSED = "paused"  # app/site/gate.py looks for it


def main() -> int:
    parser = argparse.ArgumentParser(prog="supernode.site", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pause", "resume", "apps"):
        commands.add_parser(name)
    looked_at = commands.add_parser("approve")
    looked_at.add_argument("sha256", metavar="SHA256", help="12 digits of it or more")
    looked_at.add_argument("--by", required=True, metavar="NAME", help="who has looked at it")
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
        else:
            entry = approve(state, args.sha256, args.by)
            print(f"approved: app {entry['sha256']}, version {entry['version'] or 'unknown'}")
    except (AppsError, OSError) as err:
        print(f"supernode.site: ERROR: {err}", file=sys.stderr)
        return 1
    return 0


def _apps(state: Path) -> list[str]:
    stored = Path(__file__).parents[1] / "app.sha256"
    pin = os.environ.get("APP_SHA256") or (stored.read_text().strip() if stored.is_file() else "")
    lines = [f"pinned    {pin or 'none is known here: set APP_SHA256 as for the SuperNode'}"]
    if os.environ.get("ALLOW_APP_UPDATES") == "1":
        lines.append("WARNING: ALLOW_APP_UPDATES=1: whatever app a run brings is run")
    lines += [
        f"approved  {app['sha256']}  version {app['version'] or 'unknown'}, by {app['by']}, "
        f"{app['time']}"
        for app in approved(state)
    ]
    if refused := last_refused(state):
        lines.append(
            f"refused   {refused['sha256']}  version {refused['version'] or 'unknown'}, in run "
            f"{refused['run']}, {refused['time']}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
