"""The run config: the only place that reads its keys.

Keys keep FlowerTune's names where FlowerTune has them. Flower hands the merged values
(pyproject.toml, then ``--run-config``) over as a flat dict of int, float, bool and str.
"""

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from os.path import normpath
from pathlib import Path
from typing import Any, get_args

from app.allowed import (
    FROM_0,
    NOT_EMPTY,
    POSITIVE,
    RUNS,
    SECONDS_TO_A_WEEK,
    SHARE,
    SITES,
    YES_NO,
    one_of,
    whole_from,
)

STRATEGIES = ("fedavgopt", "fedavg", "fedavgopt-delta", "fedprox", "rda")
CODECS = ("fp32", "bf16", "int8", "int4")
PROMPTS = ("alpaca", "chat")
# Begins the error of a run that would end the same way if it were resumed.
GIVEN_UP = "given up: "
# Begins that of one that ended before round 1, because sites kept silent: there is nothing of it to
# be resumed, and another may find them.
SILENT = "not begun: "
# Sizes are in MiB: what the leaderboard calls MB can only be these, and so are those of the names
# that hold "mb": communication.budget-mb, mb_sent, mb_left, peak_memory_mb.
MIB = 2**20
WHERE = "set it in pyproject.toml [tool.flwr.app.config] or with --run-config"


