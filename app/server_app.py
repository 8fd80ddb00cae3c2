"""The ServerApp: preflight, rounds, checkpoints. It imports neither torch nor transformers.

Results go to RESULTS_DIR of the SuperLink's environment, not to a path from the run config:
whoever submits a run must not choose where the server writes.
"""

import logging
import os
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from app.config import GIVEN_UP, MIB, SILENT, ConfigError, RunConfig
from app.server.best import name_best
from app.server.checkpoint import ResultsError, RunFolder
from app.server.events import EventFile, event
from app.server.orders import taken_before
from app.server.preflight import PreflightError, SilenceError, Sites, preflight
from app.server.resume import Earlier, adopt, bytes_before, find_earlier
from app.server.site_list import SiteListError, site_name
from app.server.site_rows import in_words
from app.server.strategy import HopelessError, RoundError, Strategy
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.noise import noise_norm

app = ServerApp()
logger = logging.getLogger("app")
# Figures of an evaluation that a round's line holds of before the round as well.
COMPARED = (
    "eval_loss", "eval_loss_median", "eval_token_accuracy", "eval_token_accuracy_median",
)  # fmt: skip


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run. Its end, good or bad, stands in run.json; an error of ours is one log line."""
    _log_to_stdout()
    facts: dict[str, Any] = {
        "run_id": str(context.run_id),
        "status": "running",
        "started": _now(),
        "versions": {p: version(p) for p in ("flwr", "numpy", "scipy")},
    }
    folder = None
    try:
        folder = RunFolder(Path(os.environ["RESULTS_DIR"]), context.run_id)
        logger.addHandler(EventFile(folder.path / "events.jsonl"))
        run(grid, RunConfig.from_flat(context.run_config), folder, facts)
        facts["status"] = "completed"
    except BaseException as err:  # flwr stop and SIGTERM end in SystemExit
        facts |= {"status": "failed", "error": str(err) or type(err).__name__}
        if isinstance(err, (ConfigError, PreflightError, SiteListError, RoundError, ResultsError)):
            logger.error("ERROR: %s", err)
        if isinstance(err, SilenceError):
            raise type(err)(f"{SILENT}{err}") from None  # superlink.submit looks for these two
        if isinstance(
            err, (ConfigError, PreflightError, SiteListError, ResultsError, HopelessError)
        ):
            raise type(err)(f"{GIVEN_UP}{err}") from None
        raise
    finally:
        if folder:
            with suppress(ResultsError):  # the disk may be what ended the run
                folder.write_run(facts | {"finished": _now()})
            ended = event("end", status=facts["status"], error=facts.get("error", ""))
            logger.debug("the run has %s", facts["status"], extra=ended)


def _log_to_stdout() -> None:
    # Not the root logger: httpx would then log each call that sends a log line, and so on.
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG)  # of ours: what is an event and no line of the log
    logger.propagate = False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def run(grid: Grid, config: RunConfig, folder: RunFolder, facts: dict[str, Any]) -> None:
    """Preflight, then the rounds, each with a checkpoint; adds what it learns to ``facts``."""
    started = time.monotonic()
    facts["config"] = config.flat()
    logger.debug("a run begins", extra=event("start", rounds=config.num_server_rounds))
    earlier = _taken_up(config, folder, facts)
    sites = preflight(grid, config, Path(os.environ["SITES_DIR"]))
    layout = _layout(sites, config)
    if earlier:
        adapter = earlier.adapter(layout, sites.fingerprint)
    else:
        adapter = initial_adapter(layout, config.seed)
    done = earlier.server_round if earlier else 0
    folder.reserve(config.num_server_rounds - done, adapter.nbytes)
    facts |= _agreed(sites, layout, config)
    folder.write_run(facts)

    def keep(bytes_sent: int) -> None:
        facts["bytes_sent"] = bytes_sent
        folder.write_run(facts)

    strategy = Strategy(
        grid, config, sites, layout, facts["run_id"], bytes_sent=facts["bytes_sent"], keep=keep
    )
    if earlier:
        before = earlier.lines[-1]
        strategy.take_up(earlier.lines)
        strategy.taken = taken_before(earlier.chain, earlier.lines)
    else:
        before = _before(strategy, adapter)
    _rounds(strategy, folder, facts, adapter, before)
    facts["seconds"] = time.monotonic() - started
    if best := facts.get("best"):
        logger.info("[best] round %d, held-out loss %.4f", best["round"], best["held_out_loss"])
    logger.info("[done] %s", folder.path / f"peft_{config.num_server_rounds}")


def _taken_up(config: RunConfig, folder: RunFolder, facts: dict[str, Any]) -> Earlier | None:
    """The run that this one goes on after, its rounds now in ``folder``; None: from the start."""
    earlier = find_earlier(folder.results, config)
    facts["bytes_sent"] = bytes_before(folder.results, config, earlier)
    if earlier:
        facts["resumed_from"] = earlier.chain
    folder.write_run(facts)  # before the rounds: a run that has some can be resumed
    if earlier:
        adopt(folder, earlier)
        name_best(folder, facts)
        logger.info(
            "[resume] after round %d of run %s", earlier.server_round, earlier.chain[-1]["run_id"]
        )
    return earlier


def _layout(sites: Sites, config: RunConfig) -> Layout:
    """Of the run's adapter. Raises ConfigError: the sites' base model and the config do not fit."""
    try:
        layout = Layout.of(sites.linear_layers, config)
    except ValueError as err:
        raise ConfigError(str(err)) from None
    length = noise_norm(config, layout.size)
    if length > config.max_update_norm:
        raise ConfigError(
            f"run config: the noise of privacy.noise-multiplier = {config.noise_multiplier:g} on "
            f"{layout.size} values is {length:.0f} long, and strategy.max-update-norm = "
            f"{config.max_update_norm:g} would refuse it; raise that, or lower the noise"
        )
    return layout


def _agreed(sites: Sites, layout: Layout, config: RunConfig) -> dict[str, Any]:
    """What the preflight found, for run.json; the log gets a line of it."""
    logger.info(
        "[preflight] %d sites ready with %s; base model %s, fingerprint %s; "
        "adapter of %d parameters, %.1f MiB",
        len(sites.node_of),
        in_words(sites.num_examples, sites.rows),
        config.model_name,
        sites.fingerprint,
        layout.size,
        4 * layout.size / MIB,
        extra=_ready(sites),
    )
    return {
        "base_model_fingerprint": sites.fingerprint,
        "layout": layout.hash,
        "adapter_parameters": layout.size,
        "sites": {
            site_name(p): {
                "node_id": str(sites.node_of[p]),
                "num_examples": sites.num_examples[p],
                "num_holdout": sites.num_holdout[p],
                "rows": sites.rows[p],
                "versions": sites.versions[p],
                "device": sites.devices[p],
                "policy": sites.policies[p],
            }
            for p in sites.node_of
        },
        "left_out": sites.left_out,
    }


def _ready(sites: Sites) -> dict[str, Any]:
    """The event of a preflight that let the run start."""
    told = {
        site_name(p): {
            "num_examples": sites.num_examples[p],
            "num_holdout": sites.num_holdout[p],
            "device": sites.devices[p],
        }
        for p in sites.node_of
    }
    return event("ready", sites=told, left_out=sites.left_out)


def _before(strategy: Strategy, adapter: Vector) -> dict[str, Any]:
    """The initial adapter's figures; nothing where nobody is evaluated."""
    before = strategy.evaluate(0, adapter)
    if before:
        logger.info(
            "[before] held-out loss %.4f, token accuracy %.4f (medians of %d sites)",
            before["eval_loss_median"],
            before["eval_token_accuracy_median"],
            len(before["eval_partitions"]),
            extra=event("before", held_out_loss=before["eval_loss_median"]),
        )
    return before


