"""Score adapters, and the base model beside them.

    python -m eval                            the newest run's final adapter
    python -m eval --all-rounds               every checkpoint of it; marks the best
    python -m eval --base-model-name-path M --peft-path P --datasets medqa --run-name fl
    python -m eval score FILE...              re-score generation files
    python -m eval fetch                      benchmark data into the cache, for hosts without hub
    python -m eval pack > benchmarks.tar      what the cache has of them, to be brought along
    python -m eval export --round best --to FOLDER      take it home, with a model card

From the environment: RESULTS_DIR, MODELS_DIR, MODEL_CACHE, DEVICE (cuda or cpu),
EVAL_DATASETS.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from app.site.partition import SiteError
from eval import EvalError
from eval.benchmarks import BENCHMARKS, LEADERBOARD, Question, benchmark, load
from eval.fetch import default_cache, fetch
from eval.pack import pack
from eval.scoring import score_file
from supernode.hub import find_the_way

if TYPE_CHECKING:
    from eval.model import Adapter


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"score": _score, "fetch": _fetch, "pack": pack, "export": _export}
    command = commands[given.pop(0)] if given and given[0] in commands else _evaluate
    find_the_way()
    try:
        return command(given)
    except (EvalError, SiteError, OSError) as err:
        print(f"eval: ERROR: {err}", file=sys.stderr)
    except KeyboardInterrupt:
        print("eval: stopped; run it again to go on", file=sys.stderr)
        return 130
    return 1


def _score(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval score", description="Re-score files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args(arguments).files:
        name, result = score_file(path)
        print(name, result["accuracy"], result["n"], result["unparsed"])
    return 0


def _fetch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval fetch", description="Fetch questions.")
    _datasets_and_cache(parser)
    args = parser.parse_args(arguments)
    for name in args.datasets:
        if (chosen := BENCHMARKS[name]).repository:
            path = fetch(name, chosen.repository, chosen.file, chosen.revision, args.cache)
            print(f"eval: {name}: {path}", flush=True)
    return 0


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval export", description="A run's adapter with a model card, to pass on."
    )
    _of_results(parser)
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new one")
    parser.add_argument(
        "--merge", action="store_true",
        help="the base model with the adapter merged in, in 16 bits, in the adapter's place; in "
        "memory 4 bytes a parameter",
    )  # fmt: skip
    parser.add_argument("--models", type=Path, default=os.environ.get("MODELS_DIR", "models"))
    args = parser.parse_args(arguments)
    _quiet()
    from eval.export import export

    models = args.models if args.merge else None
    print(
        "eval:", export(args.results, args.run or "latest", args.round or "last", args.to, models)
    )
    return 0


def _datasets_and_cache(parser: argparse.ArgumentParser) -> None:
    env = os.environ.get
    parser.add_argument(
        "--datasets",
        type=_names,
        default=env("EVAL_DATASETS") or ",".join(LEADERBOARD),
        help=f"comma-separated, of {', '.join(BENCHMARKS)}; default: %(default)s",
    )
    parser.add_argument("--cache", type=Path, default=default_cache())


def _of_results(parser: argparse._ActionsContainer) -> None:
    default = os.environ.get("RESULTS_DIR", "results")
    parser.add_argument("--results", type=Path, default=default)
    parser.add_argument("--run", help="a run of the results folder; default: latest, the newest")
    parser.add_argument(
        "--round", type=_round, metavar="best|last|N",
        help="best: of the lowest held-out loss at the sites; default: last",
    )  # fmt: skip


def _round(text: str) -> str:
    if text in ("best", "last") or text.isdecimal():
        return text
    raise EvalError(f"--round {text}: best, last, or the number of a round")


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        benchmark(name)  # all of them, before the first is fetched
    return names


def _parse(arguments: list[str]) -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_argument_group("what is scored")
    _of_results(which)
    which.add_argument("--all-rounds", action="store_true")
    which.add_argument("--wait", type=float, default=0, metavar="MINUTES")
    which.add_argument("--peft-path", help="any PEFT folder, or 'none' for the base model alone")
    which.add_argument("--base-model-name-path", help="default: what the adapter was trained on")
    _datasets_and_cache(parser)
    parser.add_argument("--data-dir", type=Path, help="files of questions, instead of the hub's")
    parser.add_argument("--limit", type=int, help="only the first N questions of each set")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--quantization", default="4", help="4 (the leaderboard's), 8, 0, or nf4-bf16 (fast)"
    )
    parser.add_argument("--models", type=Path, default=env("MODELS_DIR", "models"))
    parser.add_argument("--run-name", help="in the file names; default: fl, or peft_<round>")
    parser.add_argument("--out", type=Path, help="default: the run's eval folder, or benchmarks")
    args = parser.parse_args(arguments)
    if args.limit is not None and args.limit < 1:
        raise EvalError(f"--limit {args.limit}: must be 1 or more; leave it out for all questions")
    if not 0 <= args.wait < float("inf"):
        raise EvalError(f"--wait {args.wait}: must be 0 or more minutes")
    if args.batch_size < 1:
        raise EvalError(f"--batch-size {args.batch_size}: must be 1 or more")
    if args.quantization not in ("4", "8", "0", "nf4-bf16"):
        raise EvalError(f"--quantization {args.quantization}: one of 4, 8, 0, nf4-bf16")
    if args.peft_path and (args.run or args.round is not None or args.all_rounds):
        raise EvalError("--peft-path names the adapter; leave out --run, --round, --all-rounds")
    if args.all_rounds and args.round is not None:
        raise EvalError("--all-rounds and --round exclude each other")
    if args.run_name and not args.run_name.replace("-", "").replace("_", "").isalnum():
        raise EvalError(f"--run-name {args.run_name}: letters, digits, - and _ only")
    if args.run_name == "base" and args.peft_path != "none":
        raise EvalError("--run-name base: the base model's own files have that name")
    return args


def _evaluate(arguments: list[str]) -> int:
    args = _parse(arguments)
    # Everything that can be wrong with the questions, before seconds of imports and of loading.
    sets = {name: load(name, args.data_dir, args.cache, args.limit) for name in args.datasets}
    # Before torch is loaded: where others compute as well (SuperNodes, on a CPU), threads that
    # spin while they wait halve everybody's speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _quiet()
    from eval.folder import claimed
    from eval.model import base_model_name

    run, adapters = _adapters(args)
    name = args.base_model_name_path or (base_model_name(adapters[0]) if adapters else None)
    if not name:
        raise EvalError("--base-model-name-path: which base model?")
    out = args.out or (run / "eval" if run else Path("benchmarks"))
    with claimed(out):
        _score_into(out, name, args, sets, run, adapters)
    return 0


def _score_into(
    out: Path,
    name: str,
    args: argparse.Namespace,
    sets: dict[str, tuple[list[Question], str]],
    run: Path | None,
    adapters: "list[Adapter]",
) -> None:
    """Answers, scores and report of base model ``name`` and adapters, into ``out``."""
    from eval.evaluation import evaluate
    from eval.model import load_base
    from eval.prompt import trained_with, words
    from eval.report import write_report
    from eval.results import metrics, state
    from eval.summary import PUBLISHED, text_table

    # Both now: what a run that is going on does meanwhile is not what is scored here.
    status, rounds = (state(run), metrics(run)) if run else (None, [])
    if run:
        print(f"eval: run {run.name}, {status}: {', '.join(a.name for a in adapters)}")
    print(f"eval: base model {name}, --quantization {args.quantization}", flush=True)
    prompt = trained_with(adapters)
    base = load_base(name, args.quantization, _device(), args.models, args.cache)
    chat = words(prompt, base)
    subjects = evaluate(base, adapters, sets, args.batch_size, args.run_name or "base", out, chat)
    report = {
        "run": run.name if run else None,
        "status": status,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": base.facts,
        "settings": {
            "batch_size": args.batch_size,
            "limit": args.limit,
            "data": str(args.data_dir or "bundled, or the hub's at pinned revisions"),
            **({"prompt": "the base model's chat template, as in training"} if chat else {}),
        },
        "versions": {
            p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes", "scipy")
        },
        "datasets": {
            name: {
                "title": benchmark(name).title,
                "questions": len(questions),
                "expected": benchmark(name).questions or None,
                "source": origin,
            }
            for name, (questions, origin) in sets.items()
        },
        "published": PUBLISHED,
        "subjects": subjects,
        "best": max(subjects[1:], key=lambda s: s["average"])["name"] if adapters[1:] else None,
        "rounds": rounds,
    }
    try:
        page = write_report(out, report)
    except OSError as err:
        raise EvalError(f"cannot write the report to {out}: {err.strerror}") from None
    print(f"\n{text_table(report)}\n\neval: report: {page}", flush=True)


def _quiet() -> None:
    """Between progress bars only what concerns the user."""
    import logging
    import warnings

    for library in ("transformers", "httpx", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="(transformers|peft|bitsandbytes)[.]")


def _device() -> str:
    device = os.environ.get("DEVICE")
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise EvalError(f"DEVICE={device}: must be cuda or cpu")
    return device


def _adapters(args: argparse.Namespace) -> "tuple[Path | None, list[Adapter]]":
    """The run they are from, if any, and the adapters to be scored."""
    from dataclasses import replace

    from eval.model import Adapter
    from eval.results import adapters, choose_run, round_number

    if args.peft_path:
        if args.peft_path == "none":
            return None, []
        return None, [Adapter(Path(args.peft_path), args.run_name or "fl")]
    run = choose_run(args.results, args.run, args.wait * 60)
    found = adapters(run, round_number(run, args.round), args.all_rounds)
    if args.run_name:
        suffix = len(found) > 1
        found = [
            replace(a, name=f"{args.run_name}_{a.round}" if suffix else args.run_name)
            for a in found
        ]
    return run, found


if __name__ == "__main__":
    sys.exit(main())
