"""What the page makes of files that are not what they should be: text, or their names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from superlink.page import runs, sections
from superlink.page.document import write_standalone
from superlink.page.prometheus import metrics
from superlink.page.runs import Run, read_run, version
from superlink.page.state import State, state_of
from superlink.run_files import MOST_BYTES
from tests.superlink.page.asking import Elements, Page
from tests.superlink.page.made_runs import NEWEST, events, facts, line, two_runs, write

OURS = (
    "title h2 svg rect figure figcaption text line path circle section ol li details summary form "
    "select option button label time span style b div p"
)
NUMBERS = ("train_loss", "eval_loss_median", "eval_loss_median_before", "mb_sent")
EVIL = "<img src=x onerror=alert(1)>"


def everywhere(value: Any, text: str) -> Any:
    """``value`` with every text and every key in it made ``text``, but those that are read."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [everywhere(v, text) for v in value]
    if isinstance(value, dict):
        return {k: everywhere(v, text) for k, v in value.items()} | {text: text}
    return value


@pytest.mark.parametrize(
    "text", [EVIL, '"><script>alert(1)</script>', "' onload='x", "</title><b>"]
)
def test_whatever_a_file_says_is_only_text(tmp_path: Path, text: str) -> None:
    told = [everywhere(e, text) | {"event": e["event"]} for e in events()]
    evil = everywhere(facts("5"), text)
    evil["sites"] = {text: {"device": text}}
    folder = write(tmp_path / "5", evil, [everywhere(line(1), text)], told)
    (folder / "eval").mkdir()
    report = {"datasets": {text: {"title": text}}, "subjects": [{"name": text}], "published": text}
    (folder / "eval" / "report.json").write_text(json.dumps(report))
    write(tmp_path / "6", evil | {"config": {text: text}})
    page = Page(tmp_path)
    plain = {tag for tag, _ in Elements(Page(two_runs(tmp_path / "x")).get("/").text).tags}
    for path in ("/", "/runs/5", "/runs/5?beside=6", "/runs/5/report.html"):
        read = Elements(page.get(path).text)
        tags = {tag for tag, _ in read.tags}
        assert "img" not in tags
        assert [v for t, v in read.tags if t == "script"] in (
            [],
            [{"src": "/page.js", "defer": ""}],
        )
        assert not [v for _, v in read.tags if any(k.startswith("on") for k in v)]
        assert tags <= plain | {*OURS.split()}
    assert text in Elements(page.get("/runs/5").text).text


# What json.loads makes of a file, the ends of what is read as a number among it.
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from([-1e18, -1, 0, 0.5, 5e-324, 10**18])
    | st.text(st.characters(), max_size=9),  # halves of characters too
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """Such an object in which some values are anything."""
    keys = draw(st.lists(st.sampled_from(sorted(whole)), max_size=3))
    return whole | {key: draw(ANYTHING) for key in keys}


@given(
    run=spoilt(facts("5")) | ANYTHING,
    rounds=st.lists(spoilt(line(1)) | ANYTHING, max_size=3),
    told=st.lists(st.sampled_from(events()).flatmap(spoilt) | ANYTHING, max_size=5),
    config=spoilt(facts("5")["config"]),
)
@example(run={}, rounds=[{"round": 0.5, "partitions": [1], "shares": [0.5]}], told=[], config={})
@example(run={}, rounds=[], told=[events()[4] | {"left_s": -1e18}], config={})
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_whatever_it_holds_is_an_error_of_the_page(
    tmp_path: Path, run: Any, rounds: list[Any], told: list[Any], config: dict[str, Any]
) -> None:
    if isinstance(run, dict) and "config" in run:
        run = run | {"config": config}
    write(tmp_path / "5", json.dumps(run), rounds, told)
    page = Page(tmp_path)
    for path in ("/", "/runs/5", "/runs/5?beside=5", "/metrics"):
        answer = page.get(path)
        assert answer.status_code == 200
        assert "cannot be shown" not in answer.text


@pytest.mark.parametrize("average", [10**400, 0.5], ids=["too large", "half a character"])
def test_no_evaluation_whatever_it_holds_is_an_error_of_the_page(
    results: Path, average: Any
) -> None:
    base = {"name": "base", "round": 0, "adapter": None, "average": average, "scores": {}}
    report = {
        "datasets": {"d": {"title": "\ud800", "questions": 1}}, "rounds": [], "published": [],
        "subjects": [base | {"scores": {"d": {"accuracy": 1}}}], "best": "base",
        "settings": {}, "model": {"quantization": "4"},
    }  # fmt: skip
    (results / NEWEST / "eval").mkdir()
    (results / NEWEST / "eval" / "report.json").write_text(json.dumps(report))
    assert Page(results).get(f"/runs/{NEWEST}").status_code == 200
    assert write_standalone(results, NEWEST).exists()


