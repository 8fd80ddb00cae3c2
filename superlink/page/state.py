"""Where a run stands: its events, one after the other, and what run.json says of it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from superlink.page.runs import (
    Json,
    Run,
    moment,
    numbers,
    seconds,
    table,
    text,
    texts,
    whole,
    wholes,
)

SILENT_AFTER_S = 900  # beyond the longest time that a run waits for anything
LATE = "no reply within"  # so the ServerApp begins what it says of a site that is late


@dataclass
class Site:
    """One site in this run; ``state`` is one of those that page.css has a colour for."""

    name: str
    state: str = "ready"
    rows: int | None = None
    holdout: int | None = None
    device: str = ""
    rounds: int = 0  # that it took part in
    share: float | None = None  # of the last of them
    alpha: float | None = None
    why: str = ""


@dataclass
class State:
    """``status``: waiting (for sites), running, completed, failed, cut off, or silent.

    Cut off is a run that another one goes on from; silent one that says that it runs, and has said
    nothing else for longer than it waits for anything.
    """

    status: str
    total: int
    done: int
    phase: str = "starting"
    sites: dict[str, Site] = field(default_factory=dict)
    started: datetime | None = None
    ended: datetime | None = None
    heard: datetime | None = None
    ready_in: datetime | None = None  # by the ServerApp's own reckoning

    def site(self, name: str) -> Site:
        return self.sites.setdefault(name, Site(name))

    @property
    def over(self) -> bool:
        return self.status in ("completed", "failed", "cut off")


def state_of(run: Run, now: datetime | None = None, *, taken_over: bool = False) -> State:
    """``now``: for the tests. ``taken_over``: another run goes on from this one."""
    total = whole(run.config, "num-server-rounds") or 0
    done = max((whole(line, "round") or 0 for line in run.rounds), default=0)
    said = text(run.facts, "status")
    over = said in ("completed", "failed")
    state = State(said if over else "cut off" if taken_over else "running", total, done)
    state.started = moment(run.facts, "started")
    _known(state, run.facts)
    for event in run.events:
        take(state, event)
    for line in run.rounds:
        _count(state, line)
    _end(state, run, now or datetime.now(UTC))
    return state


def _known(state: State, facts: Json) -> None:
    """What run.json holds of the sites, once the preflight is over."""
    for name, about in table(facts, "sites").items():
        if isinstance(about, dict):
            _describe(state.site(text({"": name}, "")), about)
    _leave_out(state, table(facts, "left_out"))


def _describe(site: Site, about: Json) -> None:
    site.rows, site.holdout = whole(about, "num_examples"), whole(about, "num_holdout")
    site.device = text(about, "device")


def _leave_out(state: State, left_out: Json) -> None:
    for name in left_out:
        site = state.site(text({"": name}, ""))
        site.state, site.why = "left out", text(left_out, name)


def take(state: State, event: Json) -> None:
    """Fold one event in."""
    kind, number_of = text(event, "event"), whole(event, "round") or 0
    state.heard = moment(event, "time") or state.heard
    if kind in ("waiting", "ready") and not state.over:
        state.status = "waiting" if kind == "waiting" else "running"
    if kind == "start":
        state.total = whole(event, "rounds") or state.total
    elif kind == "waiting":
        online, needed = (whole(event, k) or 0 for k in ("online", "needed"))
        state.phase = f"{online} of {needed} sites are online"
    elif kind == "ready":
        _known(state, event)
        state.phase = "all sites have answered"
    elif kind in ("training", "evaluating"):
        names = texts(event, "sites")
        _ask(state, kind, names)
        where = f"round {number_of} of {state.total}" if number_of else "the start"
        state.phase = f"{where}: {kind} at {len(names)} site{'s' * (len(names) != 1)}"
    elif kind in ("arrived", "left-out"):
        _answer(state.site(text(event, "site")), event)
    elif kind == "round":
        _ask(state, "", [])
        state.done = max(state.done, number_of)
        left_s, told = seconds(event, "left_s"), moment(event, "time")
        if left_s is not None and told:
            state.ready_in = told + timedelta(seconds=left_s)
        state.phase = f"round {number_of} of {state.total} is complete"
    elif kind == "end":
        state.phase, state.ready_in = f"the run has {text(event, 'status')}", None


def _ask(state: State, work: str, names: list[str]) -> None:
    """All others are ready again, but those that the run goes on without."""
    for site in state.sites.values():
        if site.state != "left out":
            site.state, site.why = "ready", ""
    for name in names:
        state.site(name).state = work


def _answer(site: Site, event: Json) -> None:
    if text(event, "event") == "arrived":
        site.state = "answered"
    else:
        site.why = text(event, "why")
        site.state = "late" if site.why.startswith(LATE) else "refused"


def _count(state: State, line: Json) -> None:
    names = [f"site-{p:02d}" for p in wholes(line, "partitions")]
    shares, alphas = numbers(line, "shares"), numbers(line, "alphas")
    for at, name in enumerate(names):
        site = state.site(name)
        site.rounds += 1
        site.share = shares[at] if at < len(shares) else None
        site.alpha = alphas[at] if at < len(alphas) else None


def _end(state: State, run: Run, now: datetime) -> None:
    if state.over:
        state.ended, state.ready_in = moment(run.facts, "finished") or state.heard, None
        state.phase = f"ended after round {state.done}"
        if state.status == "completed":
            state.phase = "all rounds are complete"
        elif state.status == "cut off":
            state.phase += "; another run goes on from there"
        _ask(state, "", [])
        for site in state.sites.values():
            if site.state == "ready":
                site.state = "took part" if site.rounds else "not asked"
        return
    keys = ("strategy.node-timeout-s", "strategy.round-timeout-s")
    patience_s = max(seconds(run.config, key) or 0 for key in keys) + SILENT_AFTER_S
    heard = state.heard or state.started
    if heard and (now - heard).total_seconds() > patience_s:
        state.status, state.phase = "silent", f"{state.phase}, and nothing since"
