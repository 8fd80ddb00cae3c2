"""Sites with a policy of their own in real runs: each key once, a pause, an app approved there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import superlink.submit
from app.site.gate import WITHHELD
from app.site.policy import Policy
from superlink.control import Control
from superlink.onehost.processes import REPOSITORY, LocalFederation
from supernode.partitions import Split, prepare_data
from tests.federation.drill import until
from tests.samples import ROWS, write_jsonl

pytestmark = pytest.mark.faults
SITES = 8
FAR = datetime.now(UTC) + timedelta(hours=6)
HOURS = f'"{FAR:%H:%M}-{FAR + timedelta(hours=1):%H:%M}"'
# What two runs ask for too much of: site -> its policy. The rule that is broken stands in line 2.
FIRST = {
    2: "min-rows = 1000", 3: "max-rows-per-round = 7", 4: "max-steps-per-round = 1",
    5: f'hours = {HOURS}\ntime-zone = "UTC"', 6: 'base-models = ["ffffffffffffffff"]',
    7: 'strategies = ["fedprox"]',
}  # fmt: skip
SECOND = {
    1: "max-messages-per-day = 5", 2: 'codecs = ["int4"]', 3: "max-clip-norm = 0.5",
    4: "min-noise-multiplier = 1.0", 6: "error-lines = false",
}  # fmt: skip
OPEN, BROKEN, PAUSED = 0, 6, 7
MARKER = "patient Wilhelmina Zwetschge of ward 13"


@pytest.fixture(scope="module")
def federation(
    models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalFederation, Control]]:
    work = tmp_path_factory.mktemp("policy")
    source = work / "rows.json"
    source.write_text(
        json.dumps([r | {"input": f"{n}: {r['input']}"} for n in range(4) for r in ROWS])
    )
    with LocalFederation(work, models_dir, work / "results", SITES) as local:
        local.provision()
        prepare_data(local.federation, Split(str(source), SITES))
        control = local.start()
        until(lambda: list(control.node_status().values()).count("online") == SITES, 240, "sites")
        yield local, control


def site(local: LocalFederation, number: int) -> Path:
    return local.federation / f"site-{number:02d}"


def put_in_force(local: LocalFederation, policies: dict[int, str]) -> None:
    for number in range(SITES):
        path = site(local, number) / "policy.toml"
        path.unlink(missing_ok=True)
        if number in policies:
            path.write_text(f"# of site {number}\n{policies[number]}\n")


def submit(
    federation: tuple[LocalFederation, Control],
    model: Path,
    app: Path = REPOSITORY,
    rounds: int = 1,
    changes: str = "",
) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Exit code, run.json and metrics.jsonl of the newest run."""
    local, control = federation
    overrides = [
        str(REPOSITORY / "app/profiles/demo.toml"),
        f"model.name={json.dumps(str(model))} model.lora.peft-lora-r=4 train.seq-length=512",
        f'num-server-rounds={rounds} strategy.name="fedavg" communication.codec="int8"',
        "strategy.min-nodes=2 strategy.require-all-nodes=false strategy.fraction-train=1.0",
        "strategy.min-replies=1 strategy.min-evaluate-nodes=2 strategy.node-timeout-s=240",
        f'train.training-arguments.max-steps=2 resume="0" {changes}',
    ]
    before = {p.resolve() for p in local.results.glob("*/run.json")}
    code = superlink.submit.submit(app, overrides, control, local.public)
    (new,) = {p.resolve() for p in local.results.glob("*/run.json")} - before
    metrics = new.parent / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return code, json.loads(new.read_text()), [json.loads(x) for x in lines]


