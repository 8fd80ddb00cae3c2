"""A whole federation as real processes: TLS, authentication, gRPC, two rounds of QLoRA.

One SuperLink and three SuperNodes on free ports; the base model is tiny and random, all else
is what a hospital would run.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from app.config import MIB, RunConfig, merged_config
from app.server.checkpoint import rounds
from app.site.base_model import find
from app.wire.adapter import Layout
from app.wire.codec import unpacked_bytes
from superlink.onehost.processes import LocalFederation
from superlink.run_view import Status
from superlink.submit import submit
from supernode.entrypoint import REFUSED
from supernode.partitions import Split, prepare_data
from tests.federation.taken import device_taken
from tests.samples import REPOSITORY, ROWS, write_jsonl
from tests.terminal import Terminal

SITES = 3
MARKER = "patient Wilhelmina Zwetschge of ward 13"


@dataclass
class Done:
    """A completed run, a run that had to fail, and what they left behind."""

    work: Path
    models: Path
    config: RunConfig
    exit_code: int
    failed_exit_code: int
    printed: str
    streamed: list[str]
    processes: list[int]

    def log(self, name: str) -> str:
        return (self.work / "logs" / f"{name}.log").read_text()

    @property
    def run(self) -> Path:
        return (self.work / "results" / "latest").resolve()

    @property
    def failed_run(self) -> Path:
        (other,) = (
            p for p in (self.work / "results").iterdir() if p.is_dir() and p.resolve() != self.run
        )
        return other


@contextmanager
def held_until_somebody_waits(work: Path) -> Iterator[None]:
    """The device is busy when the first site wants it: sites of so small a model rarely meet."""
    over = threading.Event()

    def hold() -> None:
        with device_taken(work):
            while not any(waits(work)) and not over.wait(0.2):
                pass

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        yield
    finally:
        over.set()
        holder.join()


def waits(work: Path) -> list[bool]:
    """Whether a site's log says that it waits for the device, site by site."""
    names = [f"site-{n:02d}" for n in range(SITES)]
    logs = [(work / "logs" / f"{name}.log").read_text() for name in names]
    return [f"{n} waits for its turn on the CPU" in t for n, t in zip(names, logs, strict=True)]


@contextmanager
def dead_proxies() -> Iterator[None]:
    """Every variable names a proxy that is not there, as on a host that is behind one."""
    with pytest.MonkeyPatch.context() as host:
        for name in ("grpc_proxy", "http_proxy", "https_proxy"):
            host.setenv(name, "http://127.0.0.1:9")
            host.setenv(name.upper(), "http://127.0.0.1:9")
        host.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            host.setenv(name, "")
        yield


@pytest.fixture(scope="module")
def done(models_dir: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    work = tmp_path_factory.mktemp("federation")
    rows = [r | {"output": f"{r['output']} As {MARKER} knows."} for r in ROWS]
    source = work / "rows.json"
    source.write_text(json.dumps(rows))
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds=2 strategy.min-nodes={SITES} strategy.node-timeout-s=120",
        "strategy.min-evaluate-nodes=1",
        "train.learning-rate-max=0.01 train.learning-rate-min=0.001",
        'communication.down="bf16" communication.up="int8"',
    ]
    with (
        dead_proxies(),
        LocalFederation(work, models_dir, work / "results", SITES) as federation,
    ):
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        control = federation.start()
        with held_until_somebody_waits(work), redirect_stdout(StringIO()) as printed:
            exit_code = submit(REPOSITORY, overrides, control, federation.public)
        (run,) = control.runs()
        streamed = [reply.task_event.data for reply in control.events(run.run_id)]
        row = {"instruction": "", "input": MARKER, "output": [MARKER]}
        bad = federation.federation / "site-01" / "data" / "train.jsonl"
        bad.write_text(bad.read_text() + json.dumps(row) + "\n")
        long = {"instruction": "", "input": f"{MARKER} " * 400, "output": MARKER}
        write_jsonl(federation.federation / "site-02" / "data" / "train.jsonl", [long])
        failed_exit_code = submit(REPOSITORY, overrides, control, federation.public)
        processes = [p.pid for p in federation.processes.values()]
    _, config = merged_config(REPOSITORY, overrides)
    print(printed.getvalue())
    return Done(
        work, models_dir, config, exit_code, failed_exit_code, printed.getvalue(), streamed,
        processes,
    )  # fmt: skip


def metrics(done: Done) -> list[dict[str, object]]:
    return [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]


def test_the_run_completes_and_submit_says_so(done: Done) -> None:
    assert done.exit_code == 0
    facts = json.loads((done.run / "run.json").read_text())
    assert facts["status"] == "completed"
    assert sorted(facts["sites"]) == ["site-00", "site-01", "site-02"]
    for site in facts["sites"].values():
        assert site["device"] == "cpu"
        train = site["rows"]["train"]
        assert train["used"] == site["num_examples"] == train["read"] - train["too_long"] > 0


