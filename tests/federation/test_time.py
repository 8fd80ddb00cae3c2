"""ClientApps that never come back: their orders expire, their SuperNodes do not wait for ever."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from flwr.proto.control_pb2 import StopRunRequest

from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.federation.drill import running, until
from tests.federation.hostile import hostile
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES = 3
# One of the two runs whatever app comes.
HANGING = {1: ("hangs busy", ""), 2: ("hangs asleep", "1")}
ROUND_TIMEOUT_S = 90


class Hanging(LocalFederation):
    def start_node(self, number: int, **settings: str) -> None:
        if number in HANGING:
            change, any_app = HANGING[number]
            folder = self.work / f"hanging-{number}"
            settings |= hostile(folder, change)
            # A host of its own: it keeps its device busy.
            settings |= {"ALLOW_APP_UPDATES": any_app, "LOCK_DIR": str(folder)}
        super().start_node(number, **settings)

    def let_them_hang(self) -> None:
        for number in HANGING:
            (self.work / f"hanging-{number}" / "slow").touch()

    def let_them_work(self) -> None:
        """From their next order on; what hangs already does not look again."""
        for number in HANGING:
            (self.work / f"hanging-{number}" / "slow").unlink()

    def hang(self) -> bool:
        return all((self.work / f"hanging-{n}" / "waiting").is_file() for n in HANGING)

    def client_apps(self) -> list[psutil.Process]:
        services = [self.processes[f"site-{n:02d}"].pid for n in HANGING]
        return [p for service in services for p in running(service, "flwr-clientapp")]


@dataclass
class Setting:
    federation: Hanging
    control: Control
    config: list[str]
    ended: list[int] = field(default_factory=list)

    def submit(self, changes: str) -> threading.Thread:
        overrides = [*self.config, changes]
        follow = threading.Thread(
            target=lambda: self.ended.append(
                submit(REPOSITORY, overrides, self.control, self.federation.public)
            ),
            daemon=True,
        )
        follow.start()
        return follow

    def log(self, number: int) -> str:
        path = self.federation.work / "logs" / f"site-{number:02d}.log"
        return path.read_text(errors="replace")

    def stored(self, query: str, *values: float) -> int:
        """A number out of the SuperLink's database."""
        path = self.federation.work / "superlink" / "superlink.db"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return int(db.execute(query, values).fetchone()[0])


@pytest.fixture(scope="module")
def setting(
    models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    work = tmp_path_factory.mktemp("time")
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    config = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"strategy.min-nodes={SITES} strategy.fraction-train=1.0 strategy.fraction-evaluate=0.0",
        "strategy.min-replies=1",
        f"train.training-arguments.max-steps=2 strategy.round-timeout-s={ROUND_TIMEOUT_S}",
    ]
    with Hanging(work, models_dir, work / "results", SITES) as federation:
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        yield Setting(federation, federation.start(), config)


def test_a_clientapp_that_hangs_is_ended_with_its_order_and_its_site_is_in_the_next_round(
    setting: Setting,
) -> None:
    federation = setting.federation
    federation.let_them_hang()
    follow = setting.submit("num-server-rounds=2")
    metrics = federation.results / "latest" / "metrics.jsonl"
    until(federation.hang, 200, "two ClientApps that hang")
    hung = federation.client_apps()
    assert len(hung) >= len(HANGING)
    federation.let_them_work()
    until(metrics.is_file, ROUND_TIMEOUT_S + 60, "the end of round 1")
    # The run goes on, and nothing of its first round is kept for the sites that were late.
    of_round_1 = setting.stored(
        "SELECT count(*) FROM message_ins WHERE created_at < ?", time.time() - 5
    )
    replies = setting.stored("SELECT count(*) FROM message_res")
    follow.join(timeout=200)
    assert setting.ended.pop() == 0
    assert setting.stored("SELECT count(*) FROM objects") == 0  # of the whole run
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    why = f"no reply within strategy.round-timeout-s = {ROUND_TIMEOUT_S}"
    assert lines[0]["rejected"] == {f"site-{n:02d}": why for n in HANGING}
    assert [line["partitions"] for line in lines] == [[0], [0, 1, 2]]
    assert (of_round_1, replies) == (0, 0)
    assert not any(p.is_running() and p.status() != "zombie" for p in hung)
    for number in HANGING:
        said = f"supernode: ERROR: site-{number:02d}'s ClientApp has not answered an order"
        assert setting.log(number).count(said) == 1


def test_a_resumed_run_waits_for_sites_that_are_at_work_for_the_run_before(
    setting: Setting, capfd: pytest.CaptureFixture[str]
) -> None:
    # Long enough that no load of the machine ends them before the resumed run has asked for them.
    same = "num-server-rounds=1 seed=7 strategy.round-timeout-s=600"
    federation = setting.federation
    for number in HANGING:
        (federation.work / f"hanging-{number}" / "waiting").unlink()
    federation.let_them_hang()
    follow = setting.submit(same)
    until(federation.hang, 200, "two ClientApps that hang")
    hung = federation.client_apps()
    federation.let_them_work()
    run_id = setting.control.runs()[0].run_id
    setting.control._stub.StopRun(StopRunRequest(run_id=run_id))  # as flwr stop does
    follow.join(timeout=60)
    assert setting.ended.pop() == 1
    resumed = setting.submit(f'{same} strategy.node-timeout-s=15 resume="{run_id},0"')
    said = ""

    def waits() -> bool:
        nonlocal said
        said += capfd.readouterr().out
        return "2 sites are silent, perhaps still at work for the run before" in said

    until(waits, 200, "the resumed run that waits")
    for process in hung:  # their work is over; that a deadline ends it is the test above
        process.kill()
    resumed.join(timeout=200)
    assert setting.ended.pop() == 0
    lines = (federation.results / "latest" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["partitions"] for line in lines] == [[0, 1, 2]]
