"""A federation saved while it runs, and put back elsewhere: the same sites, and a run of theirs."""

import json
from pathlib import Path

import pytest

from superlink.backup import backup
from superlink.control import Control, public_keys
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.register import register
from superlink.restore import restore
from superlink.status import status
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.federation.drill import until
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES = 2


def folders(federation: LocalFederation) -> dict[str, Path]:
    return {
        "federation": federation.federation,
        "sites": federation.sites_dir,
        "audit": federation.federation / "audit",
        "state": federation.work / "superlink",
        "results": federation.results,
    }


def nodes(control: Control) -> dict[bytes, int]:
    return {bytes(node.public_key): node.node_id for node in control.nodes()}


def test_sites_come_back_as_the_nodes_that_they_were_and_their_run_goes_on(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The first host is lost after a run of one round; the second has another port."""
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(ROWS))
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds=1 strategy.min-nodes={SITES} strategy.fraction-evaluate=0.0",
    ]
    old_home, new_home = tmp_path / "old", tmp_path / "new"
    with LocalFederation(old_home, models_dir, old_home / "results", SITES) as old:
        old.provision()
        prepare_data(old.federation, Split(str(source), SITES))
        control = old.start()
        assert submit(REPOSITORY, overrides, control, old.public) == 0
        before, known = nodes(control), [run.run_id for run in control.runs()]
        archive = backup(folders(old), tmp_path / "saved")
        for name in ("superlink", "site-00", "site-01"):
            old.kill(name)

    with LocalFederation(new_home, models_dir, new_home / "results", SITES) as new:
        restore(archive, folders(new))
        assert not list(new.federation.glob("site-*/data/*"))
        new.provision()  # another port: in site.env, with the keys that were there
        prepare_data(new.federation, Split(str(source), SITES))
        control = new.start_superlink()
        done = register(control, new.public, new.sites_dir)
        assert (done.sites, done.new, done.warnings) == (SITES, 0, [])
        for number in range(SITES):
            new.start_node(number)
        until(lambda: status(control, new.public, new.results).exit_code == 0, 240, "both sites")
        assert nodes(control) == before
        assert [run.run_id for run in control.runs()] == known
        more = [*overrides, 'num-server-rounds=2 resume="latest"']
        assert submit(REPOSITORY, more, control, new.public) == 0
        report = status(control, new.public, new.results)
        assert report.newest_run is not None
        assert report.newest_run["status"] == "completed"
        assert {s.state for s in report.sites} == {"online"}
        for site in report.sites:
            assert (site.device, site.left_out) == ("cpu", None)
            assert site.app.startswith("0.1.0 ")
            assert site.last_round == {"run": report.newest_run["run"], "round": 2}
        facts = json.loads((new.results / report.newest_run["run"] / "run.json").read_text())
        assert facts["resumed_from"] == [{"run_id": str(known[0]), "last_round": 1}]
        assert public_keys(new.public) == public_keys(old.public)
    record = (new.federation / "audit" / "audit.jsonl").read_text().splitlines()
    acts = [(line["act"], line["outcome"]) for line in map(json.loads, record)]
    assert acts == [("register", "done")] * SITES + [("submit", "done")] * 2
