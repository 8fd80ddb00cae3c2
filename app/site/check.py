"""What a run would find at this site, asked before there is any: base model, rows, device, memory.

    python -m app.site.check [FILE|PAIRS of a run config]...

Prints a JSON list of {"row", "status", "what"}, for ``supernode.check``, which asks the app that
the site has pinned in a process of its own. Each row is what the preflight asks; none has a text
of the site's data. Settings: those of ``app.client_app``, without MODELS_VERIFIED.
"""

import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.config import MIB, ConfigError, RunConfig, merged_config
from app.site import device, memory
from app.site.base_model import BaseModel, find
from app.site.partition import Part, SiteError, part_of
from app.site.policy import Policy
from app.site.rows_used import check_positions, check_some_used, counted, token_sizes
from app.site.verified import check_contents

NOT_CHECKED = 4  # the exit code
MUCH = 0.1  # of the rows, left out for one reason or cut, is worth a warning
# A reader of rows takes these names; others may be somebody's text (app/site/rows.py).
_NAMES = {"instruction", "input", "output", "question", "answer", "messages"}
_LOST = ("empty", "repeated", "known", "too_long", "cut")  # cut: used, without its end


class Doubt(str):
    """What a row says, as a warning."""


@dataclass
class Site:
    """What is asked about: this folder and the run config; and what earlier rows have found."""

    folder: Path
    models: Path
    config: RunConfig
    columns: str = ""  # DATA_COLUMNS
    base: BaseModel | None = None
    gpu: device.Gpu | None = None


def policy(site: Site) -> str:
    """The site's own rules, if it has any."""
    return str(Policy.read(site.folder))


def base_model(site: Site) -> str:
    """Complete, and what ``supernode.prepare`` wrote: every file is read."""
    site.base = base = find(site.models, site.config.model_name, site.config.quantization)
    check_contents(base)
    size_mib = sum(base.files.values()) / MIB
    return (
        f"{base.name} ({base.kind}), fingerprint {base.fingerprint}: {size_mib:.0f} MiB read, "
        "as supernode.prepare wrote them"
    )


def train_rows(site: Site) -> str:
    """``data/train.*``: what is used of it, what is not, and why."""
    return _rows(site, part_of(site.folder, "train", site.columns))


def holdout_rows(site: Site) -> str:
    """``data/holdout.*``, which a site need not have."""
    part = part_of(site.folder, "holdout", site.columns)
    return _rows(site, part) if part.name else "none: this site takes no part in evaluation"


def _rows(site: Site, part: Part) -> str:
    ours = _NAMES | {c.strip().casefold() for c in site.columns.split(",")}
    named = [column for column in part.columns if column in ours]
    others = len(part.columns) - len(named)
    columns = f"columns {', '.join(named)}{f' and {others} more' if others else ''}"
    if not site.base:
        return Doubt(
            f"{part.name}: {part.read} rows, {len(part.rows)} of them used{_told(part.counts())}; "
            f"{columns}; tokens not counted: that needs the base model"
        )
    sizes = token_sizes(part, site.base, site.config)
    counts = counted(part, sizes, site.config)
    check_positions(part, sizes, site.base, site.config)
    if part.name.startswith("data/train."):
        check_some_used(part, counts, site.config)
    tokens = [whole for whole, _ in sizes] or [0]
    said = (
        f"{part.name}: {counts['read']} rows, {counts['used']} of them used{_told(counts)}; "
        f"{columns}; {min(tokens)} to {max(tokens)} tokens a row, "
        f"median {statistics.median_low(tokens)}, of {site.config.seq_length} (train.seq-length)"
    )
    most = max(counts[key] for key in _LOST)
    return Doubt(said) if most > MUCH * counts["read"] else said


def _told(counts: dict[str, int]) -> str:
    lost = {key: counts[key] for key in _LOST if counts.get(key)}
    return "".join(f", {n} {key.replace('_', ' ')}" for key, n in lost.items())


def gpu(site: Site) -> str:
    """That torch has computed something on it; visible it may be without that."""
    if device.device() == "cpu":
        return "the CPU (DEVICE=cpu)"
    site.gpu = device.look(site.folder / "state")
    return f"{device.device_name()}: torch computes on it: {site.gpu}"


def gpu_memory(site: Site) -> str:
    """Free, against what the run config's training needs."""
    if device.device() == "cpu":
        return "no figure for a CPU; the container's limit is SUPERNODE_MEMORY"
    if not site.gpu or not site.base:
        return Doubt("not computed: that needs the base model and a GPU")
    size = memory.check_free(site.gpu, site.base, site.config)
    return (
        f"{site.gpu.free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed (computed) for passes of "
        f"{memory.pass_tokens(site.config)} tokens"
    )


# In this order, by name. A row says what is so (a Doubt: as a warning), or raises SiteError or
# ConfigError with the cure.
ROWS: dict[str, Callable[[Site], str]] = {
    "policy": policy,
    "base model": base_model,
    "rows": train_rows,
    "held-out rows": holdout_rows,
    "device": gpu,
    "memory": gpu_memory,
}


def asked(site: Site) -> Iterator[dict[str, str]]:
    """Each of ROWS with its outcome: ok, warning or error."""
    for name, ask in ROWS.items():
        try:
            what = ask(site)
            status = "warning" if isinstance(what, Doubt) else "ok"
        except (SiteError, ConfigError) as err:
            status, what = "error", str(err)
        except OSError as err:
            status, what = "error", f"{err.filename}: {err.strerror}"
        except Exception as err:  # its words may be a row's
            print("".join(traceback.format_tb(err.__traceback__)), file=sys.stderr)
            status, what = "error", f"{type(err).__name__} in this check, at the lines above"
        yield {"row": name, "status": status, "what": what}


def main() -> int:
    env = os.environ
    try:
        _, config = merged_config(Path(__file__).parents[2], sys.argv[1:])
    except ConfigError as err:
        print(f"check: ERROR: {err}", file=sys.stderr)
        return NOT_CHECKED
    folder, models = Path(env["SITE_DIR"]), Path(env["MODELS_DIR"])
    site = Site(folder, models, config, env.get("DATA_COLUMNS", ""))
    print(json.dumps(list(asked(site))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