def audited(local: LocalFederation, number: int) -> list[dict[str, Any]]:
    text = (site(local, number) / "state" / "audit.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def decide(local: LocalFederation, number: int, *words: str) -> str:
    """What a hospital types beside its SuperNode."""
    done = subprocess.run(
        [sys.executable, "-m", "supernode.site", *words], cwd=REPOSITORY, text=True, check=True,
        capture_output=True, env={"SITE_DIR": str(site(local, number)), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout


def test_sites_keep_out_of_a_run_that_does_not_fit_by_the_line_of_their_policy(
    federation: tuple[LocalFederation, Control], tiny_model: Path
) -> None:
    """The two others go on, in the second round the one that has not had enough for today."""
    local, _ = federation
    own = {0: "held-out-losses = false", 1: "max-rounds-per-day = 1"}
    put_in_force(local, FIRST | own)
    code, facts, lines = submit(federation, tiny_model, rounds=2)
    print(json.dumps(facts["left_out"], indent=1))
    assert (code, facts["status"]) == (0, "completed")
    assert sorted(facts["sites"]) == ["site-00", "site-01"]
    for number, text in FIRST.items():
        rule = text.splitlines()[0]
        why = facts["left_out"][f"site-{number:02d}"]
        assert why.startswith(f"policy.toml, line 2: {rule}; "), why
        assert [(x["kind"], x["outcome"]) for x in audited(local, number)] == [("query", "refused")]
    for number in own:
        sha256 = Policy.read(site(local, number)).sha256
        assert facts["sites"][f"site-{number:02d}"]["policy"] == sha256
        log = (local.work / "logs" / f"site-{number:02d}.log").read_text()
        assert f"policy.toml {sha256[:12]} is in force: {own[number]}" in log
    assert [line["partitions"] for line in lines] == [[0, 1], [0]]
    assert "line 2: max-rounds-per-day = 1; 1 were trained" in lines[1]["rejected"]["site-01"]
    assert [line["eval_partitions"] for line in lines] == [[1], [1]]
    record = audited(local, 1)
    assert {x["app"] for x in record} == {local._app_sha256}
    assert [(x["kind"], x["outcome"]) for x in record] == [
        ("query", "sent"), ("evaluate", "sent"), ("train", "sent"), ("evaluate", "sent"),
        ("train", "refused"), ("evaluate", "sent"),
    ]  # fmt: skip
    trained = record[2]
    assert trained["run"] == facts["run_id"]
    assert [x["round"] for x in record] == [None, 0, 1, 1, 2, 2]
    assert (trained["round"], trained["steps"], trained["rows"]) == (1, 2, 8)
    assert trained["change_norm"] == pytest.approx(lines[0]["client_update_norms"][1], rel=1e-3)


def test_a_pause_and_the_other_rules_are_told_and_error_lines_stay_at_home(
    federation: tuple[LocalFederation, Control], tiny_model: Path
) -> None:
    local, _ = federation
    put_in_force(local, SECOND)
    train = site(local, BROKEN) / "data" / "train.jsonl"
    rows = train.read_text()
    train.write_text(rows + '{"input": "x", "output": []}\n')
    assert decide(local, PAUSED, "pause").startswith("paused: ")
    code, facts, lines = submit(federation, tiny_model)
    train.write_text(rows)
    print(json.dumps(facts["left_out"], indent=1))
    assert (code, [line["partitions"] for line in lines]) == (0, [[0, 5]])
    said = facts["left_out"]
    for number in set(SECOND) - {BROKEN}:
        assert said[f"site-{number:02d}"].startswith(f"policy.toml, line 2: {SECOND[number]}; ")
    assert said[f"site-{BROKEN:02d}"] == WITHHELD
    log = (local.work / "logs" / f"site-{BROKEN:02d}.log").read_text()
    assert "data/train.jsonl, line 1" in log
    assert said[f"site-{PAUSED:02d}"].startswith("the site has paused, since 20")
    decide(local, PAUSED, "resume")


def test_a_failing_sites_last_lines_reach_the_operator_if_its_policy_lets_errors_out(
    federation: tuple[LocalFederation, Control], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that diverges, on a patient's rows, at a site without a policy and one with."""
    local, _ = federation
    monkeypatch.setattr(superlink.submit, "MAX_RESUMES", 0)
    put_in_force(local, {BROKEN: SECOND[BROKEN]})
    for number in (OPEN, BROKEN):
        told = [r | {"output": f"{r['output']} As {MARKER} knows."} for r in ROWS[:8]]
        write_jsonl(site(local, number) / "data" / "train.jsonl", told)
    others = ",".join(f"site-{n:02d}" for n in set(range(SITES)) - {OPEN, BROKEN})
    changes = f'strategy.exclude-sites="{others}" strategy.max-retries=0 '
    changes += "train.learning-rate-max=1e38 train.learning-rate-min=1e38"
    code, facts, _ = submit(federation, tiny_model, changes=changes)
    assert code == 1
    told_by = "<class 'app.site.partition.SiteError'>:<'{}'>".format
    why = told_by("FloatingPointError (the site's log says where)")
    assert f"site-{OPEN:02d}: {why}; site-{BROKEN:02d}: {told_by(WITHHELD)}" in facts["error"]

    text = (local.results / facts["run_id"] / "events.jsonl").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    at = [event.get("why") for event in events].index(why)
    texts = [event["text"] for event in events[at + 1 :]]
    below = [text for text in texts if "last in the log of" in text]
    print("\n".join(event["text"] for event in events[at - 1 : at + 8]))
    assert below == texts[: len(below)]
    begins = f"[round 1/1]   last in the log of site-{OPEN:02d}: "
    assert all(line.startswith(begins) for line in below)
    assert below[-3].endswith(": step 1 of 2")
    assert below[-2].endswith(": step 2 of 2")
    assert "FloatingPointError in app.client_app line " in below[-1]
    for number in (OPEN, BROKEN):
        log = (local.work / "logs" / f"site-{number:02d}.log").read_text()
        assert "step 2 of 2: loss nan" in log
        reason = audited(local, number)[-1]["reason"]
        assert reason == "FloatingPointError (the site's log says where)"
    assert f"log of site-{BROKEN:02d}" not in text
    seen = [p for p in local.work.rglob("*") if p.is_file() and "data" not in p.parts]
    assert any(p.suffix == ".db" for p in seen)
    assert [p for p in seen if MARKER.encode() in p.read_bytes()] == []


def test_an_app_that_a_site_has_approved_is_run_there_and_nowhere_else(
    federation: tuple[LocalFederation, Control], tiny_model: Path, tmp_path: Path
) -> None:
    local, _ = federation
    put_in_force(local, {})
    shutil.copytree(REPOSITORY / "app", tmp_path / "app")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / "app" / "plan.py").open("a") as file:
        file.write("\n# changed\n")
    code, facts, _ = submit(federation, tiny_model, app=tmp_path)
    assert code == 1
    assert "site-07: " in facts["error"]
    assert "site-07 runs app" in facts["error"]
    for number in (3, 7):
        shown = decide(local, number, "apps").splitlines()[-1].split()
        assert shown[0] == "refused"
        assert shown[1] == audited(local, number)[-1]["app"] != local._app_sha256
        assert shown[3] == "0.1.0,"
        decide(local, number, "approve", shown[1], "--by", "Dr. Weiss")
    code, facts, _ = submit(federation, tiny_model, app=tmp_path)
    assert code == 0
    assert sorted(facts["sites"]) == ["site-03", "site-07"]
    assert all("runs app" in why for why in facts["left_out"].values())
    assert decide(local, 3, "withdraw", shown[1], "--by", "Dr. Rot").startswith("withdrawn: ")
    code, facts, _ = submit(federation, tiny_model, app=tmp_path)
    assert code == 1
    assert "site-03: site-03 runs app" in facts["error"]
    assert "site-07 runs app" not in facts["error"]
    assert decide(local, 3, "apps").splitlines()[1].startswith(f"withdrawn {shown[1]}  ")
    print((site(local, 1) / "state" / "audit.jsonl").read_text())
