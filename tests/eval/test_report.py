"""The report: what it says, that it loads nothing, that it never leaves half a file."""

import errno
import json
import math
import re
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval.report import page, write_report
from eval.summary import text_table
from tests.browser import BROWSER, in_browser
from tests.full_disk import full_disk

SETS = {"pubmedqa": "PubMedQA", "medmcqa": "MedMCQA", "medqa": "MedQA", "careqa": "CareQA"}
REFERENCE = {
    "name": "reference (AI4EOSC)",
    "pubmedqa": 70.80,
    "medmcqa": 58.04,
    "medqa": 62.84,
    "careqa": 52.87,
    "communication_mb": 2080.62,
    "source": "https://github.com/judithspd/ai4os-fedllm-medical",
}
WITHOUT_CAREQA = {k: v for k, v in REFERENCE.items() if k != "careqa"} | {"name": "leaderboard"}
ADAPTER_BYTES = 52 * 2**20  # rank 32 on q_proj and v_proj of the 8B model
EVIL = "<img src=x onerror=alert(1)>"


def score(accuracy: float) -> dict[str, Any]:
    return {
        "n": 500,
        "accuracy": accuracy,
        "ci95": [max(accuracy - 0.04, 0.0), min(accuracy + 0.04, 1.0)],
        "unparsed": 7,
        "label_accuracy": None,
        "majority": {"label": "yes", "accuracy": 0.552},
        "confusion": {
            "yes": {"yes": 240, "no": 30, "maybe": 0, "unparsed": 6},
            "no": {"yes": 50, "no": 118, "maybe": 0, "unparsed": 1},
            "maybe": {"yes": 40, "no": 15, "maybe": 0},
        },
        "notes": ["55 of 500 golds are 'maybe'"],
    }


def subject(server_round: int | None, accuracies: dict[str, float], p: float = 0.02) -> Any:
    """Base where there is no round; otherwise 3.10 points better than it everywhere."""
    name = None if server_round is None else f"peft_{server_round}"
    test = {"difference": 0.031, "only_base": 12, "only_adapter": 27, "p_value": p}
    return {
        "name": name or "base",
        "adapter": name,
        "sha256": "0f" * 32 if name else None,
        "round": server_round,
        "scores": {d: score(a) for d, a in accuracies.items()},
        "average": sum(accuracies.values()) / len(accuracies),
    } | ({"against_base": dict.fromkeys(accuracies, test)} if name else {})


def rounds(count: int) -> list[dict[str, Any]]:
    return [
        {
            "round": r,
            "train_loss": 3.7 / r,
            "eval_loss": 3.6 / r,
            "eval_loss_before": 3.69,
            "bytes_down": 2 * ADAPTER_BYTES,
            "bytes_up": 2 * ADAPTER_BYTES,
        }
        for r in range(1, count + 1)
    ]


def report(*evaluated: int, sets: tuple[str, ...] = tuple(SETS), **changed: Any) -> dict[str, Any]:
    base = {d: 0.6 + 0.01 * i for i, d in enumerate(sets)}
    better = {d: a + 0.031 for d, a in base.items()}
    return {
        "run": "17525078640131424984",
        "status": "completed, 10 of 10 rounds",
        "created": "2026-11-22T18:40:00+00:00",
        "model": {
            "name": "ContactDoctor/Bio-Medical-Llama-3-8B",
            "quantization": "4",
            "kind": "fp4",
            "compute_dtype": "float32",
            "fingerprint": "70cda8031d44ffa7",
            "device": "cpu",
        },
        "settings": {"batch_size": 16, "limit": None, "near_tie": 0.001},
        "versions": {"torch": "2.13.0"},
        "datasets": {
            d: {"title": SETS.get(d, d), "questions": 500, "source": f"{d}@e6f2"} for d in sets
        },
        "published": [REFERENCE, WITHOUT_CAREQA],
        "subjects": [subject(None, base), *(subject(r, better) for r in evaluated)],
        "best": None,
        "rounds": rounds(10),
    } | changed