def _rounds(
    strategy: Strategy,
    folder: RunFolder,
    facts: dict[str, Any],
    adapter: Vector,
    before: dict[str, Any],
) -> None:
    """The rounds that ``folder`` lacks, each with a checkpoint, a line of figures, one of the log.

    ``before``: the figures of ``adapter``, with which they begin.
    """
    started, total, done = time.monotonic(), strategy.config.num_server_rounds, len(folder.lines)
    for server_round in range(done + 1, total + 1):
        adapter, line = strategy.train_round(server_round, adapter)
        manifest = {
            "base_model_fingerprint": strategy.sites.fingerprint,
            "alphas": line["alphas"],
            "partitions": line["partitions"],
        }
        kept = folder.save_round(server_round, strategy.layout, adapter, strategy.config, manifest)
        extra = event("checkpoint", round=server_round, folder=kept.name)
        logger.debug("[round %d] %s is complete", server_round, kept.name, extra=extra)
        before = _measure(strategy, server_round, adapter, line, before)
        folder.add_metrics(line)
        name_best(folder, facts)
        per_round = (time.monotonic() - started) / (server_round - done)
        _say(line, total, per_round * (total - server_round))


def _measure(
    strategy: Strategy,
    server_round: int,
    adapter: Vector,
    line: dict[str, Any],
    before: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate the round's adapter; its figures, also added to ``line`` beside those of before."""
    after = strategy.evaluate(server_round, adapter)
    if after and before.get("eval_partitions") == after["eval_partitions"]:
        line |= {f"{key}_before": before[key] for key in COMPARED if key in before}
    line |= after | strategy.budget()
    return after


def _say(line: dict[str, Any], total: int, left_s: float) -> None:
    held_out = f", held-out loss {line['eval_loss_median']:.4f}" if "eval_loss" in line else ""
    logger.info(
        "[round %d/%d] train loss %.4f%s; %.0f s; %.1f MiB sent, %.0f of the budget left; %s",
        line["round"],
        total,
        line["train_loss"],
        held_out,
        line["seconds"] + line.get("eval_seconds", 0.0),
        line["mb_sent"],
        line["mb_left"],
        f"about {left_s:.0f} s left" if left_s else "last round",
        extra=_told(line, left_s),
    )


def _told(line: dict[str, Any], left_s: float) -> dict[str, Any]:
    """The event of a complete round."""
    same = (
        "round",
        "train_loss",
        "shares",
        "alphas",
        "bytes_down",
        "bytes_up",
        "mb_sent",
        "mb_left",
    )
    return event(
        "round",
        **{key: line[key] for key in same},
        held_out_loss=line.get("eval_loss_median"),
        sites=[site_name(p) for p in line["partitions"]],
        losses=line["train_site_losses"],
        seconds=line["seconds"] + line.get("eval_seconds", 0.0),
        left_s=left_s,
    )
