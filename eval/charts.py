"""Small inline SVG charts: no script, no file, colours by the page's style sheet."""

import math
from html import escape

Point = tuple[float, float]


def label(x: float, y: float, content: str, css: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(content)}</text>'


def stroke(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def dot(x: float, y: float, css: str, radius: float = 2.6) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{css}"/>'


def diamond(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5-5z" class="mark"/>'


def whisker(low: float, high: float, y: float) -> str:
    ends = "".join(stroke(x, y - 5, x, y + 5, "whisker") for x in (low, high))
    return stroke(low, y, high, y, "whisker") + ends


def figure(title: str, more: str, height: int, drawn: str, spoken: str, keys: str = "") -> str:
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="soft">{escape(more)}</span>'
        f'</figcaption><svg viewBox="0 0 340 {height}" role="img" aria-label="{escape(spoken)}">'
        f"{drawn}</svg>{keys}</figure>"
    )


def legend(drawn: str, meaning: str) -> str:
    return f'<span class="key"><svg viewBox="0 0 22 14">{drawn}</svg>{escape(meaning)}</span>'


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers that enclose ``low`` and ``high``."""
    span = high - low
    if span < max(1e-6 * abs(high), 1e-12):  # the same but for rounding
        span = abs(high) if abs(high) > 1e-12 else 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = power * next(m for m in (1, 2, 5, 10) if span <= power * m * 5.000001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(first, max(last, first + 1) + 1)]


def chart(title: str, more: str, lines: dict[str, list[Point]], best: Point | None = None) -> str:
    """One or two lines over rounds, ``best`` ringed; "" where there is nothing to draw."""
    lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
    points = [p for line in lines.values() for p in line]
    if not points:
        return ""
    ys = ticks(min(y for _, y in points), max(y for _, y in points))
    first, last = int(min(points)[0]), int(max(points)[0])
    last = max(last, first + 1)  # one round is an axis too

    def place(x: float, y: float) -> Point:
        return 46 + 284 * (x - first) / (last - first), 168 - 156 * (y - ys[0]) / (ys[-1] - ys[0])

    svg, keys = label(188, 196, "round", "tick mid"), ""
    for y in ys:
        height = place(first, y)[1]
        svg += stroke(46, height, 330, height, "axis")
        svg += label(40, height + 4, f"{y:.6g}", "tick end")
    for x in range(first, last + 1, math.ceil((last - first) / 10)):
        svg += label(place(x, 0)[0], 182, f"{x}", "tick mid")
    for number, (name, line) in enumerate(lines.items()):
        css, placed = ("adapter", "mark")[number], [place(*p) for p in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        if placed:
            svg += f'<path d="M{path}" class="line{number}"/>'
            svg += "".join(dot(x, y, css) for x, y in placed)
            keys += legend(stroke(0, 7, 22, 7, f"line{number}") + dot(11, 7, css), name)
    svg += dot(*place(*best), "ring", 6.5) if best else ""
    return figure(title, more, 200, svg, title, keys if len(lines) > 1 else "")
