"""What the end of a run says to superlink.submit: may it be resumed, or tried again?"""

from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from app.config import GIVEN_UP, SILENT
from app.server.preflight import PreflightError
from app.server_app import main
from tests.samples import run_config, write_site_list
from tests.stand_in_grid import StandInGrid


def silent(message: Message) -> None:
    return None


def not_ready(message: Message) -> Message:
    facts = ConfigRecord({"partition-id": 3, "error": "no data"})
    return Message(RecordDict({"preflight": facts}), reply_to=message)


@pytest.mark.parametrize(
    ("nodes", "begin"),
    [
        ({}, SILENT),
        ({40: silent}, SILENT),
        ({40: not_ready}, GIVEN_UP),
        ({40: not_ready, 50: silent}, GIVEN_UP),
    ],
)
def test_sites_that_keep_silent_are_no_reason_to_give_a_run_up(
    nodes: dict[int, object], begin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("SITES_DIR", str(write_site_list(tmp_path / "sites", {40: 3, 50: 4})))
    config = run_config(
        min_nodes=max(1, len(nodes)), min_train_nodes=1, min_replies=1, node_timeout_s=5.0
    )
    context = Context(1, 0, {}, RecordDict(), config.flat())  # type: ignore[arg-type]
    with pytest.raises(PreflightError, match=f"^{begin}"):
        main(StandInGrid(nodes), context)  # type: ignore[arg-type]
