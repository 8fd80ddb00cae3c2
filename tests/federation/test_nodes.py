"""Sites that are late, lose their ClientApp or their key: the run goes on and says why."""

import json
import threading
import time
from pathlib import Path

import pytest

from app.server.exchange import REFUSED
from superlink.control import public_keys
from superlink.onehost.processes import REPOSITORY, LocalFederation
from superlink.register import register
from superlink.site_keys import revoke
from superlink.submit import submit
from supernode.partitions import Split, prepare_data
from tests.federation.drill import running, until
from tests.federation.hostile import hostile
from tests.samples import ROWS

pytestmark = pytest.mark.faults
SITES, LATE, KILLED, REVOKED = 4, 1, 2, 3
ROUND_TIMEOUT_S = 150  # all of it passes, since one site is late; the others need it on a busy host


class Unreliable(LocalFederation):
    def start_node(self, number: int, **settings: str) -> None:
        if number in (LATE, KILLED):
            folder = self.work / f"late-{number}"
            settings |= hostile(folder, "late")
            (folder / "slow").touch()
            settings["LOCK_DIR"] = str(folder)  # a host of its own: it keeps its device busy
        super().start_node(number, **settings)


def test_sites_that_fail_are_named_and_come_back_but_for_one_that_was_revoked(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(ROWS))
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(tiny_model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f"num-server-rounds=2 strategy.min-nodes={SITES} strategy.fraction-train=1.0",
        f"train.training-arguments.max-steps=2 strategy.round-timeout-s={ROUND_TIMEOUT_S}",
        "strategy.fraction-evaluate=0.0 strategy.min-replies=1",
    ]
    ended: list[int] = []
    with Unreliable(tmp_path, models_dir, tmp_path / "results", SITES) as federation:
        federation.provision()
        prepare_data(federation.federation, Split(str(source), SITES))
        control = federation.start()
        ids = {bytes(n.public_key): n.node_id for n in control.nodes()}
        follow = threading.Thread(
            target=lambda: ended.append(submit(REPOSITORY, overrides, control, federation.public))
        )
        follow.start()
        until((tmp_path / f"late-{KILLED}" / "waiting").is_file, 240, "a ClientApp that trained")
        victims = running(federation.processes[f"site-{KILLED:02d}"].pid, "flwr-clientapp")
        assert victims
        for victim in victims:
            victim.kill()
        revoke(federation.federation, f"site-{REVOKED:02d}")
        assert register(control, federation.public, federation.sites_dir).shut_out == 1
        metrics = federation.results / "latest" / "metrics.jsonl"
        until(metrics.is_file, ROUND_TIMEOUT_S + 60, "the end of the first round")
        for number in (LATE, KILLED):
            (tmp_path / f"late-{number}" / "slow").unlink()
        follow.join(timeout=300)
        assert ended == [0]
        # A SuperNode that is started anew is the same node to the SuperLink.
        federation.stop_node(0)
        federation.start_node(0)
        key = public_keys(federation.public)["site-00"]
        time.sleep(1)
        until(lambda: control.node_status()[key] == "online", 120, "site-00 online again")
        assert {bytes(n.public_key): n.node_id for n in control.nodes()} == ids
    first, second = (json.loads(line) for line in metrics.read_text().splitlines())
    print(first["rejected"])
    # The one whose key was revoked in round 1 may have been faster than that.
    assert set(first["partitions"]) - {REVOKED} == {0}
    assert set(first["rejected"]) - {f"site-{REVOKED:02d}"} == {
        f"site-{LATE:02d}", f"site-{KILLED:02d}",
    }  # fmt: skip
    late = f"no reply within strategy.round-timeout-s = {ROUND_TIMEOUT_S}"
    assert first["rejected"][f"site-{LATE:02d}"] == late
    assert "ClientApp" in first["rejected"][f"site-{KILLED:02d}"]
    assert second["partitions"] == [0, LATE, KILLED]
    assert second["rejected"] == {f"site-{REVOKED:02d}": REFUSED}
