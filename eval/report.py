"""The report of an evaluation: report.json and report.html.

The page is one file that loads nothing, so it can be mailed, archived and opened in a hospital's
network. Accuracies are fractions in the report, percent on the page and in the table.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from eval.answers import replace_file
from eval.charts import chart, diamond, figure, label, legend, stroke, whisker
from eval.summary import (
    Report,
    alpha,
    caveat,
    correction,
    decimals,
    kind_of,
    p_text,
    sentence,
    shown_subjects,
    table_rows,
    traffic_by_round,
)

LEFT, RIGHT = 122, 290  # where 0 % and 100 % are in the bar charts; every chart is 340 wide
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b2430;--soft:#586473;--line:#d3d9e0;
--panel:#f5f7f9;--base:#98a2ae;--adapter:#3b8fc4;--mark:#b8480a;--warn:#fff1cc;--link:#0a5c94}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181d;--ink:#e6eaef;--soft:#a5b0bd;
--line:#39424d;--panel:#1c2229;--base:#6c7784;--adapter:#2f7fb5;--mark:#f0a63a;--warn:#4a3a08;
--link:#7cc0f0}}
*{box-sizing:border-box}a{color:var(--link)}
body{margin:0 auto;padding:24px 16px;max-width:1000px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:24px;line-height:1.25;margin:0 0 4px}h2{font-size:19px;margin:36px 0 8px}
h3{font-size:16px;margin:24px 0 8px}h4{font-size:15px;margin:0 0 6px}
h1,h3,h4,li,p,figcaption,.key,.facts td{overflow-wrap:anywhere}.soft{color:var(--soft)}
.main{font-size:1.13em}.warn{background:var(--warn);padding:10px 14px;border-radius:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.small{font-size:13px;margin:10px 0 2px}sup{position:absolute}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:4px}.card th,.card td{padding:5px 7px}
.wide{width:100%}.wide td+td{white-space:nowrap}.wide td:first-child{min-width:110px}
tr.published td{color:var(--soft)}tr.chosen td{font-weight:600;background:var(--panel)}
.facts td{vertical-align:top}.facts td+td{text-align:left}.facts td:first-child{color:var(--soft)}
.best{background:#2874a6;color:#fff;border-radius:9px;padding:1px 8px;font-size:12px}
.grid{display:grid;gap:20px;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
figure,.card{margin:0;padding:12px;border:1px solid var(--line);border-radius:8px;min-width:0}
figcaption{font-size:14px;margin-bottom:4px}svg{display:block;width:100%;height:auto}
text{font-size:11px;fill:var(--ink)}.tick{fill:var(--soft);font-size:10px}
.mid{text-anchor:middle}.end{text-anchor:end}.axis{stroke:var(--line)}
.whisker{stroke:var(--ink);stroke-width:1.4}.majority{stroke:var(--ink);stroke-dasharray:4 3}
.base{fill:var(--base)}.adapter{fill:var(--adapter)}.mark{fill:var(--mark)}
.line0,.line1,.ring{fill:none;stroke:var(--adapter);stroke-width:2}
.line1,.ring{stroke:var(--mark)}.line1{stroke-dasharray:6 3}
.key{display:inline-flex;align-items:center;gap:6px;margin-right:16px;font-size:13px}
.key svg{width:22px;height:14px;flex:none}ul{margin:8px 0 0;padding-left:20px}
@page{size:A4;margin:14mm}@media print{.scroll{overflow:visible}h2,h3{break-after:avoid}
figure,.card,tr,.main{break-inside:avoid}th,td,.card th,.card td{padding:2px 6px}
body{padding:0;max-width:none;font-size:9pt;
print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def _main_table(report: Report) -> str:
    rows, chosen = table_rows(report), shown_subjects(report)[-1]["name"]
    sent = any(row.mib is not None for row in rows)
    head = ["Model", *(a["title"] for a in report["datasets"].values()), "Average"]
    head += ["MiB sent"] * sent
    body, starred = "", False
    for row in rows:
        cells, css = [escape(row.name)], row.kind
        if row.kind == "adapter" and row.name == chosen:
            css += " chosen"
            cells[0] += ' <span class="best">best</span>' if report["best"] else ""
        for dataset, percent in zip(report["datasets"], row.percents, strict=True):
            star = row.tests.get(dataset, {"p_value": 1})["p_value"] < alpha(report)
            starred |= star
            cells.append(decimals(percent) + "<sup>*</sup>" * star)
        cells += [decimals(row.average)] + [decimals(row.mib)] * sent
        body += f'<tr class="{css}">{"".join(f"<td>{c}</td>" for c in cells)}</tr>\n'
    notes = "".join(f"{escape(s['note'])} " for s in report["subjects"] if s.get("note"))
    notes += "Accuracy in percent. "
    if starred:
        notes += f"* differs from base by more than chance{correction(report)}. "
    if report["best"]:
        notes += "The best adapter was picked by these same questions, which flatters it. "
    if sent:
        notes += "MiB sent: adapters down and up until that round, also for held-out evaluation "
        notes += "and in rounds that were cut off; 1 MiB is 2^20 bytes. "
        if any(row.mib for row in rows if row.kind == "published"):
            notes += "What is published as MB can only be MiB. "
    head_html = "".join(f"<th>{escape(t)}</th>" for t in head)
    return (
        f'<div class="scroll"><table class="wide"><thead><tr>{head_html}</tr></thead>\n<tbody>'
        f'{body}</tbody></table></div><p class="soft">{notes}</p>'
    )


def _bars(report: Report, column: int, dataset: str) -> str:
    """Accuracy on one dataset: a lane for base and adapter each, then the published ones."""

    def at(fraction: float) -> float:
        return LEFT + (RIGHT - LEFT) * fraction

    lanes: list[tuple[str, float, str]] = []
    for subject in shown_subjects(report):
        score, y = subject["scores"][dataset], 28 * len(lanes) + 16
        box = f'x="{LEFT}" y="{y - 9}" width="{at(score["accuracy"]) - LEFT:.1f}" height="18"'
        low, high = map(at, score["ci95"])
        drawn = f'<rect {box} class="{kind_of(subject)}"/>{whisker(low, high, y)}'
        lanes.append((subject["name"], 100 * score["accuracy"], drawn))
    for row in table_rows(report):
        percent = row.percents[column]
        if row.kind == "published" and percent is not None:
            lanes.append((row.name, percent, diamond(at(percent / 100), 28 * len(lanes) + 16)))
    bottom, majority = 28 * len(lanes) + 4, score["majority"]
    svg = "".join(stroke(at(t / 4), 2, at(t / 4), bottom, "axis") for t in range(5))
    svg += "".join(label(at(t / 100), bottom + 12, f"{t}", "tick mid") for t in (0, 50, 100))
    for number, (name, percent, drawn) in enumerate(lanes):
        short = name if len(name) < 20 else name[:18] + "…"
        svg += drawn + label(0, 28 * number + 20, short)
        svg += label(340, 28 * number + 20, f"{percent:.2f}", "end")
    svg += stroke(at(majority["accuracy"]), 2, at(majority["accuracy"]), bottom, "majority")
    always = f"always “{majority['label']}”: {100 * majority['accuracy']:.2f} %"
    spoken = ", ".join(f"{name} {percent:.2f} %" for name, percent, _ in lanes)
    title = report["datasets"][dataset]["title"]
    return figure(title, f"{score['n']} questions; {always}", bottom + 16, svg, spoken)


def _charts(report: Report) -> str:
    """Loss, traffic and, where several adapters were evaluated, accuracy over the rounds."""
    rounds = report["rounds"]

    def column(*keys: str) -> list[tuple[float, float]]:
        """By round, the first of these figures that a round has."""
        found = ((r["round"], next((r[k] for k in keys if k in r), None)) for r in rounds)
        return [(number, value) for number, value in found if value is not None]

    # The median of the sites, which no single one decides; older runs have the mean alone.
    before = column("eval_loss_median_before", "eval_loss_before")
    held_out = [(0, y) for x, y in before if x == 1] + column("eval_loss_median", "eval_loss")
    html = chart("Loss", "", {"training": column("train_loss"), "held out": held_out})
    if traffic := traffic_by_round(rounds):
        html += chart("MiB sent so far", "", {"": [(0, 0), *traffic.items()]})
    scores = {  # base is what training starts from: round 0
        s["round"] or 0: 100 * s["average"]
        for s in report["subjects"]
        if s["adapter"] is None or s["round"]
    }
    if sum(s["adapter"] is not None for s in report["subjects"]) > 1 and len(scores) > 1:
        number, more = shown_subjects(report)[-1]["round"], f"best: {report['best']}"
        best = (number, scores[number]) if report["best"] and number else None
        points = sorted(scores.items())
        html += chart("Average accuracy in percent", more if best else "", {"": points}, best)
    return f'<h2>Over the rounds</h2><div class="grid">{html}</div>' if html else ""


def _facts(facts: dict[str, Any]) -> str:
    rows = ""
    for key, value in facts.items():
        text = "—" if value is None else escape(str(value))
        if text.startswith(("https://", "http://")):  # never javascript:
            text = f'<a href="{text}" rel="noreferrer">{text}</a>'
        rows += f"<tr><td>{escape(key)}</td><td>{text}</td></tr>"
    return f'<div class="scroll"><table class="facts">{rows}</table></div>'


def _card(subject: dict[str, Any], dataset: str) -> str:
    """Everything about one subject on one dataset."""
    score, labels = subject["scores"][dataset], subject["scores"][dataset]["label_accuracy"]
    percent, low, high = (100 * v for v in (score["accuracy"], *score["ci95"]))
    facts = {
        "Questions": score["n"],
        "Accuracy": f"{percent:.2f} % (95 %: {low:.2f} to {high:.2f})",
        "Unparsed answers": score["unparsed"],
        "Among the labels only": None if labels is None else f"{100 * labels:.2f} %",
        f"Always “{score['majority']['label']}”": f"{100 * score['majority']['accuracy']:.2f} %",
    }
    if test := subject.get("against_base", {}).get(dataset):
        facts["Against base"] = f"{100 * test['difference']:+.2f} points, {p_text(test)}"
        facts["Right only here"] = test["only_adapter"]
        facts["Right only in base"] = test["only_base"]
    confusion: dict[str, dict[str, int]] = score["confusion"]
    answers = dict.fromkeys([*confusion, *(a for row in confusion.values() for a in row)])
    columns = sorted(answers, key=lambda a: a == "unparsed")  # stable: the others keep their order
    matrix = "<tr><th></th>" + "".join(f"<th>{escape(a)}</th>" for a in columns) + "</tr>"
    for gold, row in confusion.items():
        counts = [row.get(a, 0) for a in columns]
        shades = [f"{0.55 * count / max(sum(counts), 1):.2f}" for count in counts]
        matrix += f"<tr><th>{escape(gold)}</th>"
        for shade, count in zip(shades, counts, strict=True):
            matrix += f'<td style="background:rgb(59 143 196/{shade})">{count}</td>'
        matrix += "</tr>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in score["notes"])
    return (
        f'<div class="card"><h4>{escape(subject["name"])}</h4>{_facts(facts)}<p class="soft small">'
        "Rows: the right answer; columns: the model’s; shaded by share of the row</p>"
        f'<div class="scroll"><table>{matrix}</table></div><ul class="soft">{notes}</ul></div>'
    )


def page(report: Report) -> str:
    """The self-contained HTML page of a report with at least one subject."""
    model, rows, shown = report["model"], table_rows(report), shown_subjects(report)
    title, note = escape(f"Evaluation of {model['name']}"), escape(caveat(report))
    run = f"Run {report['run']}, {report['status']} · " if report["run"] else ""
    facts = f"{run}base model in {model['kind']} on {model['device']} · {report['created']}"
    bars = details = keys = ""
    for subject in shown:
        box = f'<rect y="1" width="22" height="12" class="{kind_of(subject)}"/>'
        keys += legend(box, subject["name"])
    keys += legend(whisker(2, 20, 7), "95 % interval")
    keys += legend(stroke(11, 0, 11, 14, "majority"), "always the most frequent answer")
    published = {r.name for r in rows if r.kind == "published"}
    keys += legend(diamond(11, 7), "published") if published else ""
    for column, (dataset, about) in enumerate(report["datasets"].items()):
        bars += _bars(report, column, dataset)
        cards = "".join(_card(s, dataset) for s in shown)
        details += f'<h3>{escape(about["title"])}</h3><div class="grid">{cards}</div>'
    groups = {
        "Base model": model,
        "Settings": report["settings"],
        "Data": {a["title"]: a["source"] for a in report["datasets"].values()},
        "Adapters, SHA-256": {s["name"]: s["sha256"] for s in report["subjects"] if s["adapter"]},
        "Published figures": {
            p["name"]: p.get("source") for p in report["published"] if p["name"] in published
        },
        "Versions": report["versions"],
    }
    how = "".join(f"<h3>{name}</h3>{_facts(group)}" for name, group in groups.items() if group)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1><p class="soft">{escape(facts)}</p>
<p class="main">{escape(sentence(report))}</p>
{f'<p class="warn">{note}</p>' if note else ""}
{_main_table(report)}
<h2>Accuracy in percent</h2><p>{keys}</p><div class="grid">{bars}</div>
{_charts(report)}
<h2>Each dataset</h2>{details}
<h2>How this was computed</h2>{how}
</body></html>
"""


def write_report(folder: Path, report: Report) -> Path:
    """Write report.json and report.html into ``folder``; returns the path of the page.

    Each gets its name only when it is complete: a full disk leaves the one before it intact.

    Raises:
        OSError: the folder cannot be written.
    """
    texts = {"report.json": json.dumps(report, indent=2) + "\n", "report.html": page(report)}
    for name, text in texts.items():
        replace_file(folder / name, text)
    return folder / "report.html"
