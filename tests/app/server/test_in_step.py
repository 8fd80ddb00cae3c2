"""A site's rest is of the uploads that the server's adapter holds, whatever became of the others.

What the adapter holds of a site's uploads, and the rest that its next one starts from, add up to
what the site computed for them: nothing is counted twice, and nothing is lost but what the site's
log says. Rounds, checkpoints and resumes, the codec and the sites' files are the real ones; the
training is noise, and what becomes of orders, folders and runs is drawn.
"""

import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from app import client_app
from app.server import exchange
from app.server.checkpoint import RunFolder, rounds
from app.server.strategy import RoundError
from app.server_app import run
from app.site.feedback import RUNS_KEPT
from app.wire.adapter import Layout, Vector
from app.wire.codec import decode, encode
from tests.app.server.stand_in_sites import failing
from tests.app.server.test_resume import LINEAR, SITES, Killed, config, site
from tests.samples import write_site_list
from tests.stand_in_grid import Clock, Node, StandInGrid

WANTED = config(
    codec_up="int4", num_server_rounds=4, min_train_nodes=3, min_replies=2, max_retries=1,
    fraction_evaluate=0.0, round_timeout_s=10.0,
)  # fmt: skip
LAYOUT = Layout.of(LINEAR, WANTED)
ORDERS = WANTED.num_server_rounds * WANTED.min_train_nodes
# What becomes of an order and its upload; those of LOSSES happen to the site's folder before it.
LOSSES = ("state lost", "state of one upload ago", "state of two uploads ago")
FATES = ("taken", "taken", "lost", "late", "refused", "too long", "failed", *LOSSES)


@dataclass(eq=False)
class Upload:
    """What a site computed, what it added, and what the server sees of both."""

    run: int
    round: int
    change: Vector
    added: Vector
    seen: Vector
    reset: bool  # the site's log says that a rest is lost

    @property
    def rest(self) -> Vector:
        return self.added + self.change - self.seen


@dataclass
class Site:
    folder: Path
    history: list[Upload | str] = field(default_factory=list)  # uploads, and losses of its folder
    copies: list[Path] = field(default_factory=list)  # its folder behind each upload

    def lose(self, how: str) -> None:
        ago = LOSSES.index(how)
        shutil.rmtree(self.folder, ignore_errors=True)
        if ago and len(self.copies) > ago:
            shutil.copytree(self.copies[-1 - ago], self.folder)
        self.history.append(how)

    @contextmanager
    def watched(self, run_id: int, longer: float) -> Iterator[None]:
        """Note the upload that is made meanwhile, of a change so many times as long."""
        log, send = _Resets(), client_app._to_send
        added: list[Vector] = []

        def to_send(trained: Vector, received: Vector, layout: Any, config: Any, job: Any) -> bytes:
            trained = received + longer * (trained - received)
            payload = send(trained, received, layout, config, job)
            seen = decode(config.up, payload, received) - received
            upload = Upload(
                run_id, job["round"], trained - received, added[-1] - trained, seen, log.said
            )
            self.history.append(upload)
            self.copies.append(self.folder.with_name(f"copy-{len(self.copies)}"))
            shutil.copytree(self.folder, self.copies[-1])
            return payload

        def encoded(codec: str, vector: Vector, reference: Vector) -> bytes:
            added.append(vector)
            return encode(codec, vector, reference)

        logging.getLogger("app").addHandler(log)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_app, "_to_send", to_send)
            patch.setattr(client_app, "encode", encoded)
            yield
        logging.getLogger("app").removeHandler(log)


class _Resets(logging.Handler):
    said = False

    def emit(self, record: logging.LogRecord) -> None:
        self.said |= "error feedback starts anew" in record.getMessage()


@dataclass(frozen=True)
class Drawn:
    """One run: what becomes of its orders, when it is killed, and where it begins."""

    fates: list[str]
    killed_after: int  # answers of sites
    after: int  # of the runs before it, counted back from the newest
    damaged: int  # checkpoints of that one


def start(folder: Path, sites: list[Site], run_id: int, drawn: Drawn) -> None:
    earlier = max(run_id - 1 - drawn.after, 0)
    checkpoints = list(rounds(folder / "results" / str(earlier)).values())
    for checkpoint in checkpoints[len(checkpoints) - drawn.damaged :] if drawn.damaged else []:
        (checkpoint / "round.json").unlink()
    fates, answered, grid = iter(drawn.fates), itertools.count(), StandInGrid({})
    clock: Clock = vars(exchange)["time"]  # of tests/app/conftest.py

    def node(number: int) -> Node:
        honest = site(number, folder, WANTED)

        def answer(message: Message) -> Message | Exception | None:
            if next(answered) >= drawn.killed_after:
                raise Killed
            if message.metadata.message_type == "query":
                return honest(message)
            fate = next(fates, "taken")
            if fate in LOSSES:
                sites[number].lose(fate)
            if fate == "failed":
                return failing(message)
            with sites[number].watched(run_id, 1e5 if fate == "too long" else 1.0):
                reply: Any = honest(message)
            if fate == "refused":
                reply.content.metric_records["metrics"]["train-loss"] = float("nan")
            if fate == "late":
                return cast(Message, grid.later(message, lambda _: reply, clock, 1e6))
            return None if fate == "lost" else reply

        return answer

    grid.nodes = {100 + n: node(n) for n in range(SITES)}
    config = replace(WANTED, resume=f"{earlier},0")
    with suppress(Killed, RoundError):
        run(grid, config, RunFolder(folder / "results", run_id), {"run_id": str(run_id)})