class ConfigError(ValueError):
    """A run-config key or value that cannot work; the message is one line for the user."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested TOML tables to dotted keys, as Flower does."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _key(name: str, allowed: str, check: Callable[[Any], bool]) -> Any:
    return field(metadata={"key": name, "allowed": allowed, "check": check})


_ARGS = "train.training-arguments."


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One checked run config; every field names its key, what is allowed, and the check."""

    num_server_rounds: int = _key("num-server-rounds", *whole_from(1))
    # Seeds the initial adapter, the sampling of sites and the order of each site's rows.
    seed: int = _key("seed", *whole_from(0))
    # Go on after the last complete round of the first of these runs that has one.
    resume: str = _key("resume", *RUNS)

    model_name: str = _key("model.name", *NOT_EMPTY)
    quantization: int = _key(
        "model.quantization", "4 or 8 (bits), or 0 for none", lambda v: v in (0, 4, 8)
    )
    # The words around a question, in training and evaluation: FlowerTune's, or those of the base
    # model's own chat template (app/site/chat.py).
    prompt: str = _key("model.prompt", *one_of(*PROMPTS))
    # auto: on at a site whose GPU would have too little memory without it.
    gradient_checkpointing: bool | str = _key(
        "model.gradient-checkpointing", "true, false or auto", lambda v: v in (True, False, "auto")
    )
    lora_r: int = _key("model.lora.peft-lora-r", *whole_from(1))
    lora_alpha: int = _key("model.lora.peft-lora-alpha", *whole_from(1))
    lora_dropout: float = _key(
        "model.lora.peft-lora-dropout", "a number from 0 to below 1", lambda v: 0 <= v < 1
    )
    # Comma-separated endings of module names, or "all-linear", as in PEFT.
    target_modules: str = _key("model.lora.target-modules", *NOT_EMPTY)

    lr_max: float = _key("train.learning-rate-max", *POSITIVE)
    lr_min: float = _key("train.learning-rate-min", *FROM_0)
    # How it falls over the rounds; constant where both are the same.
    schedule: str = _key("train.learning-rate-schedule", *one_of("cosine", "linear"))
    seq_length: int = _key("train.seq-length", *whole_from(16))
    # A batch of more goes through the model in several passes, of whole rows, and one longer row
    # alone: this decides about a GPU's memory and changes nothing else.
    max_tokens_per_pass: int = _key("train.max-tokens-per-pass", *whole_from(1))
    batch_size: int = _key(_ARGS + "per-device-train-batch-size", *whole_from(1))
    gradient_accumulation_steps: int = _key(_ARGS + "gradient-accumulation-steps", *whole_from(1))
    num_train_epochs: float = _key(_ARGS + "num-train-epochs", *POSITIVE)
    # As in Transformers: above 0 it overrides num-train-epochs.
    max_steps: int = _key(
        _ARGS + "max-steps", "a whole number above 0, or -1", lambda v: v > 0 or v == -1
    )

    # fedavgopt (the paper's), fedavg, fedavgopt-delta (its objective on the sites' changes),
    # fedprox (fedavg, with a proximal term at the sites), or rda (directions and lengths of the
    # sites' changes, averaged apart).
    strategy_name: str = _key("strategy.name", *one_of(*STRATEGIES))
    # FedAvgOpt's minimiser: nelder-mead follows the paper's code, bfgs is exact with many sites.
    solver: str = _key("strategy.solver", *one_of("nelder-mead", "bfgs"))
    # fedprox: each site also minimises mu / 2 times the squared distance to what it received.
    proximal_mu: float = _key("strategy.proximal-mu", *FROM_0)
    # A factor on what a round changes, with every strategy: new = old + server-lr times (aggregated
    # - old). No momentum: the next round knows nothing of it.
    server_lr: float = _key(
        "strategy.server-lr", "a number above 0, at most 10", lambda v: 0 < v <= 10
    )
    # Sites in a round: fraction of the usable ones, never fewer than min-train-nodes (as Flower).
    fraction_train: float = _key("strategy.fraction-train", *SHARE)
    min_train_nodes: int = _key("strategy.min-train-nodes", *whole_from(1))
    # 0 switches evaluation off; otherwise the same sites are evaluated after every round.
    fraction_evaluate: float = _key(
        "strategy.fraction-evaluate", "a number from 0 to 1", lambda v: 0 <= v <= 1
    )
    min_evaluate_nodes: int = _key("strategy.min-evaluate-nodes", *whole_from(1))
    # The run starts when this many SuperNodes are online.
    min_nodes: int = _key("strategy.min-nodes", *whole_from(1))
    # If false, sites that fail the preflight are left out as long as min-nodes others are fine.
    require_all_nodes: bool = _key("strategy.require-all-nodes", *YES_NO)
    # These are not asked at all, and count nowhere; their keys stay registered.
    exclude_sites: str = _key("strategy.exclude-sites", *SITES)
    # A round with fewer usable replies than min-replies is repeated with other sites: one of a
    # single reply is that site's adapter alone.
    min_replies: int = _key("strategy.min-replies", *whole_from(1))
    max_retries: int = _key("strategy.max-retries", *whole_from(0))
    # A site weighs as many rows as it used in the round, but no more than this share of all. Sites
    # of equal weight never notice; of two in a round each is a half, whatever their sizes. Where
    # it is below 1 / sites, all weigh the same. 1: no limit.
    max_share: float = _key("strategy.max-share", *SHARE)
    # A reply whose change is longer than this many times the usual one, for its learning rate and
    # steps, takes no part; nor does one longer than max-update-norm.
    max_norm_ratio: float = _key("strategy.max-norm-ratio", *POSITIVE)
    max_update_norm: float = _key("strategy.max-update-norm", *POSITIVE)
    node_timeout_s: float = _key("strategy.node-timeout-s", *POSITIVE)
    # So long a site may take, and so long Flower keeps a message and its reply; then the site's
    # SuperNode ends the work on it. Sites that share a device take turns: for them it is so many
    # times as long.
    round_timeout_s: float = _key("strategy.round-timeout-s", *SECONDS_TO_A_WEEK)

    # How adapters travel (app/wire/codec.py), both ways; down and up override it one by one.
    codec: str = _key("communication.codec", *one_of(*CODECS))
    codec_down: str = _key("communication.down", *one_of("codec", *CODECS))
    codec_up: str = _key("communication.up", *one_of("codec", *CODECS))
    # A site keeps what its last coarse upload left out and adds it to its next.
    error_feedback: bool = _key("communication.error-feedback", *YES_NO)
    # The FlowerTune leaderboard's limit is its 200,000 MB, counted as MiB here; the log says how
    # much of it is used.
    budget_mb: float = _key("communication.budget-mb", *POSITIVE)

    # At the site, before the upload: the change is clipped to this length (0: not at all), and
    # gets Gaussian noise of noise-multiplier times it on every value.
    clip_norm: float = _key("privacy.clip-norm", *FROM_0)
    noise_multiplier: float = _key("privacy.noise-multiplier", *FROM_0)

    dataset_name: str = _key("static.dataset.name", *NOT_EMPTY)

    @classmethod
    def from_flat(cls, values: Mapping[str, object]) -> "RunConfig":
        """Check ``values`` and freeze them.

        Raises:
            ConfigError: a key is unknown or missing, or a value is of the wrong type, out of
                range, or at odds with another.
        """
        known = {f.metadata["key"]: f for f in fields(cls)}
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, cutoff=0.5) or sorted(known)
                raise ConfigError(f"run config: unknown key {key}; known: {', '.join(near)}")
        checked: dict[str, Any] = {}
        for key, f in known.items():
            if key not in values:
                raise ConfigError(f"run config: {key} is missing: {f.metadata['allowed']}; {WHERE}")
            given = values[key]
            # Flower hands over what the user typed: 1 for a number that may have a fraction.
            value = float(given) if f.type is float and type(given) is int else given
            if type(value) not in (get_args(f.type) or (f.type,)) or not f.metadata["check"](value):
                allowed = f.metadata["allowed"]
                raise ConfigError(f"run config: {key} = {given!r} must be {allowed}; {WHERE}")
            checked[f.name] = value
        checked["model_name"] = normpath(checked["model_name"])  # as supernode.prepare writes it
        config = cls(**checked)
        config._check_together()
        return config

    def _check_together(self) -> None:
        for low, high in (
            ("lr_min", "lr_max"),
            ("min_train_nodes", "min_nodes"),
            ("min_replies", "min_nodes"),
        ):
            if getattr(self, low) > getattr(self, high):
                names = {f.name: f.metadata["key"] for f in fields(self)}
                raise ConfigError(
                    f"run config: {names[low]} = {getattr(self, low)} is above "
                    f"{names[high]} = {getattr(self, high)}; {WHERE}"
                )

        if self.noise_multiplier and not self.clip_norm:
            raise ConfigError(
                f"run config: privacy.noise-multiplier = {self.noise_multiplier:g} needs "
                f"privacy.clip-norm above 0; {WHERE}"
            )
        sampled = max(int(self.min_nodes * self.fraction_train), self.min_train_nodes)
        if self.min_replies > sampled:
            raise ConfigError(
                f"run config: strategy.min-replies = {self.min_replies} can never come from the "
                f"{sampled} sites of a round (strategy.fraction-train, min-train-nodes); {WHERE}"
            )

    @property
    def down(self) -> str:
        """Codec from the server to the sites."""
        return self.codec if self.codec_down == "codec" else self.codec_down

    @property
    def up(self) -> str:
        """Codec from the sites to the server."""
        return self.codec if self.codec_up == "codec" else self.codec_up

    @property
    def targets(self) -> list[str] | str:
        """target-modules as PEFT takes them: a list of name endings, or "all-linear"."""
        names = [name.strip() for name in self.target_modules.split(",")]
        return "all-linear" if names == ["all-linear"] else names

    def flat(self) -> dict[str, object]:
        """The config as Flower's flat dict; ``from_flat`` of it gives the same config."""
        return {f.metadata["key"]: getattr(self, f.name) for f in fields(self)}

    def learning_rate(self, server_round: int) -> float:
        """Learning rate of round 1..num-server-rounds, constant within it; the last one's is min.

        Half a cosine from max down to min, which is FlowerTune's schedule, or a line.
        """
        part = server_round / self.num_server_rounds
        left = 0.5 * (1 + math.cos(math.pi * part)) if self.schedule == "cosine" else 1 - part
        return self.lr_min + (self.lr_max - self.lr_min) * left

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps(self, rows: int) -> int:
        """Optimiser steps of a site with so many rows in a round, as Transformers counts them."""
        if self.max_steps > 0:
            return self.max_steps
        batches = math.ceil(rows / self.batch_size)
        return math.ceil(
            self.num_train_epochs * max(1, math.ceil(batches / self.gradient_accumulation_steps))
        )


