"""The charts of a run: those of the evaluation's report, and two that only a run needs."""

from html import escape

from app.config import MIB
from eval.charts import chart, figure, label, legend, stroke, ticks
from superlink.page.runs import Json, Run, number, numbers, table, whole, wholes

Points = list[tuple[float, float]]
MOST_SITES, MOST_ROUNDS = 60, 60  # that a grid of cells can show
TEXT_UP_TO = 10  # rounds: in narrower cells no number fits


def column(run: Run, *keys: str) -> Points:
    """By round, the first of these figures that a round's line has."""
    found: Points = []
    for line in run.rounds:
        at = whole(line, "round")
        value = next((v for k in keys if (v := number(line, k)) is not None), None)
        if at is not None and value is not None:
            found.append((at, value))
    return found


def held_out(run: Run) -> Points:
    """The sites' median by round; round 0 is the initial adapter."""
    before = column(run, "eval_loss_median_before", "eval_loss_before")
    start = [(0.0, value) for at, value in before[:1] if at == 1]
    return start + column(run, "eval_loss_median", "eval_loss")


def sent(run: Run) -> Points:
    """MiB up to each round, as the run has counted them."""
    return [(0.0, 0.0), *column(run, "mb_sent")] if column(run, "mb_sent") else []


def loss(run: Run) -> str:
    lines = {"training": column(run, "train_loss"), "held out": held_out(run)}
    return chart("Loss", "held out: the median of the sites", lines)


def on_top(run: Run, other: Run) -> str:
    """One chart a figure, with both runs in it."""
    names = (f"run {run.run_id}", f"run {other.run_id}")
    return "".join(
        chart(title, more, dict(zip(names, (of(run), of(other)), strict=True)))
        for title, more, of in (
            ("Held-out loss", "median of the sites", held_out),
            ("Training loss", "", lambda r: column(r, "train_loss")),
            ("MiB sent so far", "both ways", sent),
        )
    )


def traffic(run: Run, total: int) -> str:
    """Adapter bytes of each round, down and up; evaluations count as down."""
    bars = []
    for line in run.rounds:
        of, back = whole(line, "round"), whole(line, "bytes_up")
        out = (whole(line, "bytes_down") or 0) + (whole(line, "eval_bytes_down") or 0)
        if of is not None and back is not None and 0 < of <= max(total, 1):
            bars.append((of, out / MIB, back / MIB))
    if not bars:
        return ""
    ys = ticks(0, max(down + up for _, down, up in bars))
    wide = 284 / max(total, len(bars))

    def height(value: float) -> float:
        return 156 * value / ys[-1]

    svg = label(188, 196, "round", "tick mid")
    for y in ys:
        svg += stroke(46, 168 - height(y), 330, 168 - height(y), "axis")
        svg += label(40, 172 - height(y), f"{y:.6g}", "tick end")
    every = -(-total // 10) or 1
    for at, down, up in bars:
        x = 46 + wide * (at - 1)
        box = f'x="{x + wide * 0.15:.1f}" width="{wide * 0.7:.1f}"'
        tip = f"<title>round {at}: {down:.2f} MiB down, {up:.2f} MiB up</title>"
        low, high = height(down), height(up)
        svg += f'<rect {box} y="{168 - low:.1f}" height="{low:.1f}" class="adapter">{tip}</rect>'
        svg += (
            f'<rect {box} y="{168 - low - high:.1f}" height="{high:.1f}" class="mark">{tip}</rect>'
        )
        if at == 1 or at % every == 0:
            svg += label(x + wide / 2, 182, f"{at}", "tick mid")
    box = '<rect y="1" width="22" height="12" class="{}"/>'
    keys = legend(box.format("adapter"), "to the sites") + legend(box.format("mark"), "from them")
    return figure("MiB by round", "adapters, both ways", 200, svg, "MiB by round", keys)


def parts(run: Run, total: int) -> str:
    """A cell for each site and round: its weight as shade, its alpha as number."""
    cells: dict[str, dict[int, tuple[float, float | None]]] = {}
    first = max(len(run.rounds) - MOST_ROUNDS, 0)
    for line in run.rounds[first:]:
        shares, alphas, at = numbers(line, "shares"), numbers(line, "alphas"), whole(line, "round")
        for place, partition in enumerate(wholes(line, "partitions")):
            if at is not None and first < at <= first + MOST_ROUNDS and place < len(shares):
                alpha = alphas[place] if place < len(alphas) else None
                cells.setdefault(f"site-{partition:02d}", {})[at] = shares[place], alpha
    if not cells:
        return ""
    shown = sorted(cells)[:MOST_SITES]
    rounds = range(first + 1, max(min(total, first + MOST_ROUNDS), *map(max, cells.values())) + 1)
    wide, most = 272 / len(rounds), max(s for row in cells.values() for s, _ in row.values()) or 1
    svg = ""
    for place, name in enumerate(shown):
        y = 18 * place + 4
        svg += label(0, y + 12, name) + stroke(58, y + 16, 330, y + 16, "axis")
        for at, (share, alpha) in cells[name].items():
            x = 58 + wide * (at - rounds[0])
            svg += _cell(x, y, wide, share / most, (name, at, share, alpha), len(rounds))
    bottom = 18 * len(shown) + 4
    every = -(-len(rounds) // 10)
    for at in list(rounds)[::every]:
        svg += label(58 + wide * (at - rounds[0] + 0.5), bottom + 14, f"{at}", "tick mid")
    more = f"shade: weight; number: alpha. {len(shown)} of {len(cells)} sites, by round"
    more = more if len(shown) < len(cells) else "by round; shade: weight, number: alpha"
    return figure("What each site counted for", more, bottom + 20, svg, "weights and alphas")


def _cell(
    x: float, y: float, wide: float, shade: float,
    what: tuple[str, int, float, float | None], rounds: int,
) -> str:  # fmt: skip
    name, at, share, alpha = what
    told = "" if alpha is None else f"{alpha:.2f}"
    tip = f"{name}, round {at}: weight {100 * share:.1f} %" + (f", alpha {told}" if told else "")
    opacity = 0.15 + 0.75 * min(max(shade, 0), 1)
    drawn = (
        f'<rect x="{x + 1:.1f}" y="{y}" width="{max(wide - 2, 1):.1f}" height="15" rx="2" '
        f'class="adapter" fill-opacity="{opacity:.2f}"><title>{escape(tip)}</title></rect>'
    )
    return drawn + (label(x + wide / 2, y + 11.5, told, "cell mid") if rounds <= TEXT_UP_TO else "")


def budget(run: Run) -> tuple[float, float] | None:
    """MiB sent so far and allowed; None where the run has not said both."""
    allowed, counted = (
        number(run.config, "communication.budget-mb"),
        whole(run.facts, "bytes_sent"),
    )
    return None if allowed is None or counted is None else (counted / MIB, allowed)


def meter(share: float) -> str:
    """A bar of which this share, 0 to 1, is done."""
    wide = 200 * min(max(share, 0), 1)
    return (
        '<svg class="meter" viewBox="0 0 200 6" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="200" height="6" rx="3" class="track"/>'
        f'<rect width="{wide:.1f}" height="6" rx="3" class="adapter"/></svg>'
    )


def evaluated(report: Json) -> bool:
    return bool(table(report, "datasets")) and isinstance(report.get("subjects"), list)
