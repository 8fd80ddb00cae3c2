"""SuperLink, ServerApp and submission killed in real runs; what goes on is the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from app.config import MIB
from app.server.checkpoint import rounds
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.federation.drill import running, until
from tests.federation.taken import device_taken
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES, ROUNDS = 2, 3


@dataclass
class Setting:
    federation: LocalFederation
    control: Control
    overrides: list[str]

    def submit(self, *changes: str) -> int:
        overrides = [*self.overrides, *changes]
        return submit(REPOSITORY, overrides, self.control, self.federation.public)

    def run(self) -> Path:
        return (self.federation.results / "latest").resolve()

    def runs(self) -> set[Path]:
        return {p.parent.resolve() for p in self.federation.results.glob("*/run.json")}

    def adapters(self, run: Path) -> dict[int, bytes]:
        return {n: (p / "adapter_model.safetensors").read_bytes() for n, p in rounds(run).items()}


@pytest.fixture(scope="module")
def setting(
    models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    work = tmp_path_factory.mktemp("resume")
    source = work / "rows.json"
    source.write_text(json.dumps(ROWS))
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds={ROUNDS} strategy.min-nodes={SITES} strategy.fraction-evaluate=0.0",
        'communication.codec="int4"',  # with feedback at the sites
    ]
    with LocalFederation(work, models_dir, work / "results", SITES) as federation:
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        yield Setting(federation, federation.start(), overrides)


@pytest.fixture(scope="module")
def left(setting: Setting) -> Path:
    """A run whose submission was killed; a second one, of the same config, followed it."""
    ended: list[int] = []
    with device_taken(setting.federation.work), redirect_stdout(StringIO()) as said:
        with submission(setting):
            until(lambda: bool(setting.runs()), 240, "the run")
        follow = threading.Thread(target=lambda: ended.append(setting.submit()))
        follow.start()
        until(lambda: "is going on; following it" in said.getvalue(), 240, "the second submission")
    follow.join(timeout=400)
    assert ended == [0]
    return setting.run()


@contextmanager
def submission(setting: Setting) -> Iterator[None]:
    """One as a process of its own, which is killed at the end."""
    command = [sys.executable, "-m", "superlink.submit"]
    for text in setting.overrides:
        command += ["--run-config", text]
    env = {
        **os.environ,
        "PUBLIC_DIR": str(setting.federation.public),
        "CONTROL_ADDRESS": setting.control.address,
    }
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, start_new_session=True) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_submission_follows_the_run_that_the_first_left_behind(
    setting: Setting, left: Path
) -> None:
    assert setting.runs() == {left}
    assert json.loads((left / "run.json").read_text())["status"] == "completed"
    assert list(rounds(left)) == list(range(1, ROUNDS + 1))


def _kill_the_superlink(setting: Setting) -> None:
    setting.federation.kill("superlink")
    time.sleep(3)
    setting.federation.start_superlink()


def _end_the_serverapp(setting: Setting) -> None:
    """As the host does when it goes down; the run has failed at once."""
    superlink = setting.federation.processes["superlink"].pid
    (serverapp,) = running(superlink, "flwr-serverapp")
    serverapp.terminate()
    until(lambda: setting.control.runs()[0].state.status == "finished:failed", 120, "the run's end")


def test_a_run_cut_off_twice_ends_with_the_adapters_of_one_that_was_not(
    setting: Setting, left: Path
) -> None:
    """Behind round 1 submission and ServerApp end, as the host goes down; the next submission goes
    on, and behind its round 2 the SuperLink is killed.
    """
    ended: list[int] = []
    with ExitStack() as until_then:
        with submission(setting):
            first = _new_run(setting, {left}, 1)
            until_then.enter_context(device_taken(setting.federation.work))
        _end_the_serverapp(setting)
    follow = threading.Thread(target=lambda: ended.append(setting.submit()))
    follow.start()
    second = _new_run(setting, {left, first}, 2)
    with device_taken(setting.federation.work):
        _kill_the_superlink(setting)
    follow.join(timeout=400)
    assert ended == [0]
    (last,) = setting.runs() - {left, first, second}
    facts = json.loads((last / "run.json").read_text())
    assert [c["run_id"] for c in facts["resumed_from"]] == [first.name, second.name]
    assert [c["last_round"] for c in facts["resumed_from"]] == [1, 2]
    assert facts["status"] == "completed"
    assert setting.adapters(last) == setting.adapters(left)
    logs = [log.read_text() for log in (setting.federation.work / "logs").glob("site-*.log")]
    assert sum("rows, loaded in" in log for log in logs) == SITES  # a ClientApp's lines are there
    assert not any("error feedback starts anew" in log for log in logs)
    lines = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    # Each counts on from what the one before had sent, the round that was cut off as well.
    in_round = [line["bytes_down"] + line["bytes_up"] for line in lines]
    at_1, at_2, at_3 = (
        json.loads((run / "run.json").read_text())["bytes_sent"] for run in (first, second, last)
    )
    assert at_1 >= in_round[0]
    assert at_2 >= at_1 + in_round[1]
    assert at_3 == at_2 + in_round[2] == round(lines[-1]["mb_sent"] * MIB)


def _new_run(setting: Setting, known: set[Path], rounds_done: int) -> Path:
    """Wait until a run beyond the known ones has so many lines in its metrics.jsonl."""

    def lines(run: Path) -> int:
        path = run / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    until(
        lambda: any(lines(run) >= rounds_done for run in setting.runs() - known),
        240,
        f"round {rounds_done}",
    )
    (run,) = setting.runs() - known
    return run


def test_a_flipped_bit_in_a_sites_base_model_stops_the_run_by_site_and_file(
    setting: Setting, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    models = Path(shutil.copytree(setting.federation.models, tmp_path / "models"))
    (weights,) = models.glob("*-nf4/model.safetensors")
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    setting.federation.stop_node(1)
    setting.federation.start_node(1, MODELS_DIR=str(models))
    assert setting.submit() == 1
    said = capfd.readouterr().out
    assert "site-01: base model" in said
    assert "model.safetensors is not what supernode.prepare wrote" in said
    log = (setting.federation.work / "logs" / "site-01.log").read_text()
    assert "supernode: ERROR: base model" in log
    setting.federation.stop_node(1)
    setting.federation.start_node(1)
    assert setting.submit('resume="0"') == 0  # anew, though the last run has only just failed


def test_a_site_refuses_an_app_that_is_not_its_own(
    setting: Setting, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line more in the run's code; the site's log and the run's error say who refused what."""
    for name in ("app", "pyproject.toml"):
        subprocess.run(["cp", "-r", str(REPOSITORY / name), str(tmp_path)], check=True)
    with (tmp_path / "app" / "prompts.py").open("a") as file:
        file.write("\n# changed\n")
    overrides = [*setting.overrides, "strategy.node-timeout-s=200"]
    # A run of the same config that is going on is not its own.
    known, ended = setting.runs(), list[int]()
    own = threading.Thread(
        target=lambda: ended.append(
            submit(REPOSITORY, overrides, setting.control, setting.federation.public)
        )
    )
    own.start()
    until(lambda: setting.runs() > known, 120, "the run of the sites' own app")
    assert submit(tmp_path, overrides, setting.control, setting.federation.public) == 1
    own.join(timeout=300)
    assert ended == [0]
    said = capfd.readouterr().out
    assert "site-01 runs app" in said
    assert "ALLOW_APP_UPDATES=1" in said
    log = (setting.federation.work / "logs" / "site-01.log").read_text()
    assert "supernode: ERROR: app" in log
    # A site that allows it takes part.
    for number in range(SITES):
        setting.federation.stop_node(number)
        setting.federation.start_node(number, ALLOW_APP_UPDATES="1")
    assert submit(tmp_path, setting.overrides, setting.control, setting.federation.public) == 0
