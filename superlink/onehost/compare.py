"""Compare strategies and settings: the same rows, sites and seeds in every line of a TOML file.

    python -m superlink.onehost.compare FILE.toml [--deployment] [--out DIR]

Each line with each seed is a run in this process (superlink/onehost/rounds.py), or of a SuperLink
and SuperNodes of this machine (deployed.py), and leaves a line in FILE.jsonl. Started again, it
goes on with what is missing there; the adapters are in FILE.adapters, for the evaluation. Then it
prints means, spreads and paired differences, and writes them as FILE.md and FILE.svg.
"""

import argparse
import fcntl
import hashlib
import json
import platform
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from app.config import WHERE, ConfigError, RunConfig, flatten, merged_config
from app.server.preflight import PreflightError
from app.server.strategy import RoundError
from app.site.base_model import BaseModel, find
from app.site.partition import SiteError
from app.wire.adapter import Layout
from superlink.control import ControlError
from superlink.onehost.compare_results import CompareError, Key, fitting, known
from superlink.onehost.comparison import Results, commit, machine, plot, rows, table
from superlink.onehost.deployed import DeployedFederation
from superlink.onehost.processes import REPOSITORY
from superlink.onehost.rounds import Federation, arithmetic
from superlink.provision import ProvisionError
from supernode.download import PrepareError
from supernode.partitions import BUNDLED

LIBRARIES = (
    "accelerate", "bitsandbytes", "flwr", "numpy", "peft", "scipy", "tokenizers", "torch",
    "transformers",
)  # fmt: skip
# The file's own keys: what is allowed, the check, and the default where there is one.
KEYS: dict[str, tuple[str, Callable[[Any], bool], Any]] = {
    "rows": (
        '"bundled", or a file or folder beside this one',
        lambda v: type(v) is str and v != "",
        None,
    ),
    "model": ("the name of a prepared model", lambda v: type(v) is str and v != "", None),
    "sites": ("a whole number from 1", lambda v: type(v) is int and v > 0, None),
    "seeds": ("a list of different whole numbers from 0", lambda v: _are_seeds(v), None),
    "held-out-rows": ("of each site, a whole number from 1", lambda v: type(v) is int and v > 0, 8),
    "every-round": ("true or false", lambda v: type(v) is bool, False),
    "config": ("a table of run-config keys", lambda v: type(v) is dict, {}),
    "line": ("[[line]] tables", lambda v: type(v) is list and {*map(type, v)} == {dict}, None),
}
# Run-config keys that follow from those, or that a comparison sets itself; and those with which
# lines would not have the same rows and model.
FOLLOW = {
    "model.name", "seed", "resume", "strategy.min-nodes", "strategy.exclude-sites",
    "strategy.fraction-evaluate", "strategy.min-evaluate-nodes",
}  # fmt: skip
SHARED = {"model.quantization", "model.prompt", "train.seq-length"}


@dataclass(frozen=True)
class Plan:
    """What a file asks for, checked.

    Attributes:
        lines: name -> config; the seed is that of the first run.
    """

    file: Path
    rows: Path
    sites: int
    seeds: list[int]
    held_out_rows: int
    every_round: bool
    lines: dict[str, RunConfig]

    @classmethod
    def read(cls, file: Path) -> "Plan":
        """Raises CompareError: the file cannot be read, or something in it cannot work."""
        try:
            given = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise CompareError(f"{file}: {getattr(err, 'strerror', None) or err}") from None
        for key in given.keys() - KEYS.keys():
            raise CompareError(f"{file}: unknown key {key}; known: {', '.join(KEYS)}")
        top = {key: given.get(key, default) for key, (_, _, default) in KEYS.items()}
        for key, (allowed, check, _) in KEYS.items():
            if not check(top[key]):
                said = f"{key} = {given[key]!r}" if key in given else f"{key} is missing"
                raise CompareError(f"{file}: {said}: it must be {allowed}")
        source = BUNDLED if top["rows"] == "bundled" else file.parent / top["rows"]
        if not source.exists():
            raise CompareError(f"{file}: rows = {top['rows']!r}: there is no {source}")
        fixed = {
            "model.name": top["model"], "seed": top["seeds"][0],
            "strategy.min-nodes": top["sites"], "strategy.fraction-evaluate": 1.0,
            "strategy.min-evaluate-nodes": 1,
        }  # fmt: skip
        common, lines = _keys(file, "[config]", top["config"], FOLLOW), {}
        for number, given_line in enumerate(top["line"], 1):
            name = given_line.pop("name", None)
            usable = isinstance(name, str) and name.strip() and name.isprintable()
            if not usable or {"|", "/"} & {*name} or name in lines:
                raise CompareError(
                    f"{file}: [[line]] {number}: name = {name!r}: it must be a text without line "
                    "breaks, | and /, and no other line's"
                )
            own = _keys(file, f"line {name!r}", given_line, FOLLOW | SHARED)
            try:
                config = merged_config(REPOSITORY, [])[1].flat() | common | own | fixed
                lines[name] = RunConfig.from_flat(config)
            except ConfigError as err:
                told = str(err).removesuffix(f"; {WHERE}")
                raise CompareError(f"{file}: line {name!r}: {told}") from None
        settled = top["sites"], top["seeds"], top["held-out-rows"], top["every-round"]
        return cls(file, source, *settled, lines)

    def config(self, name: str, seed: int) -> RunConfig:
        return replace(self.lines[name], seed=seed)


def _are_seeds(given: Any) -> bool:
    whole = type(given) is list and all(type(seed) is int and seed >= 0 for seed in given)
    return whole and len({*given}) == len(given) > 0