def lineages(folder: Path, sites: list[Site]) -> dict[int, list[dict[int, Upload]]]:
    """By run and round, by site: which uploads its adapter is made of."""
    found: dict[int, list[dict[int, Upload]]] = {}
    for run_id in itertools.count(1):
        path = folder / "results" / str(run_id)
        if not path.exists():
            return found
        chain = json.loads((path / "run.json").read_text()).get("resumed_from", [])
        made = found[int(chain[-1]["run_id"])][: chain[-1]["last_round"]] if chain else []
        text = (path / "metrics.jsonl").read_text() if (path / "metrics.jsonl").exists() else ""
        for line in [json.loads(line) for line in text.splitlines()][len(made) :]:
            # Of several attempts the last one's.
            of_round = {
                p: [u for u in sites[p].history if not isinstance(u, str)
                    and (u.run, u.round) == (run_id, line["round"])][-1]
                for p in line["partitions"]
            }  # fmt: skip
            made = [*made, of_round]
        found[run_id] = made
    raise AssertionError


def check(number: int, site: Site, made: dict[int, list[dict[int, Upload]]]) -> None:
    """Each upload starts from all that is owed, or says that it is lost, where it must be."""
    files: dict[int, list[Upload]] = {}  # by run, the uploads behind which the site has its rests
    copies: list[dict[int, list[Upload]]] = []
    lost: dict[Upload, Vector | float] = {}
    for upload in site.history:
        if isinstance(upload, str):
            ago = LOSSES.index(upload)
            files = copies[-1 - ago] if ago and len(copies) > ago else {}
            continue
        held = [r[number] for r in made[upload.run][: upload.round - 1] if number in r]
        last = held[-1:]
        there = [u for u in last if u in files.get(u.run, []) + files.get(upload.run, [])]
        assert upload.reset == (last != there)
        owed = sum((u.change - u.seen - lost[u] for u in held), np.zeros_like(upload.change))
        lost[upload] = owed if upload.reset else 0.0
        atol = 1e-5 * max(1.0, float(np.abs(upload.change).max()))
        np.testing.assert_allclose(upload.added, owed - lost[upload], rtol=0, atol=atol)
        files = files | {upload.run: [*there, upload]}
        copies.append(files)
    for copy in site.copies:
        sizes = [path.stat().st_size for path in copy.iterdir()]
        assert len(sizes) <= RUNS_KEPT
        assert max(sizes) < 2 * LAYOUT.size * 4 + 500


def simulate(folder: Path, runs: Sequence[Drawn]) -> None:
    sites = [Site(folder / f"site-{n}" / "state") for n in range(SITES)]
    write_site_list(folder, {100 + n: n for n in range(SITES)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITES_DIR", str(folder))
        patch.setenv("SITE_DIR", "")  # each site sets its own
        for run_id, drawn in enumerate(runs, 1):
            start(folder, sites, run_id, drawn)
    made = lineages(folder, sites)
    for number, one in enumerate(sites):
        check(number, one, made)


def case(*fates: str, killed_after: int = 1000, after: int = 0, damaged: int = 0) -> Drawn:
    return Drawn(list(fates), killed_after, after, damaged)


# Asked are sites 0, 1, 2 (in another attempt 0, 2, 3), then 0, 1, 3 (0, 1, 2), then 0, 2, 3.
IN_ROUND_3, IN_ROUND_4 = SITES + 2 * 3 + 2, SITES + 3 * 3 + 2
HISTORIES = {
    "lost": [case("lost")],
    "late": [case("late")],
    "refused": [case("refused")],
    "too long": [case("too long")],
    "failed before it was sent": [case("failed")],
    "repeated with others": [case("lost", "refused")],
    "repeated twice": [case("lost", "lost", "taken", "late", "taken", "taken")],
    "resumed": [case(killed_after=IN_ROUND_3), case()],
    "resumed after a loss": [case("taken", "lost", killed_after=IN_ROUND_3), case()],
    "resumed two rounds back": [case(killed_after=IN_ROUND_4), case(damaged=2)],
    "resumed from the first round": [case(), case(damaged=3)],
    "resumed twice, from before the first time": [
        case(killed_after=IN_ROUND_3), case(killed_after=IN_ROUND_3), case(damaged=1),
        case(after=1),
    ],
    "resumed two rounds back after a resume": [
        case(killed_after=SITES + 3 + 2), case(), case(damaged=2),
    ],
    "branches": [case(killed_after=IN_ROUND_3), case(), case(after=1)],
    "the site's folder lost": [case(*["taken"] * 3, "state lost")],
    "an older copy": [case(*["taken"] * 6, *["state of one upload ago"] * 3)],
    "a still older one": [case(*["taken"] * 6, *["state of two uploads ago"] * 3)],
}  # fmt: skip


@pytest.mark.parametrize("history", HISTORIES)
def test_a_site_is_in_step_behind(tmp_path: Path, history: str) -> None:
    simulate(tmp_path, HISTORIES[history])


RUNS = st.lists(
    st.builds(
        Drawn,
        fates=st.lists(st.sampled_from(FATES), max_size=2 * ORDERS),
        killed_after=st.integers(SITES, SITES + 2 * ORDERS),
        after=st.sampled_from([0, 0, 0, 1, 2]),
        damaged=st.sampled_from([0, 0, 0, 1, 2, 3]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50)
@given(runs=RUNS)
def test_a_site_is_in_step_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, runs: list[Drawn]
) -> None:
    simulate(tmp_path_factory.mktemp("world"), runs)