def merged_config(app_dir: Path, overrides: list[str]) -> tuple[dict[str, Any], RunConfig]:
    """The overrides as one flat dict, and the checked config they give with pyproject.toml's.

    Raises:
        ConfigError: a file cannot be read, or the config cannot work.
    """
    flat: dict[str, Any] = {}
    for text in overrides:
        try:
            if text.endswith(".toml"):
                parsed = tomllib.loads(Path(text).read_text())
            else:
                parsed = tomllib.loads("\n".join(_pairs(text)))
        except (OSError, ValueError) as err:
            raise ConfigError(f"run config: {text}: {err}") from None
        flat |= flatten(parsed)
    try:
        project = tomllib.loads((app_dir / "pyproject.toml").read_text())
    except (OSError, ValueError) as err:
        raise ConfigError(f"run config: {app_dir / 'pyproject.toml'}: {err}") from None
    defaults = flatten(project["tool"]["flwr"]["app"]["config"])
    return flat, RunConfig.from_flat(defaults | flat)


def _pairs(text: str) -> list[str]:
    """``a=1 b="x y"`` -> ``["a=1", 'b="x y"']``: as flwr reads its --run-config."""
    pair = r"\S+?\s*=\s*(?:'[^']*'|\"[^\"]*\"|\S+)"
    whole = re.fullmatch(rf"\s*(?:{pair}\s+)*{pair}\s*", text)
    return re.findall(pair, text) if whole else [text]  # TOML's own error for anything else