def test_one_run_that_cannot_be_shown_is_a_row_that_says_so(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sections.row_of

    def broken(run: Run, state: State) -> str:
        if run.run_id == NEWEST:
            raise OSError("with a text of the run's")
        return whole(run, state)

    monkeypatch.setattr(sections, "row_of", broken)
    text = Elements(Page(results).get("/").text).text
    assert f"{NEWEST}cannot be shown (OSError)" in text
    assert "with a text" not in text
    assert "completed" in text  # the other run's row


def test_a_figure_that_cannot_be_is_left_out(tmp_path: Path) -> None:
    told = [events()[2], events()[4] | {"round": 2.5, "left_s": -1.0}]
    rounds = [line(1) | {"partitions": [0.5, 1]}, line(2) | {"round": 2.5}]
    write(tmp_path / "5", facts("5", bytes_sent=-1), rounds, told)
    state = state_of(read_run(tmp_path, "5"))
    assert (state.done, state.ready_in) == (1, None)
    assert "site-00" in state.sites
    assert state.sites["site-00"].rounds == 0  # whose partition is no 0.5
    assert "sent_bytes" not in metrics(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "run.json").write_text("[" * 100_000),
        lambda folder: (folder / "run.json").write_text('"\\ud800"'),
        lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n\x00\n"),
        lambda folder: (folder / "events.jsonl").write_text("no json\n"),
        lambda folder: os.truncate(folder / "events.jsonl", MOST_BYTES + 1),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(results: Path, spoil: Any) -> None:
    spoil(results / NEWEST)
    answer = Page(results).get(f"/runs/{NEWEST}")
    assert answer.status_code == 200
    assert "Not readable: " in answer.text


def test_a_link_or_a_pipe_in_the_results_leads_nowhere(results: Path, tmp_path: Path) -> None:
    secret = write(tmp_path / "elsewhere", facts("9", error="of somebody else"))
    (results / "9").symlink_to(secret)
    folder = write(results / "8", None)
    (folder / "run.json").symlink_to(secret / "run.json")
    (folder / "events.jsonl").unlink()
    os.mkfifo(folder / "events.jsonl")
    page = Page(results)
    assert page.get("/runs/9").status_code == 404
    assert "of somebody else" not in page.get("/runs/8").text
    assert "/runs/9" not in page.get("/").text


def test_no_folder_of_a_run_is_a_link_either(results: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "report.html").write_text("of somebody else")
    (elsewhere / "report.json").write_text("{}")
    (results / NEWEST / "eval").symlink_to(elsewhere)
    page = Page(results)
    answer = page.get(f"/runs/{NEWEST}/evaluation")
    assert (answer.status_code, "of somebody else" in answer.text) == (404, False)
    shown = page.get(f"/runs/{NEWEST}")
    assert "Not readable: eval/report.json is behind a link" in shown.text
    before = version(results, NEWEST)
    (elsewhere / "report.json").write_text("{ }")
    assert version(results, NEWEST) == before  # not even its size is looked at


def test_a_folder_that_becomes_a_link_meanwhile_is_not_followed(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (results / NEWEST).rename(tmp_path / "elsewhere")
    (results / NEWEST).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(runs, "_is_folder", lambda _: True)  # as it was when it was looked at
    assert read_run(results, NEWEST).facts == {}
    with pytest.raises(OSError, match=NEWEST):
        write_standalone(results, NEWEST)
    assert not (tmp_path / "elsewhere" / "report.html").exists()


def test_a_file_is_written_over_no_link_in_the_run_s_folder(results: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".report.html", "report.html"):
        (results / NEWEST / name).symlink_to(victim)
    file = write_standalone(results, NEWEST)
    assert victim.read_text() == "precious"
    assert not file.is_symlink()
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not (results / NEWEST / ".report.html").is_symlink()


@pytest.mark.parametrize("none", ["NaN", "-Infinity", "1e999", "9" * 400, "true", '"3.7"'])
def test_what_is_no_number_is_not_shown_as_one(tmp_path: Path, none: str) -> None:
    spoilt = line(1) | dict.fromkeys(NUMBERS, "?")
    spoilt |= {"alphas": ["?", 1.0], "shares": [0.5, 0.5]}
    lines = json.dumps(spoilt).replace('"?"', none) + "\n"
    write(tmp_path / "5", facts("5", bytes_sent=None), lines, [])
    page = Page(tmp_path)
    assert "held_out_loss" not in page.get("/metrics").text
    shown = Elements(page.get("/runs/5").text).text
    assert "50.0 %" in shown
    assert not {"nan", "inf", "-inf", "3.700", "1.000"} & {*shown.replace("\n", " ").split()}


@pytest.mark.parametrize("run", [None, ""])
def test_a_folder_without_runs_or_with_an_empty_one_is_no_error(
    tmp_path: Path, run: str | None
) -> None:
    assert "No run has begun yet." in Page(tmp_path).get("/").text
    assert Page(tmp_path).get("/metrics").text == ""
    assert "No run has begun yet." in Page(tmp_path / "gone").get("/").text
    (tmp_path / "5").mkdir()
    if run is not None:
        write(tmp_path / "5", run)
    assert "starting" in Page(tmp_path).get("/runs/5").text
