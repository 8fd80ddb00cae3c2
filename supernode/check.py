"""Is this site ready? One row a thing that a run needs, each with the cure where it is not.

    python -m supernode.check                                     the reference recipe
    python -m supernode.check --run-config app/profiles/demo.toml --format json

Its settings are those of ``supernode.entrypoint``; no node joins and nothing is written but what
the GPU's check keeps in state/. Exit code 0: no row is an error; 1: one is; 4: the check itself
could not be made. Of the site's data there are counts, no text. The first rows are asked here; what
a run would find, the app that the site has pinned is asked (``app.site.check``).
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from supernode.check_rows import ROWS, BadError, Doubt, Site
from supernode.gpus import NoGpuError, gpu_of

READY, NOT_READY, NOT_CHECKED = 0, 1, 4
_HERE = Path(__file__).parents[1]
# In the image the pinned app lies apart: nothing of it may stand in for the one that a run brings.
APP = next(
    f for f in (_HERE / "pinned", _HERE) if (f / "app/site/check.py").is_file() or f == _HERE
)


@dataclass(frozen=True)
class Row:
    row: str
    status: str  # ok, warning, error
    what: str


def asked(site: Site) -> list[Row]:
    """Each of ROWS with its outcome."""
    found = []
    for name, row in ROWS.items():
        try:
            what = row(site)
            status = "warning" if isinstance(what, Doubt) else "ok"
        except (BadError, SystemExit) as err:  # SystemExit: as the SuperNode's start says it
            status, what = "error", str(err).removeprefix("supernode: ")
        except OSError as err:
            status, what = "error", f"{err.filename or name}: {err.strerror or type(err).__name__}"
        except Exception as err:  # its words may hold anything: of a key, a proxy's password
            status, what = "error", f"the check itself failed here: {type(err).__name__}"
        found.append(Row(name, status, what))
    return found


def asked_of_the_app(env: dict[str, str], run_config: list[str]) -> list[Row]:
    """The rows of the pinned app's own check, in a process of its own.

    Raises:
        SystemExit: it could not be made; it has said why, or does here.
    """
    env["DEVICE"] = env.get("DEVICE") or "cuda"
    if env["DEVICE"] == "cuda":
        try:
            env |= gpu_of(env)[0]
        except NoGpuError as err:
            env["DEVICE_ERROR"] = str(err)
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "app.site.check", *run_config]
    done = subprocess.run(command, cwd=APP, env=env, check=False, stdout=subprocess.PIPE, text=True)
    try:
        return [Row(**row) for row in json.loads(done.stdout)]
    except (ValueError, TypeError):
        if done.returncode != NOT_CHECKED:
            print(f"check: ERROR: app.site.check ended with {done.returncode}", file=sys.stderr)
        raise SystemExit(NOT_CHECKED) from None


def in_words(site: Site, rows: list[Row]) -> str:
    """A line a row, and what follows from them."""
    marks = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}
    lines = [f"{marks[r.status]}  {r.row:14}  {r.what}" for r in rows]
    errors, warnings = (sum(r.status == s for r in rows) for s in ("error", "warning"))
    so = f"{site.name} is not ready: no SuperNode starts" if errors else f"{site.name} is ready"
    return "\n".join([*lines, f"check: {errors} errors, {warnings} warnings; {so}"])


def main() -> int:
    args = _arguments()
    env = dict(os.environ)
    for name in ("SITE_DIR", "MODELS_DIR", "LOCK_DIR"):
        if not env.get(name):
            print(f"check: ERROR: {name} is not set", file=sys.stderr)
            return NOT_CHECKED
    if env.get("DEVICE", "") not in ("", "cuda", "cpu"):
        print(f"check: ERROR: DEVICE={env['DEVICE']}: cuda or cpu", file=sys.stderr)
        return NOT_CHECKED
    site = Site(env)
    rows = asked(site) + asked_of_the_app(site.env, args.run_config)
    ready = not any(row.status == "error" for row in rows)
    if args.format == "json":
        facts = {"site": site.name, "ready": ready, "rows": [asdict(row) for row in rows]}
        print(json.dumps(facts, indent=1))
    else:
        print(in_words(site, rows))
    return READY if ready else NOT_READY


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """What argparse has no option for: another exit code than 2."""
        self.print_usage(sys.stderr)
        self.exit(NOT_CHECKED, f"{self.prog}: ERROR: {message}\n")


def _arguments() -> argparse.Namespace:
    parser = _Parser(prog="supernode.check", description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--run-config", action="append", default=[], metavar="FILE|PAIRS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
