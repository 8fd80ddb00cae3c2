"""What `superlink.status` says of each site, whatever the SuperLink and the results hold."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from superlink.control import Control, ControlError, KnownRun, RunStatus, public_keys
from superlink.onehost.processes import free_port
from superlink.provision import provision
from superlink.site_keys import revoke, rotate
from superlink.status import Report, Site, main, status, text

NEW, OLD = "22", "11"
LEFT = "2026-11-30T05:00:00+00:00"


class SuperLink(Control):
    """Nodes and runs as Flower lists them."""

    def __init__(self, status_of: dict[bytes, str]) -> None:
        self.status_of = status_of

    def wait_until_up(self, timeout_s: float) -> None:
        pass

    def nodes(self) -> list[Any]:
        return [
            SimpleNamespace(
                public_key=key, node_id=n, status=status, last_deactivated_at=LEFT,
                online_until=1_800_000_060.0, heartbeat_interval=30.0,
            )
            for n, (key, status) in enumerate(self.status_of.items())
        ]  # fmt: skip

    def runs(self) -> list[KnownRun]:
        ended = RunStatus("finished:completed", "", 0, 0)
        return [KnownRun(int(NEW), {}, "ab" * 32, ended, 1.0, "0.1.0")]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    provision(tmp_path, 4, "superlink:9092", [])
    return tmp_path / "public"


def written(results: Path, run: str, facts: object, *lines: object) -> None:
    (results / run).mkdir(parents=True)
    (results / run / "run.json").write_text(json.dumps(facts))
    (results / run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def of(report: Report, site: str) -> Site:
    return next(s for s in report.sites if s.site == site)


def test_each_site_has_the_state_that_the_superlink_and_the_folder_give_it(
    public: Path, tmp_path: Path
) -> None:
    keys = public_keys(public)
    revoke(public.parent, "site-03")
    link = SuperLink(
        {
            keys["site-00"]: "online",
            keys["site-01"]: "offline",
            keys["site-03"]: "unregistered",
            b"by hand": "online",
        }
    )
    report = status(link, public, tmp_path / "none")
    assert [(s.site, s.state) for s in report.sites] == [
        ("site-00", "online"), ("site-01", "offline"), ("site-02", "unknown"),
        ("site-03", "revoked"),
    ]  # fmt: skip
    # The last heartbeat of one that is online, the end of one that is not.
    assert of(report, "site-00").last_seen == "2027-01-15T08:00:00+00:00"
    assert of(report, "site-01").last_seen == LEFT
    assert report.exit_code == 4
    assert [note.split(":")[0].split(" may")[0] for note in report.notes] == [
        "site-02", "1 more keys", f"RESULTS_DIR={tmp_path / 'none'}",
    ]  # fmt: skip


def test_a_site_that_was_revoked_is_not_missed_and_one_that_is_still_let_in_is_named(
    public: Path, tmp_path: Path
) -> None:
    keys = public_keys(public)
    for site in ("site-02", "site-03"):
        revoke(public.parent, site)
    link = SuperLink({keys[f"site-0{n}"]: "online" for n in range(3)})
    report = status(link, public, tmp_path)
    assert report.exit_code == 0
    assert of(report, "site-02").state == of(report, "site-03").state == "revoked"
    (note,) = report.notes
    assert note.startswith("site-02-")
    assert note.endswith("a revoked key may still join; run superlink.register")


def test_a_rotated_site_is_there_once_with_its_new_key(public: Path, tmp_path: Path) -> None:
    old = public_keys(public)
    rotate(public.parent, "site-01")
    new = public_keys(public)
    link = SuperLink({**dict.fromkeys(new.values(), "online"), old["site-01"]: "unregistered"})
    report = status(link, public, tmp_path)
    assert [(s.site, s.state) for s in report.sites] == [(f"site-0{n}", "online") for n in range(4)]
    assert (report.exit_code, report.notes) == (0, [])


def test_a_key_that_flower_will_not_let_in_again_counts_as_away(
    public: Path, tmp_path: Path
) -> None:
    keys = public_keys(public)
    link = SuperLink({**dict.fromkeys(keys.values(), "online"), keys["site-00"]: "unregistered"})
    report = status(link, public, tmp_path)
    assert (report.exit_code, of(report, "site-00").state) == (4, "revoked")
    assert "superlink.provision rotate" in report.notes[0]


def test_rows_rounds_and_reasons_are_those_of_the_newest_run_that_has_them(
    public: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results"

    def said(rows: int, torch: str = "2.13.0") -> dict[str, Any]:
        about = {"device": "GPU 0 (H100)", "versions": {"torch": torch}, "policy": "cd" * 32}
        return {"num_examples": rows, **about}

    written(
        results, OLD,
        {"status": "completed", "started": "2026-11-29T00:00:00+00:00",
         "sites": {"site-00": said(5), "site-03": said(9)}},
        {"round": 1, "partitions": [0, 3], "rejected": {}},
    )  # fmt: skip
    written(
        results, NEW,
        {"status": "running", "started": "2026-11-30T00:00:00+00:00",
         "left_out": {"site-03": "no answer to the preflight"},
         "sites": {"site-00": said(7), "site-01": said(8, "2.12.0"), "site-02": said(6)}},
        {"round": 1, "partitions": [0, 1], "rejected": {"site-02": "late"}},
        {"round": 2, "partitions": [1], "rejected": {"site-00": "too long"}},
    )  # fmt: skip
    (results / "latest").symlink_to(NEW)
    (results / "33").symlink_to(tmp_path / "elsewhere" / "33")  # a link may lead anywhere
    written(tmp_path / "elsewhere", "33", {"started": "2026-12-01"})
    link = SuperLink(dict.fromkeys(public_keys(public).values(), "online"))
    report = status(link, public, results)
    assert report.newest_run == {
        "run": NEW, "status": "running", "started": "2026-11-30T00:00:00+00:00", "error": "",
    }  # fmt: skip
    rows = {s.site: (s.rows, s.app, s.last_round, s.left_out) for s in report.sites}
    app = f"0.1.0 {'ab' * 6}"

    def out(why: str, number: int | None) -> dict[str, Any]:
        return {"run": NEW, "round": number, "why": why}

    assert rows == {
        "site-00": (7, app, {"run": NEW, "round": 1}, out("too long", 2)),
        "site-01": (8, app, {"run": NEW, "round": 2}, None),
        "site-02": (6, app, None, out("late", 1)),
        # The SuperLink does not know that old run any more, so its app is not known either.
        "site-03": (9, "", {"run": OLD, "round": 1}, out("no answer to the preflight", None)),
    }
    assert report.notes == ["site-01 has torch 2.12.0, most have 2.13.0"]
    shown = text(report).splitlines()
    assert shown[1].split()[:2] == ["site-00", "online"]
    assert shown[1].endswith("cdcdcdcd  1            round 2: too long")
    assert f"1 of run {OLD}  no answer" in shown[4]
    assert shown[-1] == f"newest run: {NEW}, started 2026-11-30T00:00:00+00:00, running"


@pytest.mark.parametrize(
    ("lines", "left_out"),
    [
        ((), {"site-01": "the site has paused, since 2026-11-30 05:00 UTC"}),
        (
            ({"round": 1, "partitions": [0], "rejected": {"site-01": "X: 'the site has paused'"}},),
            {},
        ),
    ],
)
def test_a_site_that_has_paused_is_so_as_long_as_the_newest_run_says_it(
    public: Path, tmp_path: Path, lines: tuple[object, ...], left_out: dict[str, str]
) -> None:
    results = tmp_path / "results"
    written(results, OLD, {"started": "2026-11-29", "left_out": left_out}, *lines)
    link = SuperLink(dict.fromkeys(public_keys(public).values(), "online"))
    report = status(link, public, results)
    states = {s.site: s.state for s in report.sites}
    assert states == dict.fromkeys(states, "online") | {"site-01": "paused"}
    assert report.exit_code == 4
    written(results, NEW, {"started": "2026-11-30"})
    assert status(link, public, results).exit_code == 0


@pytest.mark.parametrize(
    "facts",
    [
        [], 7, {"sites": [], "left_out": 3}, {"sites": {"site-00": 1}, "started": {}},
        {"sites": {"site-00": {"num_examples": "9", "versions": [1], "device": ["x"]}}},
        {"left_out": {"site-00": "\x1b[31mred\nsite-01 online"}, "error": "a\nb" * 10**4},
    ],
)  # fmt: skip
def test_whatever_a_serverapp_has_written_is_shown_as_plain_lines(
    public: Path, tmp_path: Path, facts: object
) -> None:
    lines: tuple[object, ...] = (
        {"round": "x"},
        [],
        {"round": 1, "partitions": [[], {}, None], "rejected": 3},
        {"round": 2},
    )
    written(tmp_path / "results", NEW, facts, *lines)
    link = SuperLink(dict.fromkeys(public_keys(public).values(), "online"))
    report = status(link, public, tmp_path / "results")
    shown = text(report)
    assert len(shown.splitlines()) == 5 + bool(report.newest_run)
    assert shown.replace("\n", "").isprintable()
    assert max(map(len, shown.splitlines())) < 400
    assert of(report, "site-00").rows is None


def test_in_json_it_names_its_schema_as_the_records_do(
    public: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("superlink.status.connected", lambda *_: SuperLink({}))
    monkeypatch.setattr(sys, "argv", ["superlink.status", "--format", "json"])
    monkeypatch.setenv("PUBLIC_DIR", str(public))
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path))
    code = main()
    said = json.loads(capsys.readouterr().out)
    fields = ["schema", "time", "superlink", "exit_code", "sites", "newest_run", "notes"]
    assert sorted(said) == sorted(fields)
    assert (said["schema"], said["exit_code"]) == (1, code)


def test_no_keys_and_a_superlink_that_is_down_are_one_line_each(
    public: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(
        ControlError, match=r"no site-NN\.pub in .*; run superlink\.provision first"
    ):
        status(SuperLink({}), tmp_path / "empty", tmp_path)
    monkeypatch.setattr("superlink.status.UP_WITHIN_S", 1)
    monkeypatch.setattr(sys, "argv", ["superlink.status", "--format", "json"])
    monkeypatch.setenv("PUBLIC_DIR", str(public))
    monkeypatch.setenv("CONTROL_ADDRESS", f"localhost:{free_port()}")
    assert main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "nothing listens at port" in said.err
    assert len(said.err.splitlines()) == 1
