"""A run in sections of HTML. Whatever comes from a file is escaped: it is text, and no more."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from html import escape

from app.config import MIB
from eval.summary import caveat, decimals, sentence, table_rows
from superlink.page import drawings
from superlink.page.runs import Run, moment, number, table, tables, text, whole
from superlink.page.state import Site, State

MOST_EVENTS = 200
OF_A_SITE = ("site", "now", "rows", "held out", "device", "rounds", "weight", "alpha")
OF_A_RUN = (
    "run", "now", "began", "base model", "strategy", "rounds", "held-out loss", "MiB sent",
)  # fmt: skip
BESIDE = ("model.name", "strategy.name", "num-server-rounds", "train.learning-rate-max",
          "communication.codec", "seed")  # fmt: skip


def section(name: str, title: str, body: str) -> str:
    """Named, so that what has changed can be put in its place; nothing without a body."""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f'<section id="{name}">{head if body else ""}{body}</section>\n'


def chip(state: str) -> str:
    return f'<span class="chip {escape(state.replace(" ", "-"))}">{escape(state)}</span>'


def clock(since: datetime | None, until: datetime | None) -> str:
    """Hours, minutes and seconds; without an end the page goes on counting."""
    if since is None:
        return "—"
    seconds = max(((until or datetime.now(UTC)) - since).total_seconds(), 0)
    shown = str(timedelta(seconds=int(seconds)))
    return shown if until else f'<time data-since="{since.timestamp():.0f}">{shown}</time>'


def _left(state: State) -> str:
    if state.over or state.status == "silent":
        return ""
    if state.ready_in is None:
        return "—"  # the first round is the measure
    seconds = max((state.ready_in - datetime.now(UTC)).total_seconds(), 0)
    shown = timedelta(seconds=int(seconds))
    return f'<time data-until="{state.ready_in.timestamp():.0f}">{shown}</time>'


def _tile(name: str, value: str, more: str = "") -> str:
    return (
        f'<div class="tile"><span class="soft">{name}</span><b>{value}</b>'
        f'<span class="soft small">{more}</span></div>'
    )


def head(run: Run, state: State) -> str:
    """What a person sees first: which run, how it goes, how far it is."""
    share = state.done / state.total if state.total else 0
    model = text(run.config, "model.name").rsplit("/", 1)[-1] or "a model"
    here = [s for s in state.sites.values() if s.state != "left out"]
    tiles = _tile("rounds", f"{state.done} of {state.total or '?'}", drawings.meter(share))
    tiles += _tile("running for" if not state.over else "took", clock(state.started, state.ended))
    tiles += _tile("time left, about", left) if (left := _left(state)) else ""
    out = len(state.sites) - len(here)
    tiles += _tile("sites", str(len(here)) if here else "—", f"{out} left out" if out else "")
    if losses := drawings.held_out(run) or drawings.column(run, "train_loss"):
        kind = "held-out loss" if drawings.held_out(run) else "training loss"
        change = losses[-1][1] - losses[0][1]
        more = f"{change:+.3f} since round {losses[0][0]:.0f}" if len(losses) > 1 else ""
        tiles += _tile(kind, f"{losses[-1][1]:.3f}", more)
    best = table(run.facts, "best")
    if (at := whole(best, "round")) and (least := number(best, "held_out_loss")) is not None:
        tiles += _tile("best round", str(at), f"held-out loss {least:.3f}")
    if (sent := drawings.budget(run)) and sent[1] > 0:
        of = f"MiB, {100 * sent[0] / sent[1]:.2f} % of {sent[1]:,.0f}"
        tiles += _tile("sent", f"{sent[0]:,.1f}", of + drawings.meter(sent[0] / sent[1]))
    error = text(run.facts, "error")
    failed = f'<p class="warn pre">{escape(error)}</p>' if error else ""
    unread = "".join(f'<p class="warn">Not readable: {escape(u)}</p>' for u in run.unread)
    after = ""
    for link in tables(run.facts, "resumed_from")[-1:]:
        where = f"round {_shown(link.get('last_round'))} of run {text(link, 'run_id')}"
        after = f" · goes on after {escape(where)}"
    heard = f" · last heard of {_when(state.heard)}" if state.heard and not state.over else ""
    body = (
        f"<h1>{escape(model)}, fine-tuned by {len(here) or 'its'} sites together</h1>"
        f'<p class="now">{chip(state.status)} <b>{escape(state.phase)}</b></p>'
        f'<p class="soft">run {run.run_id}{after}{heard}</p>{failed}{unread}'
        f'<div class="tiles">{tiles}</div>'
    )
    return section("head", "", body)


def _when(point: datetime | None, form: str = "at") -> str:
    """The moment in words, ``clock``: without its day; the page has it in the reader's own time."""
    if point is None:
        return "—"
    said = f"{point.astimezone(UTC):{'%H:%M:%S' if form == 'clock' else '%Y-%m-%d %H:%M:%S UTC'}}"
    return f'<time data-{form}="{point.timestamp():.0f}">{said}</time>'