def test_sites_of_one_device_take_turns_and_their_logs_say_who_waits(done: Done) -> None:
    assert any(waits(done.work))


def test_who_follows_a_run_at_the_control_port_gets_its_events_as_they_stand_in_its_file(
    done: Done,
) -> None:
    assert done.streamed == (done.run / "events.jsonl").read_text().splitlines()
    assert len([line for line in done.printed.splitlines() if line[:11] == "[round 1/2]"]) == 2
    assert "\x1b" not in done.printed


def test_a_terminal_shows_of_a_run_what_its_events_say(done: Done) -> None:
    status, last = Status(), metrics(done)[-1]
    for line in done.streamed:
        status.take(json.loads(line))
    screen = Console(file=StringIO(), width=120)
    screen.print(status)
    _, first, figures = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first.startswith("the run has completed, 0:00:0")
    form = "train loss {train_loss:.4f}, held-out loss {eval_loss_median:.4f}, {mb_sent:.1f} MiB"
    assert figures.startswith(form.format(**last))  # type: ignore[str-format]


def test_the_logs_hold_what_happened_and_neither_polling_nor_colours(done: Done) -> None:
    names = ["superlink", *(f"site-{n:02d}" for n in range(SITES))]
    for name in names:
        log = done.log(name)
        for noise in ("\x1b", "Warning", "warnings.warn", "Failed to load CPU", "PullMessages"):
            assert noise not in log, name
        for noise in ("uvicorn.access", "ListNodes", "ListRuns", "StreamLogs"):
            assert noise not in log, name
        assert [line for line in log.splitlines() if re.fullmatch(r"INFO *:\s*|\s*", line)] == []
    assert all("Receiving: train message" in done.log(name) for name in names[1:])
    for event in ("[Fleet.ActivateNode] Activated", "Created run", "[Fleet.PushMessages]"):
        assert event in done.log("superlink")


def test_a_site_that_was_stopped_with_all_the_rest_says_so_and_nothing_else(done: Done) -> None:
    for number in range(SITES):
        assert "SuperNode terminated gracefully" in done.log(f"site-{number:02d}")
        assert REFUSED not in done.log(f"site-{number:02d}")


def test_every_round_has_its_checkpoint_and_its_line(done: Done) -> None:
    assert list(rounds(done.run)) == [1, 2]
    assert [m["round"] for m in metrics(done)] == [1, 2]


def test_the_held_out_loss_falls(done: Done) -> None:
    lines = metrics(done)
    losses = [lines[0]["eval_loss_before"], *(m["eval_loss"] for m in lines)]
    assert losses[-1] < losses[0], losses  # type: ignore[operator]


def test_the_bytes_counted_are_those_of_the_adapter(done: Done, tiny_model: Path) -> None:
    base = find(done.models, str(tiny_model), 4)
    size = Layout.of(base.linear_layers, done.config).size
    first, second = metrics(done)
    for line in (first, second):  # two sites a round
        assert 0.5 < line["bytes_up"] / (2 * unpacked_bytes("int8", size)) < 1.01  # type: ignore[operator]
    assert 0.5 < second["bytes_down"] / (2 * unpacked_bytes("bf16", size)) < 1.01  # type: ignore[operator]
    assert first["bytes_down"] < 0.05 * second["bytes_down"]  # type: ignore[operator]  # known to all
    sent = sum(m["bytes_down"] + m["bytes_up"] + m["eval_bytes_down"] for m in (first, second))  # type: ignore[operator]
    # Before round 1 the initial adapter was evaluated too.
    assert sent <= second["mb_sent"] * MIB < 1.1 * sent  # type: ignore[operator]


def test_the_evaluation_scores_every_round_beside_the_base_model(done: Done) -> None:
    command = [
        sys.executable, "-m", "eval", "--results", str(done.work / "results"), "--all-rounds",
        "--datasets", "demo-four,demo-yesno", "--limit", "3", "--models", str(done.models),
    ]  # fmt: skip
    env = {**os.environ, "DEVICE": "cpu"}
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    report = json.loads((done.run / "eval" / "report.json").read_text())
    assert [s["name"] for s in report["subjects"]] == ["base", "peft_1", "peft_2"]
    assert report["best"] in ("peft_1", "peft_2")
    assert report["rounds"] == metrics(done)
    assert str(done.run / "eval" / "report.html") in ended.stdout