def _keys(file: Path, where: str, table: dict[str, Any], others: set[str]) -> dict[str, Any]:
    """The table flat. Raises CompareError: one of its keys belongs elsewhere."""
    flat = flatten(table)
    for key in flat.keys() & others:
        why = "it must be the same in every line: set it in [config]"
        if key in FOLLOW:
            why = f"a comparison sets it itself, by {', '.join(list(KEYS)[:6])} of the file"
        raise CompareError(f"{file}: {where}: {key} = {flat[key]!r}: {why}")
    return flat


def _base(plan: Plan, models: Path) -> BaseModel:
    """Their base model. Raises CompareError, SiteError: it is not prepared, or does not fit."""
    first = next(iter(plan.lines.values()))
    base = find(models, first.model_name, first.quantization)
    for name, config in plan.lines.items():
        try:
            Layout.of(base.linear_layers, config)
        except ValueError as err:
            raise CompareError(f"{plan.file}: line {name!r}: {err}") from None
    return base


def made_of(plan: Plan, federation: Federation, name: str, seed: int) -> dict[str, Any]:
    """All that a result depends on. Where one of these is another, it is another result."""
    ours = ("rounds.py", "deployed.py") if federation.deployed else ("rounds.py",)
    code = [*sorted((REPOSITORY / "app").rglob("*.py")), *map(Path(__file__).with_name, ours)]
    return {
        **plan.config(name, seed).flat(),
        "every-round": plan.every_round,
        "SHA-256 of the rows": federation.rows,
        "fingerprint of the model": federation.base.fingerprint,
        "SHA-256 of the code": hashlib.sha256(b"".join(p.read_bytes() for p in code)).hexdigest(),
        "versions": {p: version(p) for p in LIBRARIES} | {"python": platform.python_version()},
        "machine": f"{arithmetic()}, {machine()}",
        **({"deployment": True} if federation.deployed else {}),
    }


def compare(plan: Plan, models: Path, out: Path, way: type[Federation] = Federation) -> int:
    """Run what is missing that way, say and write what was found; 1 where a run has failed."""
    base = _base(plan, models)
    out.mkdir(parents=True, exist_ok=True)
    path, failed = out / f"{plan.file.stem}.jsonl", 0
    with tempfile.TemporaryDirectory() as work, path.open("a", encoding="utf-8") as file:
        _alone(file, path)
        federation = way(Path(work), plan.rows, plan.sites, plan.held_out_rows, base)
        for note in federation.notes:
            say(note)
        wanted = {
            (name, seed): made_of(plan, federation, name, seed)
            for seed in plan.seeds for name in plan.lines
        }  # fmt: skip
        records = [r for r in known(path) if ("deployment" in r["made_of"]) is federation.deployed]
        found, others = fitting(records, wanted)
        for why, results in others.items():
            say(f"{path.name}: not used: {'; '.join(results)}: {why}")
        say(f"{len(found)} of {len(wanted)} results are there")
        if missing := [key for key in wanted if key not in found]:
            with federation.sites():
                for name, seed in missing:
                    adapter = _empty(path.with_suffix(".adapters") / f"{name}, seed {seed}")
                    try:
                        run = federation.run(plan.config(name, seed), plan.every_round, adapter)
                    except RoundError as err:
                        shutil.rmtree(adapter)
                        say(f"{name}, seed {seed}: failed, and no result: {err}")
                        failed = 1
                        continue
                    record = {
                        "line": name, "seed": seed, **run, "commit": commit(REPOSITORY),
                        "date": datetime.now(UTC).isoformat(timespec="seconds"),
                        "made_of": wanted[name, seed],
                    }  # fmt: skip
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    found[name, seed] = record
                    say(f"{name}, seed {seed}: loss {run['loss']:.4f}, {run['mib']:.2f} MiB")
    _tell(plan, found, path)
    return failed


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _alone(file: IO[str], path: Path) -> None:
    """Raises CompareError: another process writes to it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CompareError(f"{path}: another comparison is writing to it") from None


def _tell(plan: Plan, found: dict[Key, dict[str, Any]], path: Path) -> None:
    results: Results = {
        name: {seed: found[name, seed] for seed in plan.seeds if (name, seed) in found}
        for name in plan.lines
    }
    if not found:
        return
    for (name, seed), run in found.items():
        if run["rejected"]:
            say(f"{name}, seed {seed}: {run['rejected']} replies could not be used")
    print(f"\n{table(results)}\n")
    commits = " and ".join(dict.fromkeys(run["commit"] for run in found.values()))
    for suffix, content in (".md", rows(results, commits)), (".svg", plot(results)):
        path.with_suffix(suffix).write_text(content, encoding="utf-8")
        say(f"written: {path.with_suffix(suffix)}")


def say(text: str) -> None:
    print(f"compare: {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="superlink.onehost.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("file", type=Path, help="what is compared, as in docs/researcher.md")
    parser.add_argument(
        "--deployment", action="store_true",
        help="by a SuperLink and SuperNodes of this machine, not in one process",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results; by default the file's")
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    args = parser.parse_args(arguments)
    way = DeployedFederation if args.deployment else Federation
    try:
        return compare(Plan.read(args.file), args.models, args.out or args.file.parent, way)
    except (
        CompareError, ConfigError, ControlError, OSError, PrepareError, PreflightError,
        ProvisionError, SiteError,
    ) as err:  # fmt: skip
        print(f"compare: ERROR: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare: stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # unwind as on Ctrl-C
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