def curves(run: Run, state: State) -> str:
    drawn = drawings.loss(run) + drawings.traffic(run, state.total)
    drawn += drawings.parts(run, state.total)
    return section("curves", "Over the rounds", drawn and f'<div class="grid">{drawn}</div>')


def sites(state: State) -> str:
    if not state.sites:
        return section("sites", "", "")
    head_row = "".join(f"<th>{n}</th>" for n in OF_A_SITE)
    rows = "".join(map(_site, sorted(state.sites.values(), key=lambda s: s.name)))
    note = "Weight and alpha: of the site's last round. What a site says of itself is not checked."
    return section(
        "sites",
        "Sites",
        f'<div class="scroll"><table class="wide stack"><thead><tr>{head_row}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="soft small">{note}</p>',
    )


def named(columns: Sequence[str], cells: Sequence[str]) -> str:
    """Cells of HTML that carry the name of their column, which a narrow screen has no room for."""
    none = ' class="none"'
    return "".join(
        f'<td{none if cell == "—" else ""} data-name="{name}">{cell}</td>'
        for name, cell in zip(columns, cells, strict=True)
    )


def _site(site: Site) -> str:
    def count(value: int | None) -> str:
        return "—" if value is None else f"{value:,}"

    cells = (
        chip(site.state),
        count(site.rows),
        count(site.holdout),
        escape(site.device) or "—",
        str(site.rounds),
        "—" if site.share is None else f"{100 * site.share:.1f} %",
        "—" if site.alpha is None else f"{site.alpha:.3f}",
    )
    row = f"<th>{escape(site.name)}</th>" + named(OF_A_SITE[1:], cells)
    why = f'<tr class="why"><td colspan="8">{escape(site.why)}</td></tr>' if site.why else ""
    return f"<tr>{row}</tr>{why}"


def evaluation(run: Run, link: str) -> str:
    """The main table of the evaluation's report, once it is there, beside the published rows."""
    report = run.evaluation
    if not drawings.evaluated(report):
        return section("evaluation", "", "")
    try:
        titles = [a["title"] for a in report["datasets"].values()]
        said, note, rows = sentence(report), caveat(report), ""
        for row in table_rows(report):
            cells = [row.name, *map(decimals, row.percents), decimals(row.average)]
            rows += f'<tr class="{escape(row.kind)}"><th>{escape(str(cells[0]))}</th>'
            rows += "".join(f"<td>{escape(c)}</td>" for c in cells[1:]) + "</tr>"
        head_row = "".join(f"<th>{escape(str(t))}</th>" for t in ("", *titles, "Average"))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        broken = "eval/report.json is not what the evaluation writes; run it again."
        return section("evaluation", "Evaluation", f'<p class="warn">{broken}</p>')
    warn = f'<p class="warn">{escape(note)}</p>' if note else ""
    body = (
        f'<p class="main">{escape(said)}</p>{warn}<div class="scroll"><table class="wide"><thead>'
        f"<tr>{head_row}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="soft small">Accuracy in percent. '
        f'<a href="{escape(link)}">The whole report</a></p>'
    )
    return section("evaluation", "Evaluation", body)


