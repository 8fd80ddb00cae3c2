"""What a report says, whatever it is drawn on: rows, tests, caveats, and the terminal's table."""

from dataclasses import dataclass
from typing import Any

from app.config import MIB

Report = dict[str, Any]

ALPHA = 0.05
# In percent, as the board had them in 2026 (flower.ai/benchmarks/llm-leaderboard/medical).
_BOARD = "https://flower.ai/benchmarks/llm-leaderboard/medical"
PUBLISHED = [
    {
        "name": "reference (AI4EOSC)", "pubmedqa": 70.80, "medmcqa": 58.04, "medqa": 62.84,
        "careqa": 52.87, "communication_mb": 2080.62,
        "source": "https://github.com/judithspd/ai4os-fedllm-medical",
    },
    {
        "name": "best with this base model (FL-finetune-JB-DC)", "pubmedqa": 70.40,
        "medmcqa": 60.93, "medqa": 65.82, "careqa": 55.36,
        "source": _BOARD,
    },
    {
        "name": "board's first (ZeroOne.AI, another base model)", "pubmedqa": 74.80,
        "medmcqa": 55.39, "medqa": 59.31, "careqa": 64.79, "communication_mb": 2080.93,
        "source": _BOARD,
    },
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row of the main table: percent, by dataset; None where there is no number."""

    name: str
    kind: str  # "published", "base" or "adapter"
    percents: list[float | None]
    average: float | None  # over all datasets of the report or not at all
    mib: float | None  # sent until then
    tests: dict[str, Any]  # dataset -> paired test against base


def table_rows(report: Report) -> list[Row]:
    """The main table; published rows that share no dataset with the report are left out."""
    names, traffic, rows = list(report["datasets"]), traffic_by_round(report["rounds"]), []
    for known in report["published"]:
        percents = [known.get(d) for d in names]
        numbers = [p for p in percents if p is not None]
        if numbers:
            average = sum(numbers) / len(numbers) if len(numbers) == len(names) else None
            sent = known.get("communication_mb")
            rows.append(Row(known["name"], "published", percents, average, sent, {}))
    for s in report["subjects"]:
        tests = s.get("against_base", {})
        percents = [100 * s["scores"][d]["accuracy"] for d in names]
        sent = traffic.get(s["round"])
        rows.append(Row(s["name"], kind_of(s), percents, 100 * s["average"], sent, tests))
    return rows


def traffic_by_round(rounds: list[dict[str, Any]]) -> dict[int, float]:
    """MiB sent up to each round, as the run itself counted; else the sum of what its lines say.

    Ends before the first round that was not counted.
    """
    total, traffic = 0, {}
    for number, line in enumerate(rounds, 1):
        if line["round"] != number or not {"bytes_down", "bytes_up"} <= line.keys():
            break
        total += line["bytes_down"] + line["bytes_up"] + line.get("eval_bytes_down", 0)
        traffic[number] = line.get("mb_sent", total / MIB)
    return traffic


def shown_subjects(report: Report) -> list[dict[str, Any]]:
    """What the page is about, where evaluated: base, and the best adapter, else the last."""
    base = [s for s in report["subjects"] if s["adapter"] is None]
    adapters = [s for s in report["subjects"] if s["adapter"] is not None]
    best = [s for s in adapters if s["name"] == report["best"]]
    return base[:1] + (best or adapters[-1:])


def kind_of(subject: dict[str, Any]) -> str:
    return "base" if subject["adapter"] is None else "adapter"


def decimals(value: float | None, absent: str = "") -> str:
    return absent if value is None else f"{value:.2f}"


def alpha(report: Report) -> float:
    """What a p-value must be below: 5 % over all tests of the report together (Bonferroni)."""
    return ALPHA / max(1, sum(len(s.get("against_base", {})) for s in report["subjects"]))


def correction(report: Report) -> str:
    tests = round(ALPHA / alpha(report))
    return f", 5 % over all {tests} tests together (Bonferroni)" if tests > 1 else ""


def p_text(test: dict[str, float]) -> str:
    return "p < 0.001" if test["p_value"] < 0.001 else f"p = {test['p_value']:.3g}"


def caveat(report: Report) -> str:
    """Why the figures are not comparable with published ones; "" where they are."""
    limit, quantization = report["settings"].get("limit"), report["model"]["quantization"]
    reasons = []
    if limit is not None:
        reasons.append(f"only the first {limit} questions of each dataset were used")
    odd = [
        d for d in report["datasets"].values() if d.get("expected") not in (None, d["questions"])
    ]
    if odd and limit is None:
        numbers = ", ".join(f"{d['title']} {d['questions']} of {d['expected']}" for d in odd)
        reasons.append(f"the number of questions differs ({numbers})")
    if quantization != "4":
        reasons.append(f"the leaderboard asks for 4-bit weights, these are {quantization}")
    if "prompt" in report["settings"]:
        reasons.append("the questions were asked in the base model's chat template")
    text = "; ".join(reasons)
    return f"Not comparable with published figures: {text}." if text else ""


def sentence(report: Report) -> str:
    """The main result in one sentence, as plain text."""
    titles = {d: str(about["title"]) for d, about in report["datasets"].items()}
    count = len(titles)
    over = f"on average over {count} datasets" if count > 1 else "on " + "".join(titles.values())
    *base, last = shown_subjects(report)
    reached = f"reaches {100 * last['average']:.2f} % {over}"
    if last["adapter"] is None:
        return f"The base model {reached}; no adapter was evaluated."
    adapters = sum(s["adapter"] is not None for s in report["subjects"])
    who = f"The best of {adapters} adapters," if report["best"] else "The adapter"
    reached = f"{who} {last['name']}{',' if report['best'] else ''} {reached}"
    if not base:
        return f"{reached}; the base model was not evaluated."
    points = 100 * (last["average"] - base[0]["average"])
    tests = [
        f"{titles[d]} {100 * t['difference']:+.2f} ({p_text(t)}, "
        f"{'more than chance' if t['p_value'] < alpha(report) else 'may be chance'})"
        for d, t in last.get("against_base", {}).items()
    ]
    how = "the exact McNemar test" + correction(report)
    by_test = f": {'; '.join(tests)}, by {how}" if tests else ""
    side = "above" if points >= 0 else "below"
    percent = 100 * base[0]["average"]
    return f"{reached}, {abs(points):.2f} points {side} the base model's {percent:.2f} %{by_test}."


def text_table(report: Report) -> str:
    """The main table in plain ASCII: accuracies in percent, ``-`` where there is none."""
    lines = [["accuracy in %", *(a["title"] for a in report["datasets"].values()), "average"]]
    for row in table_rows(report):
        best = " (best)" if row.kind == "adapter" and row.name == report["best"] else ""
        lines.append([row.name + best, *(decimals(p, "-") for p in (*row.percents, row.average))])
    # Names come from folders: none of their control characters may reach the terminal.
    lines = [["".join(c if " " <= c <= "~" else "?" for c in t) for t in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join([x[0].ljust(widths[0]), *map(str.rjust, x[1:], widths[1:])]) for x in lines]
    return "\n".join(([caveat(report)] if caveat(report) else []) + table)
