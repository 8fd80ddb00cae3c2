"""Sites that lie about who they are or what they hold: a real run goes on without them alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import superlink.submit
from app.server.answer import UNLISTED
from superlink.control import Control, public_keys
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.register import register
from supernode.partitions import Split, prepare_data
from tests.federation.drill import until
from tests.federation.hostile import hostile
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES, OFFLINE = 8, 3
LIARS = {
    4: "another site",  # the one that is offline
    5: "another site that is there",  # site-00
    6: "other weights",
    7: "3 MB of versions",
}
HONEST = ["site-00", "site-01", "site-02"]


class Infiltrated(LocalFederation):
    def start_node(self, number: int, **settings: str) -> None:
        if number in LIARS:
            settings |= hostile(self.work / f"hostile-{number}", LIARS[number])
        if number != OFFLINE:
            super().start_node(number, **settings)


@pytest.fixture(scope="module")
def federation(
    models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Infiltrated, Control]]:
    """All but one of the sites are online."""
    work = tmp_path_factory.mktemp("claims")
    source = work / "rows.json"
    source.write_text(
        json.dumps([r | {"input": f"{n}: {r['input']}"} for n in range(3) for r in ROWS])
    )
    with Infiltrated(work, models_dir, work / "results", SITES) as infiltrated:
        infiltrated.provision()
        prepare_data(infiltrated.federation, Split(str(source), SITES))
        control = infiltrated.start()
        online = SITES - 1
        until(
            lambda: list(control.node_status().values()).count("online") == online, 240, "7 sites"
        )
        yield infiltrated, control


def submit(
    federation: tuple[Infiltrated, Control], model: Path, changes: str
) -> tuple[int, dict[str, Any], Path]:
    """Exit code, run.json and folder of the newest run."""
    local, control = federation
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(model))} model.lora.peft-lora-r=4 train.seq-length=512",
        "num-server-rounds=1 strategy.min-nodes=3 strategy.min-evaluate-nodes=3",
        f"train.training-arguments.max-steps=2 strategy.node-timeout-s=240 {changes}",
    ]
    before = {p.resolve() for p in local.results.glob("*/run.json")}
    code = superlink.submit.submit(REPOSITORY, overrides, control, local.public)
    (new,) = {p.resolve() for p in local.results.glob("*/run.json")} - before
    return code, json.loads(new.read_text()), new.parent


def check_reasons(said: dict[str, str]) -> None:
    """Each liar by its true name, with what it did, on one short line without control codes."""
    mistaken = "it says that it is {}, and its key is that of {}; correct PARTITION_ID"
    assert said["site-04"].startswith(mistaken.format("site-03", "site-04"))
    assert said["site-05"].startswith(mistaken.format("site-00", "site-05"))
    assert said["site-06"].startswith("base model [2J [31mbbbb bbbb")
    assert "and 3 sites have" in said["site-06"]
    assert said["site-07"].startswith(
        "an answer to the preflight that cannot be read: versions has"
    )
    assert all(len(why) < 300 and why.isprintable() for why in said.values())


def test_a_run_completes_without_the_liars_and_names_them_alone(
    federation: tuple[Infiltrated, Control], tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, facts, run = submit(federation, tiny_model, "strategy.require-all-nodes=false")
    said = capfd.readouterr().out
    print(json.dumps(facts["left_out"], indent=1))
    assert code == 0
    assert facts["status"] == "completed"
    assert sorted(facts["sites"]) == HONEST
    assert sorted(facts["left_out"]) == ["site-04", "site-05", "site-06", "site-07"]
    check_reasons(facts["left_out"])
    # By the operator's keys, not by anything that the sites said.
    control = federation[1]
    node_of = {bytes(n.public_key): n.node_id for n in control.nodes()}
    for site in HONEST:
        key = public_keys(federation[0].public)[site]
        assert facts["sites"][site]["node_id"] == str(node_of[key])
    (line,) = (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines())
    assert set(line["partitions"]) < {0, 1, 2}
    assert line["eval_partitions"] == [0, 1, 2]
    # Neither the run's folder nor the operator's terminal gets more than lines of it.
    assert (run / "run.json").stat().st_size < 20_000
    assert "going on without:" in said
    assert "xxxx" not in said
    assert "\x1b[2J" not in said
    assert "\x1b[31mbb" not in said


def test_where_all_sites_must_be_ready_the_error_names_the_liars_alone(
    federation: tuple[Infiltrated, Control], tiny_model: Path
) -> None:
    """And a node whose key the operator has not registered with superlink.register."""
    local, control = federation
    path = local.sites_dir / "sites.json"
    listed = json.loads(path.read_text())
    assert sorted(listed.values()) == [f"site-{n:02d}" for n in range(SITES)]
    (unlisted,) = (node_id for node_id, site in listed.items() if site == "site-02")
    path.write_text(json.dumps({n: s for n, s in listed.items() if n != unlisted}))
    code, facts, _ = submit(federation, tiny_model, "strategy.require-all-nodes=true")
    assert code == 1
    head, *lines = facts["error"].splitlines()
    assert head == "5 sites are not ready:"
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert said.pop(f"node {unlisted}") == UNLISTED
    assert sorted(said) == ["site-04", "site-05", "site-06", "site-07"]
    said["site-06"] = said["site-06"].replace("and 2 sites", "and 3 sites")  # without site-02
    check_reasons(said)
    register(control, local.public, local.sites_dir)
    assert json.loads(path.read_text()) == listed
