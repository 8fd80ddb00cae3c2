"""A federation within this process: the server's own rounds, the sites' own ClientApp.

Nothing is played: preflight, sampling, guards, codecs, aggregation, and at the sites gate, training
and error feedback are those of a run. Only Flower's transport is left out, and a base model stays
loaded from one message to the next, which saves most of the time.
"""

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from app import client_app
from app.config import MIB, RunConfig
from app.server.preflight import Sites, preflight
from app.server.strategy import RoundError, Strategy
from app.site import base_model
from app.wire.adapter import Layout, Vector, initial_adapter, save_peft
from superlink.onehost.grid import InProcessGrid
from supernode.download import PrepareError
from supernode.partitions import Split, prepare_data
from supernode.verify import verify

logger = logging.getLogger("app")
Load = Callable[..., tuple[Any, Any]]
_CPU = Path("/proc/cpuinfo")


class Federation:
    """The sites of a data set in a folder of their own, around one prepared base model.

    Attributes:
        rows: SHA-256 of all sites' rows, those held out and those to train on.
        base: the base model that they share.
        notes: what became of the data set's rows.
    """

    deployed = False

    def __init__(
        self, work: Path, source: Path, sites: int, held_out_rows: int, base: base_model.BaseModel
    ) -> None:
        """``source``: a file to be dealt out, or a folder with one a site.

        ``held_out_rows``: of each site, at most. Raises PrepareError, SiteError.
        """
        self._work, self._num_sites, self.base = work, sites, base
        dealt = "files" if source.is_dir() else "iid"
        split = Split(str(source), sites, dealt, holdout_rows=held_out_rows)
        self.notes = [x for x in prepare_data(work, split) if not x.startswith("site-")]
        files = json.loads((work / "prepared" / "data.json").read_text())["files"]
        if not any(f["rows"] for name, f in files.items() if "/holdout." in name):
            raise PrepareError(f"{source}: too few rows for {sites} sites: none holds a row out")
        self.rows = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        self._runs = count(1)
        self._agreed: Sites | None = None
        self._untrained: dict[tuple[object, ...], dict[str, Any]] = {}

    @contextmanager
    def sites(self) -> Iterator[None]:
        """Within this block the process is the SuperNode of every site."""
        models = self._work / "models"
        models.mkdir()
        (models / self.base.folder.name).symlink_to(self.base.folder.resolve())
        verify(models, self._work / "verified.json", {})
        node_ids = {str(n + 1): f"site-{n:02d}" for n in range(self._num_sites)}
        (self._work / "sites.json").write_text(json.dumps(node_ids))
        environment, load, level = dict(os.environ), base_model.load_with_lora, logger.level
        logger.setLevel(logging.WARNING)  # a step's loss and the like are for a site's log
        self._models = _Kept(load)
        base_model.load_with_lora = self._models
        os.environ |= {
            "DEVICE": device(),
            "LOCK_DIR": str(self._work),
            "MODELS_DIR": str(models),
            "MODELS_VERIFIED": str(self._work / "verified.json"),
        }
        try:
            yield
        finally:
            base_model.load_with_lora = load
            logger.setLevel(level)
            os.environ.clear()
            os.environ.update(environment)

    def run(self, config: RunConfig, every_round: bool, folder: Path) -> dict[str, Any]:
        """The rounds of one run, and what the adapter scores on the rows that all sites hold out.

        Args:
            config: of the same model, sites and train.seq-length in every call.
            every_round: score it after each of them, not only before the first and after the last.
            folder: for the last round's adapter, as PEFT writes it.

        Returns:
            "loss" and "accuracy" (by answer token) and "mib" (adapters of the training, both ways)
            at the end, "seconds" of the rounds without the scoring, "sites" by round, "rejected"
            (replies that a round did without), and "curve": [MiB, loss] of each adapter scored.

        Raises:
            PreflightError: no run of this config can start.
            RoundError: a round fails, or the adapter cannot be scored at every site.
        """
        run_id = next(self._runs)
        grid = InProcessGrid(
            range(1, self._num_sites + 1), lambda m: self._answer(m, config, run_id)
        )
        # Once: what the sites have stays the same.
        sites = self._agreed = self._agreed or preflight(grid, config, self._work)
        layout = Layout.of(sites.linear_layers, config)
        strategy = Strategy(grid, config, sites, layout, str(run_id))
        adapter = initial_adapter(layout, config.seed)
        scored = self._score_untrained(strategy, adapter)
        curve, lines = [[0.0, scored["eval_loss"]]], []
        for server_round in range(1, config.num_server_rounds + 1):
            adapter, line = strategy.train_round(server_round, adapter)
            lines.append(line)
            if every_round or server_round == config.num_server_rounds:
                scored = _score(strategy, server_round, adapter)
                sent = sum(x["bytes_down"] + x["bytes_up"] for x in lines)
                curve.append([sent / MIB, scored["eval_loss"]])
        save_peft(folder, layout, adapter, config)
        return {
            "loss": scored["eval_loss"],
            "accuracy": scored["eval_token_accuracy"],
            "mib": curve[-1][0],
            "seconds": sum(line["seconds"] for line in lines),
            "sites": [line["partitions"] for line in lines],
            "rejected": sum(len(line["rejected"]) for line in lines),
            "curve": curve,
        }

    def _score_untrained(self, strategy: Strategy, adapter: Vector) -> dict[str, Any]:
        """The score of the initial adapter, which is the base model's whatever the seed."""
        config = strategy.config
        key = strategy.layout.hash, config.batch_size, config.max_tokens_per_pass, config.seq_length
        if key not in self._untrained:
            self._untrained[key] = _score(strategy, 0, adapter)
        return self._untrained[key]

    def _answer(self, message: Message, config: RunConfig, run_id: int) -> Message:
        """What this message's site replies, as its ClientApp's process would."""
        node_id = message.metadata.dst_node_id
        os.environ["SITE_DIR"] = str(self._work / f"site-{node_id - 1:02d}")
        self._models.kind = message.metadata.message_type
        context = Context(
            run_id, node_id, {"partition-id": node_id - 1, "num-partitions": self._num_sites},
            RecordDict(), cast(dict[str, Any], config.flat()),
        )  # fmt: skip
        try:
            return client_app.app(message, context)
        except Exception as err:
            reason = f"{type(err)}:<'{err}'>"  # as Flower tells it
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(error, reply_to=message)


