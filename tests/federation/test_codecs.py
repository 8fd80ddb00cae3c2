"""Every codec and every strategy in real runs, and what they send by Flower's own count."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.config import MIB, merged_config
from app.server.checkpoint import rounds
from app.site.base_model import find
from app.wire.adapter import Layout
from app.wire.codec import unpacked_bytes
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES, ROUNDS = 2, 2
PAIRS = [
    ("fp32", "fedavg"),
    ("bf16", "fedavgopt-delta"),
    ("int8", "fedprox"),
    ("int4", "fedavgopt"),
    ("fp32", "rda"),
]


@dataclass
class Setting:
    federation: LocalFederation
    control: Control
    model: Path
    models: Path

    def run(self, changes: str) -> tuple[list[dict[str, Any]], int, int]:
        """metrics.jsonl, the adapter's size, and the bytes that Flower counted."""
        overrides = [
            str(REPOSITORY / "app/profiles/demo.toml"),
            f"model.name={json.dumps(str(self.model))} strategy.min-nodes={SITES}",
            f"num-server-rounds={ROUNDS} train.seq-length=512 strategy.fraction-evaluate=0.0",
            # An adapter of megabytes, beside which the framing is small.
            'model.lora.peft-lora-r=256 model.lora.target-modules="all-linear"',
            f"train.training-arguments.max-steps=2 {changes}",
        ]
        assert submit(REPOSITORY, overrides, self.control, self.federation.public) == 0
        folder = (self.federation.results / "latest").resolve()
        assert list(rounds(folder)) == [1, 2]
        _, config = merged_config(REPOSITORY, overrides)
        assert json.loads((folder / "run.json").read_text())["config"] == config.flat()
        base = find(self.models, config.model_name, config.quantization)
        state = self.control.run_status(int(folder.name))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        size = Layout.of(base.linear_layers, config).size
        return lines, size, state.bytes_to_sites + state.bytes_from_sites


@pytest.fixture(scope="module")
def setting(
    models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    work = tmp_path_factory.mktemp("codecs")
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    with LocalFederation(work, models_dir, work / "results", SITES) as federation:
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        yield Setting(federation, federation.start(), tiny_model, models_dir)


@pytest.mark.parametrize(("codec", "strategy"), PAIRS)
def test_a_run_with_this_codec_and_strategy_completes_and_counts_its_bytes(
    setting: Setting, codec: str, strategy: str
) -> None:
    lines, size, flowers_bytes = setting.run(
        f'communication.codec="{codec}" strategy.name="{strategy}"'
    )
    each = unpacked_bytes(codec, size)
    for line in lines:
        assert line["partitions"] == [0, 1]
        assert line["rejected"] == {}
        assert math.isfinite(line["train_loss"])
        assert line["update_norm"] > 0
        assert 0.4 * each < line["bytes_up"] / SITES < 1.01 * each
    assert lines[1]["bytes_down"] <= 1.01 * SITES * each
    if codec != "fp32":  # all sites know the initial adapter
        assert lines[0]["bytes_down"] < 0.02 * lines[1]["bytes_down"]
    if strategy in ("fedavg", "fedprox"):
        assert all(line["alphas"] == [1.0, 1.0] for line in lines)
    ours = lines[-1]["mb_sent"] * MIB
    assert ours == sum(line["bytes_down"] + line["bytes_up"] for line in lines)
    # Flower also counts the preflight and what its messages are wrapped in: 0.02 MiB were seen.
    print(f"{codec}: {ours / MIB:.3f} MiB by us, {flowers_bytes / MIB:.3f} MiB by Flower")
    assert ours < flowers_bytes < 1.001 * ours + 0.05 * MIB