class Read(HTMLParser):
    """What a page shows, and ``loads``: everything in it that could load or run something."""

    CANNOT_LOAD = (
        " html head meta title style body h1 h2 h3 h4 p div span b sup a ul li table thead "
        "tbody tr th td figure figcaption svg rect line path circle text "
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.policy = ""
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self._open.append(tag)
        if f" {tag} " not in self.CANNOT_LOAD:
            self.loads.append(f"<{tag}>")
        if tag == "meta" and "http-equiv" in values:
            assert values["http-equiv"] == "Content-Security-Policy"  # no refresh
            self.policy = values["content"]
        if tag == "a":
            self.links.append(values.pop("href"))
        for name, value in values.items():
            if name.startswith("on") or re.search("src|href|data|poster|action|background", name):
                self.loads.append(f"{name}={value}")
            self._css(value if name == "style" else "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:  # meta has no end
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self._css(data)
            return
        self.texts.append(data)
        if {"td", "th"} & set(self._open) and "sup" not in self._open:
            self.tables[-1][-1][-1] += data

    def _css(self, css: str) -> None:
        self.loads += re.findall(r"url\(.*?\)|@import.*|image-set\(|src:", css)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    @property
    def rows(self) -> dict[str, list[str]]:
        """The main table: name -> cells."""
        return {row[0].removesuffix(" best"): row[1:] for row in self.tables[0]}


def columns(table: str) -> dict[str, list[str]]:
    """The lines of a terminal table: name -> cells."""
    cells = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    return {line[0].removesuffix(" (best)"): line[1:] for line in cells}


def test_the_main_table_holds_every_number_with_two_decimals() -> None:
    assert Read(page(report(10))).rows == {
        "Model": [*SETS.values(), "Average", "MiB sent"],
        "reference (AI4EOSC)": ["70.80", "58.04", "62.84", "52.87", "61.14", "2080.62"],
        "leaderboard": ["70.80", "58.04", "62.84", "", "", "2080.62"],
        "base": ["60.00", "61.00", "62.00", "63.00", "61.50", ""],
        "peft_10": ["63.10", "64.10", "65.10", "66.10", "64.60", "2080.00"],
    }


def test_the_terminal_shows_the_same_table_aligned_in_plain_ascii() -> None:
    table = text_table(report(10))
    assert table.isascii()
    assert len({len(line) for line in table.splitlines()}) == 1
    assert columns(table) == {
        "accuracy in %": [*SETS.values(), "average"],
        "reference (AI4EOSC)": ["70.80", "58.04", "62.84", "52.87", "61.14"],
        "leaderboard": ["70.80", "58.04", "62.84", "-", "-"],
        "base": ["60.00", "61.00", "62.00", "63.00", "61.50"],
        "peft_10": ["63.10", "64.10", "65.10", "66.10", "64.60"],
    }


@given(
    sets=st.lists(st.sampled_from([*SETS, "demo"]), min_size=1, unique=True),
    accuracies=st.lists(st.floats(0, 1), min_size=5, max_size=5),
    evaluated=st.lists(st.integers(1, 99), max_size=3, unique=True),
)
@settings(max_examples=60)
def test_page_and_terminal_agree_whatever_was_evaluated(
    sets: list[str], accuracies: list[float], evaluated: list[int]
) -> None:
    given_report = report(*evaluated, sets=tuple(sets))
    chosen = dict(zip(sets, accuracies, strict=False))
    given_report["subjects"][0] = subject(None, chosen)
    read = Read(page(given_report))
    assert not read.loads
    terminal = columns(text_table(given_report))
    assert terminal["base"][:-1] == [f"{100 * chosen[d]:.2f}" for d in sets]
    rows = {name: cells[: len(sets) + 1] for name, cells in read.rows.items() if name != "Model"}
    del terminal["accuracy in %"]
    assert rows == {name: [c.strip("-") for c in cells] for name, cells in terminal.items()}
    assert ("leaderboard" in rows) == bool(set(sets) & WITHOUT_CAREQA.keys())
    assert ("reference (AI4EOSC)" in rows) == bool(set(sets) & REFERENCE.keys())


def test_one_sentence_says_what_came_out() -> None:
    four = Read(page(report(10))).text
    assert (
        "The adapter peft_10 reaches 64.60 % on average over 4 datasets, 3.10 points above the "
        "base model's 61.50 %: PubMedQA +3.10 (p = 0.02, may be chance); "
    ) in four
    assert "the exact McNemar test, 5 % over all 4 tests together (Bonferroni)." in four
    better, worse = subject(None, {"medqa": 0.65}), subject(3, {"medqa": 0.6}, p=0.3)
    worse["against_base"]["medqa"]["difference"] = -0.05
    text = Read(page(report(sets=("medqa",), subjects=[better, worse]))).text
    assert (
        "The adapter peft_3 reaches 60.00 % on MedQA, 5.00 points below the base model's 65.00 %: "
        "MedQA -5.00 (p = 0.3, may be chance), by the exact McNemar test."
    ) in text
    alone = Read(page(report(sets=("medqa",)))).text
    assert "The base model reaches 60.00 % on MedQA; no adapter was evaluated." in alone
    adapter = Read(page(report(subjects=report(10)["subjects"][1:]))).text
    assert "on average over 4 datasets; the base model was not evaluated." in adapter


@pytest.mark.parametrize(
    ("p", "said", "starred"),
    [
        (0.049, "p = 0.049, more than chance", True),
        (0.05, "p = 0.05, may be chance", False),
        (1.0, "p = 1, may be chance", False),
        (1e-9, "p < 0.001, more than chance", True),
    ],
)
def test_chance_is_judged_at_five_percent(p: float, said: str, starred: bool) -> None:
    base, adapter = subject(None, {"medqa": 0.6}), subject(1, {"medqa": 0.631}, p=p)
    html = page(report(sets=("medqa",), subjects=[base, adapter]))
    assert said in Read(html).text
    assert ("63.10<sup>*</sup>" in html) == starred


def test_of_several_adapters_the_best_is_marked_and_shown_in_full() -> None:
    several = report(*range(1, 11), best="peft_5")
    html = page(several)
    assert re.findall(r'<td>(\w+) <span class="best">', html) == ["peft_5"]
    assert re.findall(r"<h4>(\w+)</h4>", html) == ["base", "peft_5"] * 4
    read = Read(html)
    assert "The best of 10 adapters, peft_5, reaches 64.60 %" in read.text
    assert "picked by these same questions" in read.text
    assert [read.rows[f"peft_{r}"][-1] for r in (1, 2, 10)] == ["208.00", "416.00", "2080.00"]
    assert "Average accuracy in percent" in read.text
    assert html.count('class="ring"') == 1
    assert "peft_5 (best)" in text_table(several)
    assert text_table(several).count("best") == 1
    assert "Average accuracy in percent" not in Read(page(report(10))).text


def test_each_dataset_is_shown_in_full_with_confusion_and_notes() -> None:
    read = Read(page(report(10, sets=("pubmedqa",))))
    facts, confusion = read.tables[3], read.tables[4]
    assert dict(facts) == {  # type: ignore[arg-type]
        "Questions": "500",
        "Accuracy": "63.10 % (95 %: 59.10 to 67.10)",
        "Unparsed answers": "7",
        "Among the labels only": "—",
        "Always “yes”": "55.20 %",
        "Against base": "+3.10 points, p = 0.02",
        "Right only here": "27",
        "Right only in base": "12",
    }
    assert confusion == [
        ["", "yes", "no", "maybe", "unparsed"],
        ["yes", "240", "30", "0", "6"],
        ["no", "50", "118", "0", "1"],
        ["maybe", "40", "15", "0", "0"],
    ]
    assert "55 of 500 golds are 'maybe'" in read.text


def test_it_says_how_it_was_computed() -> None:
    read = Read(page(report(10)))
    facts = {row[0]: row[1] for table in read.tables for row in table if len(row) == 2}
    expected = {"fingerprint": "70cda8031d44ffa7", "batch_size": "16", "torch": "2.13.0"}
    expected |= {"peft_10": "0f" * 32, "MedQA": "medqa@e6f2", "limit": "—"}
    assert expected.items() <= facts.items()
    assert set(read.links) == {REFERENCE["source"]}


def test_without_rounds_there_are_no_curves_and_no_traffic_of_ours() -> None:
    read = Read(page(report(10, rounds=[])))
    assert "Over the rounds" not in read.text
    assert read.rows["peft_10"][-1] == ""
    demo = Read(page(report(10, rounds=[], run=None, sets=("demo",))))
    assert demo.rows["Model"] == ["demo", "Average"]
    assert "None" not in demo.text


@pytest.mark.parametrize("missing", [1, 4])
def test_traffic_is_left_empty_where_a_round_was_not_counted(missing: int) -> None:
    lines = [line for line in rounds(10) if line["round"] != missing]
    rows = Read(page(report(*range(1, 11), rounds=lines))).rows
    counted = [f"{208 * r}.00" if r < missing else "" for r in range(1, 11)]
    assert [rows[f"peft_{r}"][-1] for r in range(1, 11)] == counted


def test_traffic_is_what_the_run_counted_cut_off_rounds_as_well() -> None:
    lines = [line | {"mb_sent": 300.0 + line["round"]} for line in rounds(2)]
    rows = Read(page(report(1, 2, rounds=lines))).rows
    assert [rows[f"peft_{r}"][-1] for r in (1, 2)] == ["301.00", "302.00"]


def test_the_held_out_curve_is_the_sites_median_and_the_mean_only_where_a_run_has_no_median() -> (
    None
):
    def drawn(lines: list[dict[str, Any]]) -> str:
        found = re.search("<b>Loss</b>.*?</svg>", page(report(1, rounds=lines)), re.DOTALL)
        assert found
        return found.group()

    with_median = [
        {**r, "eval_loss": 99.0, "eval_loss_before": 99.0}
        | {"eval_loss_median": r["eval_loss"], "eval_loss_median_before": r["eval_loss_before"]}
        for r in rounds(3)
    ]
    assert drawn(with_median) == drawn(rounds(3))
    without_evaluation = [{"round": r["round"], "train_loss": r["train_loss"]} for r in rounds(3)]
    assert drawn(without_evaluation) != drawn(rounds(3))


def test_traffic_counts_the_held_out_evaluation() -> None:
    lines = [line | {"eval_bytes_down": ADAPTER_BYTES} for line in rounds(1)]
    assert Read(page(report(1, rounds=lines))).rows["peft_1"][-1] == "260.00"


@given(
    losses=st.lists(st.floats(0, 1e12) | st.sampled_from([math.nan, math.inf]), max_size=5),
    step=st.sampled_from([1, 7, 1000]),
)
@example(losses=[61.33333333333333, 61.333333333333336], step=1)
@example(losses=[5e-324, 0.0], step=1)
@settings(max_examples=100)
def test_any_loss_can_be_drawn(losses: list[float], step: int) -> None:
    lines = [{"round": step * r, "train_loss": loss} for r, loss in enumerate(losses, 1)]
    html = page(report(1, rounds=lines))
    finite = sum(map(math.isfinite, losses))
    charts = re.findall("<b>Loss</b>.*?</svg>", html, re.DOTALL)
    assert len(charts) == (finite > 0)
    for chart in charts:
        places = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)" r="2.6"', chart)
        assert len(places) == finite
        assert all(46 <= float(x) <= 330 and 12 <= float(y) <= 168 for x, y in places)


def test_a_report_without_a_shared_dataset_compares_with_nothing_published() -> None:
    demo = report(10, sets=("demo",))
    for shown in (Read(page(demo)).text, text_table(demo)):
        assert "reference" not in shown
        assert "leaderboard" not in shown
        assert "published" not in shown.lower()


def test_a_limit_is_said_above_the_table() -> None:
    limited = report(10, settings={"limit": 20})
    note = "Not comparable with published figures: only the first 20 questions of each dataset"
    html = page(limited)
    assert 0 < html.index(note) < html.index("<table")
    assert text_table(limited).startswith(note)
    assert "Not comparable" not in page(report(10)) + text_table(report(10))


def test_another_precision_or_number_of_questions_is_said_too() -> None:
    fast = report(10)
    fast["model"]["quantization"] = "nf4-bf16"
    assert "these are nf4-bf16" in page(fast)
    short = report(10)
    short["datasets"]["medqa"] |= {"questions": 12, "expected": 1273}
    assert "MedQA 12 of 1273" in page(short)
    short["datasets"]["medqa"]["questions"] = 1273
    assert "Not comparable" not in page(short)


def everywhere(value: Any, text: str) -> Any:
    """``value`` with every string that the page shows freely, and every label, made ``text``."""
    if isinstance(value, str):
        return text
    if isinstance(value, list):
        return [everywhere(v, text) for v in value]
    if isinstance(value, dict):
        return {k: everywhere(v, text) for k, v in value.items()}
    return value


@pytest.mark.parametrize("text", [EVIL, '"><script>alert(1)</script>', "' onload='x", "&lt;b&gt;"])
def test_whatever_the_report_says_is_only_text(text: str) -> None:
    evil = report(1, 2)
    evil["model"]["name"] = EVIL
    assert "&lt;img src=x onerror=alert(1)&gt;" in page(evil)
    evil = everywhere(evil, text)
    evil["settings"][text] = evil["versions"][text] = text
    for each in evil["subjects"]:
        each["scores"]["medqa"]["confusion"] = {text: {text: 1, "unparsed": 1}}
    read = Read(page(evil))
    assert not read.loads
    assert text in read.text
    assert not read.links


def test_only_a_web_address_becomes_a_link() -> None:
    published = [REFERENCE | {"source": "javascript:alert(1)"}]
    read = Read(page(report(10, published=published)))
    assert not read.links
    assert "javascript:alert(1)" in read.text


def test_a_name_cannot_steer_the_terminal() -> None:
    table = text_table(report(published=[REFERENCE | {"name": "\x1b[2Jä\n"}]))
    assert columns(table)["?[2J??"]


@pytest.mark.parametrize(
    "added",
    [
        '<img src="https://example.org/x.png">',
        "<script>1</script>",
        '<link rel="stylesheet" href="x.css">',
        '<p style="background:url(x.png)">',
        "<style>@import 'x.css';</style>",
        "<p onclick='x()'>",
        '<svg><use href="x.svg#a"/></svg>',
    ],
)
def test_the_check_for_loading_can_fail(added: str) -> None:
    html = page(report(*range(1, 11), best="peft_5"))
    assert not Read(html).loads
    assert Read(html.replace("</body>", f"{added}</body>")).loads


def test_the_page_forbids_itself_to_load_anything() -> None:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert Read(page(report(10))).policy == policy


def test_write_report_writes_the_report_and_its_page(tmp_path: Path) -> None:
    given_report = report(10)
    assert write_report(tmp_path, given_report) == tmp_path / "report.html"
    text = (tmp_path / "report.json").read_text()
    assert text == json.dumps(given_report, indent=2) + "\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(given_report)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.html"}


