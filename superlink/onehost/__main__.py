"""The whole federation as processes of this machine: no Docker, no GPU needed.

    python -m superlink.onehost --sites 4          (what ``make demo`` runs)

The same SuperLink, SuperNodes, ClientApp and ServerApp as in the containers, with TLS and
SuperNode authentication, on free ports. Everything it starts it also stops.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from app.config import MIB, ConfigError, merged_config
from superlink.control import ControlError
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.page.document import REPORT
from superlink.page.reports import Reports
from superlink.provision import ProvisionError
from superlink.submit import submit

# Medians of the sites: no single one decides them (app/server/held_out.py).
_SHOWN = ("eval_loss_median", "eval_token_accuracy_median")


def table(run: Path) -> str:
    """The run's rounds as text: held-out loss and accuracy before and after, bytes, seconds."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [("round", "sites", "train loss", "held-out loss", "token accuracy", "MiB sent", "s")]
    for m in lines:
        sent = m["bytes_down"] + m["bytes_up"] + m.get("eval_bytes_down", 0)
        loss = acc = "-"
        if "eval_loss" in m:
            loss, acc = (f"{m[key]:.4f}" for key in _SHOWN)
        if "eval_loss_median_before" in m:
            loss, acc = (f"{m[f'{key}_before']:.4f} -> {m[key]:.4f}" for key in _SHOWN)
        rows.append(
            (
                str(m["round"]),
                " ".join(f"{p:02d}" for p in m["partitions"]),
                f"{m['train_loss']:.4f}",
                loss,
                acc,
                f"{sent / MIB:.2f}",
                f"{m['seconds'] + m.get('eval_seconds', 0):.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _prepare(args: argparse.Namespace, federation: Path) -> None:
    command = [
        sys.executable, "-m", "supernode.prepare", "all", "--name", args.model,
        "--quantization", args.quantization, "--models", str(args.models),
        "--federation", str(federation), "--sites", str(args.sites), "--source", args.data,
    ]  # fmt: skip
    # How far it is, and an error, it says on stderr.
    done = subprocess.run(
        command, cwd=REPOSITORY, check=False, stdout=subprocess.PIPE, encoding="utf-8"
    )
    for line in done.stdout.splitlines():
        if not line.startswith("prepare: site-"):  # so many of them; what was left out is told
            print(line, flush=True)
    if done.returncode:
        raise ControlError("base model and data are not prepared; the reason stands above")


def _evaluate(args: argparse.Namespace, run: Path) -> int:
    """What the evaluation container does, as a process."""
    command = [
        sys.executable, "-m", "eval", "--results", str(run.parent), "--run", run.name,
        "--models", str(args.models), "--datasets", "demo-yesno,demo-four,demo-five",
    ]  # fmt: skip
    env = {"DEVICE": "cpu", **os.environ}
    return subprocess.run(command, cwd=REPOSITORY, env=env, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="superlink.onehost", description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--data", default="bundled", help="JSON, JSONL or parquet file, or hub id")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="FILE|PAIRS",
        help="on top of app/profiles/demo.toml",
    )
    parser.add_argument("--work", type=Path, default=REPOSITORY / ".demo")
    parser.add_argument("--models", type=Path, default=REPOSITORY / ".demo" / "models")
    parser.add_argument(
        "--results", type=Path, default=os.environ.get("RESULTS_DIR", REPOSITORY / "results")
    )
    args = parser.parse_args()
    if not 1 <= args.sites <= 100:
        parser.error(f"--sites {args.sites}: 1 to 100")
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):  # unwind as on Ctrl-C
            signal.signal(number, signal.default_int_handler)
        return demo(args)
    except (ControlError, ConfigError, ProvisionError) as err:
        print(f"demo: ERROR: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; every process it started has ended", file=sys.stderr)
        return 130
    finally:
        Reports(args.results).write()  # of a run that failed, or was stopped, as well


def demo(args: argparse.Namespace) -> int:
    """Prepare, start, run, show; the exit code of the run."""
    config = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"strategy.min-nodes={args.sites}",
        f"model.name={json.dumps(args.model)}",
        *args.run_config,
    ]
    merged_config(REPOSITORY, config)  # before minutes of preparation
    started = time.monotonic()
    with LocalFederation(args.work, args.models, args.results, args.sites) as federation:
        say(f"1/5 keys and certificates of {args.sites} sites")
        federation.provision()
        say("2/5 base model and data (the first time: download and conversion, a minute)")
        _prepare(args, federation.federation)
        say(f"3/5 SuperLink and {args.sites} SuperNodes; logs in {args.work / 'logs'}")
        control = federation.start()
        say("4/5 the run")
        code = submit(REPOSITORY, config, control, federation.public, federation.check_enough_run)
    if code == 0:
        ended = args.results.glob("*/run.json")
        run = max(ended, key=lambda facts: facts.stat().st_mtime).parent.resolve()
        print(f"\n{table(run)}\n")
        say(f"final adapter: {run / max(run.glob('peft_*'), key=_round_of).name}")
        say("5/5 evaluation: base model and final adapter on the bundled questions")
        code = _evaluate(args, run)
        Reports(args.results).write()
        say(f"the run on one page: {run / REPORT}")
    say(f"{'done' if code == 0 else 'failed'} after {time.monotonic() - started:.0f} s")
    return code


def _round_of(folder: Path) -> int:
    return int(folder.name.removeprefix("peft_"))


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
