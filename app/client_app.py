"""The ClientApp: what a SuperNode does with a message (in a process of its own).

The site's settings come from the SuperNode's environment: SITE_DIR (its own folder),
MODELS_DIR (prepared base models, read-only), MODELS_VERIFIED (what the SuperNode found of them),
and those of ``app.site.device``.
"""

import json
import logging
import os
import platform
import secrets
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from app.config import RunConfig
from app.site import libraries, memory, partition
from app.site.base_model import BaseModel, find
from app.site.device import device, look, take_turn, turn
from app.site.feedback import Feedback
from app.site.gate import GuardedApp, Visit, guarded
from app.site.last_lines import travels
from app.site.partition import SiteError
from app.site.privacy import privatise
from app.site.rows_used import rows_used
from app.site.verified import check_verified
from app.wire.adapter import Layout, Vector, initial_adapter
from app.wire.codec import decode, encode

app = GuardedApp()
logger = logging.getLogger("app")
logger.addHandler(logging.StreamHandler(sys.stderr))
logger.setLevel(logging.INFO)
logger.propagate = False


def _site_dir() -> Path:
    return Path(os.environ["SITE_DIR"])


def _base_model(config: RunConfig) -> BaseModel:
    base = find(Path(os.environ["MODELS_DIR"]), config.model_name, config.quantization)
    check_verified(base)
    return base


def _part(name: str) -> partition.Part:
    return partition.part_of(_site_dir(), name, os.environ.get("DATA_COLUMNS", ""))


def _rows_used(
    parts: dict[str, partition.Part], base: BaseModel, config: RunConfig
) -> dict[str, Any]:
    """How many rows the run can use, what becomes of the others, by part.

    Raises: SiteError as ``rows_used``.
    """
    counts = rows_used(parts, base, config)
    return {
        "num-examples": counts["train"]["used"],
        "num-holdout": counts["holdout"]["used"],
        "rows": json.dumps(counts),
    }


def _take_turn(message: Message, context: Context) -> None:
    """Two sites sampled on one GPU take turns instead of running out of its memory.

    From here to the end of this process, or no longer than the server waits for the reply.
    """
    take_turn(f"site-{int(context.node_config['partition-id']):02d}", message.metadata.ttl)


def _described(base: BaseModel, config: RunConfig) -> str:
    """This site's device, for the operator.

    Raises:
        SiteError: torch cannot use it, or the run needs more memory than is free.
    """
    if device() == "cpu":
        return "cpu"
    gpu = look(_site_dir() / "state")
    memory.check_free(gpu, base, config)
    return str(gpu)


def _answer(context: Context, facts: dict[str, Any]) -> RecordDict:
    """What a preflight is answered: these facts, or an error, and who says so."""
    said: dict[str, Any] = {
        "partition-id": int(context.node_config["partition-id"]),
        "num-partitions": int(context.node_config["num-partitions"]),
        # Flower stores an answer by its hash: one that can be foreseen, another site could spoil.
        "nonce": secrets.token_hex(16),
    }
    return RecordDict({"preflight": ConfigRecord(said | facts)})


@app.query()
@guarded(failed=lambda context, why: _answer(context, {"error": why}))
def preflight(message: Message, context: Context, visit: Visit) -> RecordDict:
    """What the server must know before a run. Reads data and base.json; imports no torch."""
    logger.info("%s", visit.policy)
    config = RunConfig.from_flat(context.run_config)
    parts = {name: _part(name) for name in ("train", "holdout")}
    if not visit.policy.held_out_losses:
        parts["holdout"] = partition.Part("", [])  # so nobody asks for them
    base = _base_model(config)
    visit.policy.check_run(config, base.fingerprint)
    rows = _rows_used(parts, base, config)
    visit.policy.check_round(config, rows["num-examples"])
    facts = rows | {
        "fingerprint": base.fingerprint,
        "linear-layers": json.dumps(base.linear_layers),
        "turn": turn(),
        "device": _described(base, config),
        "policy": visit.policy.sha256,
        "versions": json.dumps(
            {"python": platform.python_version()}
            | {p: version(p) for p in ("flwr", "torch", "transformers", "peft", "bitsandbytes")}
        ),
    }
    return _answer(context, facts)


def _received(
    message: Message, config: RunConfig
) -> tuple[BaseModel, Layout, Vector, ConfigRecord]:
    """Base model, layout, adapter and job of a message.

    Raises:
        SiteError: the adapter is of another layout than this site's base model asks for.
    """
    base = _base_model(config)
    layout = Layout.of(base.linear_layers, config)
    job = message.content.config_records["job"]
    if job["layout"] != layout.hash:
        raise SiteError(
            f"the run's adapter has layout {job['layout']!r}, this site's {layout.hash!r}"
        )
    payload = message.content.array_records["adapter"]["payload"].numpy().tobytes()
    vector = decode(config.down, payload, initial_adapter(layout, config.seed))
    return base, layout, vector, job


