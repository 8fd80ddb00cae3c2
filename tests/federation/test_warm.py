"""Warm ClientApps in a real federation: the results of cold ones, and nobody is left behind."""

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.proto.control_pb2 import StopRunRequest

from app.server.checkpoint import rounds
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.federation.drill import until
from tests.federation.hostile import hostile
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES = 2
AS_COMPUTED = (
    "train_loss",
    "eval_loss",
    "eval_loss_before",
    "partitions",
    "alphas",
    "num_examples",
)


@dataclass
class Setting:
    federation: LocalFederation
    control: Control
    config: list[str]

    def submit(self) -> int:
        return submit(REPOSITORY, self.config, self.control, self.federation.public)

    def started_for(self, site: str) -> dict[psutil.Process, list[str]]:
        """The processes of the site's SuperNode, and their command lines."""
        node, found = psutil.Process(self.federation.processes[site].pid), {}
        for process in (node, *node.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # or a zombie, of which Flower keeps some
                found[process] = process.cmdline()
        return found

    def server(self, site: str) -> psutil.Process | None:
        """The site's fork server, if there is one."""
        of = (p for p, words in self.started_for(site).items() if "supernode.warm" in words)
        return next(of, None)

    def restart(self, number: int, **settings: str) -> None:
        self.federation.stop_node(number)
        self.federation.start_node(number, **settings)


@pytest.fixture(scope="module")
def setting(
    models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    work = tmp_path_factory.mktemp("warm")
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    config = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds=2 strategy.min-nodes={SITES} strategy.fraction-train=1.0",
        'train.training-arguments.max-steps=2 communication.up="int8"',
    ]
    with LocalFederation(work, models_dir, work / "results", SITES) as federation:
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        yield Setting(federation, federation.start(), config)


def computed(run: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    adapters = [(f / "adapter_model.safetensors").read_bytes() for f in rounds(run).values()]
    return [{key: line.get(key) for key in AS_COMPUTED} for line in lines], adapters


def test_a_run_of_warm_clientapps_computes_what_one_of_cold_ones_does(setting: Setting) -> None:
    results = setting.federation.results
    sites = [f"site-{n:02d}" for n in range(SITES)]
    assert not any(map(setting.server, sites))
    assert setting.submit() == 0
    warm = (results / "latest").resolve()
    for site in sites:  # one has done it all, and waits for more with one thread
        server = setting.server(site)
        assert server
        assert server.num_threads() == 1
        assert server.children() == []
        log = (setting.federation.work / "logs" / f"{site}.log").read_text()
        assert "cold" not in log
        assert "no warm ClientApps" not in log
    for number in range(SITES):
        setting.restart(number, WARM_S="0")
    assert setting.submit() == 0
    cold = (results / "latest").resolve()
    assert cold != warm
    assert "supernode.warm" not in str([setting.started_for(site) for site in sites])
    assert computed(warm) == computed(cold)
    assert len(computed(warm)[1]) == 2


def test_a_supernode_that_is_killed_at_work_leaves_nobody_behind(setting: Setting) -> None:
    """Be it Flower's process or the one that a container or an operator has started."""
    killed = ["supernode.pinned", "supernode.entrypoint"]
    folders = [setting.federation.work / f"late-{number}" for number in range(SITES)]
    for number, folder in enumerate(folders):
        late = hostile(folder, "late")
        (folder / "slow").touch()
        setting.restart(number, LOCK_DIR=str(folder), **late)
    follow = threading.Thread(target=setting.submit, daemon=True)
    follow.start()
    for folder in folders:
        until((folder / "waiting").is_file, 240, "a ClientApp at work")
    for number, what in enumerate(killed):
        processes = setting.started_for(f"site-{number:02d}")
        server = setting.server(f"site-{number:02d}")
        assert server
        assert len(server.children()) == 1
        next(p for p, words in processes.items() if what in words).kill()
        setting.federation.processes.pop(f"site-{number:02d}").wait(30)
        _, alive = psutil.wait_procs(list(processes), timeout=15)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    setting.control._stub.StopRun(StopRunRequest(run_id=setting.control.runs()[0].run_id))
    follow.join(timeout=60)