def events(run: Run) -> str:
    """What has happened, the newest first."""
    rows = ""
    for event in reversed(run.events[-MOST_EVENTS:]):
        point = moment(event, "time")
        level = text(event, "level")
        css = f' class="{level}"' if level in ("warning", "error") else ""
        rows += f"<li{css}><span class='soft'>{_when(point, 'clock')}</span> "
        rows += f"<span class='pre'>{escape(text(event, 'text'))}</span></li>\n"
    more = len(run.events) - MOST_EVENTS
    note = f'<p class="soft small">{more} older ones are in events.jsonl.</p>' if more > 0 else ""
    return section("events", "Events", rows and f'<ol class="events">{rows}</ol>{note}')


def settings(run: Run) -> str:
    """What the run was started with."""
    rows = "".join(
        f"<tr><td>{escape(text({'': key}, ''))}</td><td>{escape(_shown(value))}</td></tr>"
        for key, value in sorted(run.config.items())
    )
    facts = {
        "base model, fingerprint": text(run.facts, "base_model_fingerprint"),
        "adapter, parameters": _shown(whole(run.facts, "adapter_parameters")),
        **{f"version of {k}": _shown(v) for k, v in table(run.facts, "versions").items()},
    }
    rows = "".join(
        f"<tr><td>{escape(text({'': k}, ''))}</td><td>{escape(v)}</td></tr>"
        for k, v in facts.items() if v
    ) + rows  # fmt: skip
    body = f'<div class="scroll"><table class="facts">{rows}</table></div>'
    folded = f'<details id="all-settings"><summary>All settings</summary>{body}</details>'
    return section("settings", "", folded if run.config else "")


def _shown(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return text({"": value if isinstance(value, str) else str(value)[:200]}, "")


def beside(run: Run, state: State, other: Run, state_of_other: State) -> str:
    """Two runs: what differs in their settings, what came out, and their curves on top."""
    keys = dict.fromkeys([*BESIDE, *run.config, *other.config])
    unlike = [
        (key, _shown(run.config.get(key, "—")), _shown(other.config.get(key, "—")))
        for key in keys
        if run.config.get(key) != other.config.get(key)
    ]
    rows = [("status", state.status, state_of_other.status)]
    rows += [("rounds", f"{state.done} of {state.total}",
              f"{state_of_other.done} of {state_of_other.total}")]  # fmt: skip
    for name, of in (("held-out loss", drawings.held_out), ("MiB sent", drawings.sent)):
        mine, its = (f"{points[-1][1]:.4g}" if (points := of(r)) else "—" for r in (run, other))
        rows.append((name, mine, its))
    body = "".join(
        f"<tr><th>{escape(text({'': k}, ''))}</th><td>{escape(a)}</td><td>{escape(b)}</td></tr>"
        for k, a, b in [*rows, *unlike]
    )
    head_row = f"<tr><th></th><th>run {run.run_id}</th><th>run {other.run_id}</th></tr>"
    return section(
        "beside",
        "Two runs",
        f'<div class="grid">{drawings.on_top(run, other)}</div><div class="scroll">'
        f'<table class="wide facts"><thead>{head_row}</thead><tbody>{body}</tbody></table></div>'
        '<p class="soft small">Settings: those that differ.</p>',
    )


def row_of(run: Run, state: State) -> str:
    """A run's line in the list of all."""
    losses, sent = drawings.held_out(run), whole(run.facts, "bytes_sent")
    cells = (
        f'<a href="/runs/{run.run_id}">{run.run_id}</a>',
        chip(state.status),
        _when(state.started),
        escape(text(run.config, "model.name").rsplit("/", 1)[-1]) or "—",
        escape(text(run.config, "strategy.name")) or "—",
        f"{state.done} of {state.total or '?'}",
        f"{losses[-1][1]:.3f}" if losses else "—",
        "—" if sent is None else f"{sent / MIB:,.1f}",
    )
    return f"<tr>{named(OF_A_RUN, cells)}</tr>"


def row_of_none(run_id: str, why: str) -> str:
    """The line of a run that has no other."""
    link = f'<a href="/runs/{run_id}">{run_id}</a>'
    cells = (link, f"cannot be shown ({escape(why)})", *["—"] * (len(OF_A_RUN) - 2))
    return f"<tr>{named(OF_A_RUN, cells)}</tr>"