def _to_send(
    trained: Vector, received: Vector, layout: Layout, config: RunConfig, job: ConfigRecord
) -> bytes:
    """The trained adapter in the run's codec; what that leaves out is kept for the next time."""
    trained = privatise(trained, received, config)
    if config.up == "fp32" or not config.error_feedback:
        return encode(config.up, trained, received)
    upload, taken = cast(str, job["upload"]), cast(str | None, job.get("taken"))
    privacy = config.clip_norm, config.noise_multiplier
    feedback = Feedback(_site_dir() / "state", upload, taken, layout, privacy)
    before = feedback.before
    if before is None:
        logger.warning(
            "error feedback starts anew: state/ does not have what upload %s left out", taken
        )
    wanted = trained if before is None else trained + before
    payload = encode(config.up, wanted, received)
    try:
        feedback.write(wanted - decode(config.up, payload, received))
    except OSError as err:
        told = "no error feedback: state/ cannot be written: %s"
        logger.warning(told, err.strerror, extra=travels())
        return encode(config.up, trained, received)  # or the old rest would be added again
    return payload


@app.train()
@guarded()
def train(message: Message, context: Context, visit: Visit) -> RecordDict:
    """Fine-tune the received adapter on this site's rows; reply with the new one."""
    libraries.load()
    from app.site import base_model, training
    from app.site.chat import chosen
    from app.site.examples import encode_all

    config = RunConfig.from_flat(context.run_config)
    base, layout, vector, job = _received(message, config)
    server_round = cast(int, job["round"])
    visit.note(clip_norm=config.clip_norm, noise_multiplier=config.noise_multiplier)
    visit.policy.check_run(config, base.fingerprint)
    partition_id = int(context.node_config["partition-id"])
    rows = _part("train").rows
    _take_turn(message, context)
    started = time.monotonic()
    model, tokenizer = base_model.load_with_lora(base, config, device(), layout, vector)
    config = training.settled(config, base, device())
    chat = chosen(config.prompt, base.folder, base.name)
    examples = encode_all(rows, tokenizer, config.seq_length, chat)
    if not examples:
        raise SiteError(f"no row keeps an answer within {config.seq_length} tokens")
    visit.policy.check_round(config, len(examples))
    load_s = time.monotonic() - started
    logger.info(
        "round %d: %d rows, loaded in %.1f s", server_round, len(examples), load_s, extra=travels()
    )
    seed = int(
        np.random.SeedSequence([config.seed, server_round, partition_id]).generate_state(1)[0]
    )
    lr = config.learning_rate(server_round)
    mu = config.proximal_mu if config.strategy_name == "fedprox" else 0.0
    result = training.train(model, examples, config, lr, seed, mu)
    trained = base_model.get_adapter(model, layout)
    metrics = MetricRecord(
        {
            "partition-id": partition_id,
            "num-examples": len(examples),
            "train-loss": result.loss,
            "steps": result.steps,
            "num-tokens": result.tokens,
            "load-s": load_s,
            "train-s": result.seconds,
            "peak-memory-mb": training.peak_memory_mb(device()),
        }
    )
    payload = _to_send(trained, vector, layout, config, job)
    rows_used = min(len(examples), result.steps * config.rows_per_step)
    change = decode(config.up, payload, vector) - vector  # as whoever receives it sees it
    visit.note(rows=rows_used, steps=result.steps, change_norm=float(np.linalg.norm(change)))
    adapter = ArrayRecord({"payload": Array(np.frombuffer(payload, np.uint8))})
    return RecordDict({"adapter": adapter, "metrics": metrics})


@app.evaluate()
@guarded()
def evaluate(message: Message, context: Context, visit: Visit) -> RecordDict:
    """Score the received adapter on this site's held-out rows."""
    libraries.load()
    from app.site import base_model, training
    from app.site.chat import chosen
    from app.site.examples import encode_all

    config = RunConfig.from_flat(context.run_config)
    visit.policy.check_evaluation()
    base, layout, vector, _ = _received(message, config)
    visit.policy.check_run(config, base.fingerprint)
    _take_turn(message, context)
    model, tokenizer = base_model.load_with_lora(base, config, device(), layout, vector)
    chat = chosen(config.prompt, base.folder, base.name)
    examples = encode_all(_part("holdout").rows, tokenizer, config.seq_length, chat)
    visit.note(rows=len(examples))
    result = training.evaluate(model, examples, config)
    metrics = MetricRecord(
        {
            "partition-id": int(context.node_config["partition-id"]),
            "num-examples": len(examples),
            "loss-sum": result.loss_sum,
            "num-correct": result.num_correct,
            "num-tokens": result.num_tokens,
        }
    )
    return RecordDict({"metrics": metrics})