def device() -> str:
    return os.environ.get("DEVICE", "cpu")


def arithmetic() -> str:
    """What the last digits of a CPU's sums depend on: its model, and how many threads add.

    They grow: after 6 rounds at a high rate two models' losses were 0.003 apart.
    """
    if device() != "cpu":
        return device()
    try:
        facts = re.findall(r"^(cpu family|model|stepping)\s*: (\d+)$", _CPU.read_text(), re.M)[:3]
    except OSError:  # not Linux
        facts = []
    model = " ".join([platform.machine(), *(f"{name} {number}" for name, number in facts)])
    return f"{model}, threads {os.environ.get('OMP_NUM_THREADS') or os.cpu_count()}"


def _score(strategy: Strategy, server_round: int, adapter: Vector) -> dict[str, Any]:
    """Raises RoundError: not every site has scored it; others' rows would be another test."""
    scored = strategy.evaluate(server_round, adapter)
    if not scored or scored["eval_rejected"]:
        reasons = scored.get("eval_rejected") or "no held-out loss"
        raise RoundError(f"after round {server_round} not every site gives a score: {reasons}")
    return scored


class _Kept:
    """``load_with_lora`` that leaves the last model loaded, and only sets its adapter.

    One for training and one for scoring: on a CPU bitsandbytes' layers that have been evaluated
    give no gradients any more. A GPU's have no such fault, and its memory is dear.
    """

    def __init__(self, load: Load) -> None:
        self._load, self.kind = load, ""
        self._models: dict[str, tuple[object, Any, Any]] = {}

    def __call__(
        self, base: base_model.BaseModel, config: RunConfig, device: str, layout: Layout,
        adapter: Vector,
    ) -> tuple[Any, Any]:  # fmt: skip
        use = self.kind if device == "cpu" else ""
        key = (
            base.folder, layout.hash, config.lora_alpha, config.lora_dropout,
            config.gradient_checkpointing,
        )  # fmt: skip
        if use in self._models and self._models[use][0] == key:
            model = self._models[use][1]
            # In bf16 accelerate wraps it, and with each training what it has wrapped before.
            vars(model).pop("forward", None)
            base_model.set_adapter(model, layout, adapter)
        else:
            self._models.pop(use, None)  # before another is loaded
            self._models[use] = (key, *self._load(base, config, device, layout, adapter))
        return self._models[use][1:]