@pytest.mark.parametrize("room", [0, 1000])
def test_a_full_disk_leaves_the_report_before_intact(tmp_path: Path, room: int) -> None:
    write_report(tmp_path, report(5))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OSError, match="File too large"), full_disk(room):
        write_report(tmp_path, report(10))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failed_replace_leaves_the_page_before_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, report(5))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="broken disk"):
        write_report(tmp_path, report(10))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def browse(tmp_path: Path, html: str, *options: str) -> tuple[str, list[str]]:
    """Open ``html`` in Chromium; returns the DOM (or "") and the web addresses it asked for."""
    file, log = tmp_path / "page.html", tmp_path / "net.json"
    file.write_text(html, encoding="utf-8")
    assert BROWSER, "no chromium or google-chrome here"
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars"
    )
    done = subprocess.run(
        [
            BROWSER,
            *(f"--{flag}" for flag in flags.split()),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # what it asks for, it does not get
            f"--log-net-log={log}",
            *options,
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    net = json.loads(log.read_text())
    start = net["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [e["params"] for e in net["events"] if e["type"] == start and "params" in e]
    # Chromium's own requests, which it makes in spite of the flags, do not start from a file.
    asked = [j["url"] for j in jobs if j.get("initiator") in ("null", "file://")]
    return done.stdout, [url for url in asked if url.startswith(("http:", "https:"))]


def without_policy(html: str) -> str:
    """The page without its Content-Security-Policy, which would hide what it wants to load."""
    bare, removed = re.subn(r"<meta http-equiv=[^>]*>", "", html)
    assert removed == 1
    return bare


LAYOUT = """<script>
document.body.style.width = "380px";
const wrong = [], figures = [...document.querySelectorAll("figure svg[role]")];
const box = element => element.getBoundingClientRect();
for (const svg of figures) {
  const all = box(svg), texts = [...svg.querySelectorAll("text")];
  texts.forEach((text, i) => {
    const p = box(text);
    if (p.left < all.left - 1 || p.right > all.right + 1 || p.top < all.top - 1 ||
        p.bottom > all.bottom + 1)
      wrong.push("clipped: " + text.textContent);
    for (const other of texts.slice(i + 1)) {
      const q = box(other);
      if (p.left < q.right && q.left < p.right && p.top + 2 < q.bottom - 2 &&
          q.top + 2 < p.bottom - 2)
        wrong.push("overlap: " + text.textContent + " / " + other.textContent);
    }
  });
}
if (document.body.scrollWidth > 380) wrong.push("width " + document.body.scrollWidth);
document.title = "figures " + figures.length + "; " + wrong.join("; ");
</script></body>"""


@in_browser
def test_a_browser_draws_it_without_a_request_clipped_text_or_overlap(tmp_path: Path) -> None:
    html = page(report(*range(1, 11), best="peft_5"))
    probe = without_policy(html).replace("</body>", LAYOUT)
    dom, asked = browse(tmp_path, probe, "--dump-dom")
    assert "<title>figures 7; </title>" in dom
    assert Read(dom).rows["peft_10"] == Read(html).rows["peft_10"]
    assert asked == []


@in_browser
def test_the_browser_check_can_fail_and_the_policy_forbids_what_it_finds(tmp_path: Path) -> None:
    url = "https://example.org/x.png"
    loading = page(report(10)).replace("</body>", f'<img src="{url}"></body>')
    assert browse(tmp_path, without_policy(loading), "--dump-dom")[1] == [url]
    assert browse(tmp_path, loading, "--dump-dom")[1] == []


def pixels(png: bytes) -> bytes:
    """The rows of a PNG as stored: each the difference to its neighbours, so 0 where it is flat."""
    data, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += 12 + size
    return zlib.decompress(data)


@in_browser
def test_a_screenshot_is_not_blank(tmp_path: Path) -> None:
    def drawn(html: str) -> float:
        shot = tmp_path / "shot.png"
        browse(tmp_path, html, "--window-size=1000,1200", f"--screenshot={shot}")
        stored = pixels(shot.read_bytes())
        return 1 - stored.count(0) / len(stored)

    assert drawn("<!doctype html><title>blank</title>") < 0.005
    assert drawn(page(report(10))) > 0.02