def test_peft_loads_every_checkpoint_name_for_name(done: Done, tiny_model: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    for folder in rounds(done.run).values():
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        loaded = get_peft_model_state_dict(PeftModel.from_pretrained(model, str(folder)))
        stored = load_file(folder / "adapter_model.safetensors")
        assert set(loaded) == set(stored)
        for name, array in stored.items():
            np.testing.assert_array_equal(loaded[name].numpy(), array)


def test_the_round_of_the_lowest_held_out_loss_goes_home_and_loads(
    done: Done, tmp_path: Path
) -> None:
    """The link, run.json and the export mean the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses = np.array([line["eval_loss_median"] for line in metrics(done)])
    facts = json.loads((done.run / "run.json").read_text())
    assert facts["best"]["round"] == losses.argmin() + 1
    assert (done.run / "best").resolve() == rounds(done.run)[facts["best"]["round"]]
    places = ["--results", str(done.work / "results"), "--models", str(done.models)]
    for name, more in (("adapter", []), ("merged", ["--merge"])):
        command = [sys.executable, "-m", "eval", "export", *places, "--round", "best", *more]
        ended = subprocess.run(
            [*command, "--to", str(tmp_path / name)], cwd=REPOSITORY, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-2000:]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert MARKER not in card
    assert f"| sites | {SITES}, with " in card
    weights = [f / "adapter_model.safetensors" for f in (tmp_path / "adapter", done.run / "best")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("Which cells", return_tensors="pt")
    assert np.isfinite(merged(**ids).logits.float().detach().numpy()).all()


def test_training_moved_the_adapter_in_every_round(done: Done) -> None:
    first, second = (load_file(f / "adapter_model.safetensors") for f in rounds(done.run).values())
    b_sides = [n for n in first if "lora_B" in n]
    assert all(np.abs(first[n]).max() > 0 for n in b_sides)  # B starts at zero
    assert any(not np.array_equal(first[n], second[n]) for n in first)


def test_a_bad_row_at_one_site_stops_the_run_by_site_and_line_number(done: Done) -> None:
    assert done.failed_exit_code == 1
    facts = json.loads((done.failed_run / "run.json").read_text())
    assert facts["status"] == "failed"
    lines = (done.work / "federation/site-01/data/train.jsonl").read_text().count("\n")
    assert f"site-01: data/train.jsonl, line {lines}: no text in column 'output'" in facts["error"]


def test_what_a_site_that_is_not_ready_logged_last_is_told_below_and_no_word_of_its_data(
    done: Done,
) -> None:
    text = (done.failed_run / "events.jsonl").read_text()
    said = [json.loads(line)["text"] for line in text.splitlines()]
    print("\n".join(said))
    last = [line for line in said if "  last in the log of " in line]
    counts = "data/train.jsonl: 1 read, 0 empty, 0 repeated, 0 known, 1 too long, 0 cut, 0 used"
    assert last[0] == f"[preflight]   last in the log of site-02: {counts}"
    assert all("log of site-02: data/" in line for line in last)
    facts = json.loads((done.failed_run / "run.json").read_text())
    assert "site-02: data/train.jsonl: no row keeps an answer" in facts["error"]


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and "data" not in path.parts:
            yield path


def test_no_text_of_a_site_leaves_its_data_folder(done: Done) -> None:
    """Neither in a log, nor in the SuperLink's database, nor in the results."""
    seen = [p for p in _files(done.work) if p != done.work / "rows.json"]
    assert any(p.suffix == ".db" for p in seen)
    assert any(p.name == "site-01.log" for p in seen)
    leaks = [p for p in seen if MARKER.encode() in p.read_bytes()]
    assert leaks == []


def _processes_of(folder: Path) -> list[bytes]:
    """Command lines of all processes that name ``folder`` in their words or environment."""
    words, found = str(folder).encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if words in command or words in environment:
                found.append(command)
    return found


def test_every_process_is_gone_afterwards(done: Done) -> None:
    """The SuperLink's and SuperNodes' own children included."""
    assert _processes_of(done.work) == []
    assert not [p for p in done.processes if Path(f"/proc/{p}").exists()]


@pytest.mark.faults
def test_ctrl_c_in_the_middle_of_a_run_leaves_no_process_behind(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "superlink.onehost", "--sites", "2", "--model", str(tiny_model),
        "--models", str(models_dir), "--work", str(tmp_path / "work"),
        "--results", str(tmp_path / "results"), "--run-config", "num-server-rounds=99",
    ]  # fmt: skip
    terminal = Terminal(command)
    terminal.read_until("round 1 of 99: training at")
    assert terminal.process.poll() is None, "the demo ended before its first round"
    assert len(_processes_of(tmp_path)) >= 5  # itself, SuperLink, SuperNodes, ServerApp
    terminal.type(b"\x03")
    assert terminal.end() == 130
    screen = terminal.screen()
    print("\n".join(screen))
    state = screen.index("demo: stopped; every process it started has ended") - 3
    assert re.fullmatch(r"round 1 of 99: training at 2 sites, 0:0\d:\d\d", screen[state])
    assert screen[state + 1].startswith("site-0")
    assert _processes_of(tmp_path) == []
    (run,) = (tmp_path / "results").glob("*/run.json")
    assert json.loads(run.read_text())["status"] == "failed"  # not "running" for ever
    assert '<span class="chip failed">' in run.with_name("report.html").read_text()
