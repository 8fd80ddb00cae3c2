"""The newest run for Prometheus, in its text format 0.0.4; it needs no library."""

from pathlib import Path

from app.config import MIB
from superlink.page import drawings
from superlink.page.runs import number, read_run, run_ids, whole
from superlink.page.state import state_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics(results: Path) -> str:
    """Every figure has one label, the run's id; without a run there are no figures."""
    ids = run_ids(results)
    if not ids:
        return ""
    run = read_run(results, ids[0])
    state = state_of(run)
    here = sum(site.state != "left out" for site in state.sites.values())
    last = {
        "train_loss": drawings.column(run, "train_loss"),
        "held_out_loss": drawings.held_out(run),
    }
    allowed = number(run.config, "communication.budget-mb")
    figures: dict[str, tuple[str, float | None]] = {
        "run_running": ("1 while the run goes on, 0 afterwards", float(not state.over)),
        "run_failed": ("1 if the run has failed", float(state.status == "failed")),
        "rounds": ("rounds of the run", float(state.total)),
        "rounds_done": ("rounds that are complete", float(state.done)),
        "sites": ("sites that take part", float(here)),
        "sites_left_out": ("sites that do not", float(len(state.sites) - here)),
        "sent_bytes": ("adapter bytes so far, both ways", whole(run.facts, "bytes_sent")),
        "budget_bytes": ("that may be sent", allowed and allowed * MIB),
        "last_event_time_seconds": ("Unix time", state.heard.timestamp() if state.heard else None),
    }
    for name, points in last.items():
        figures[name] = ("of the last round", points[-1][1] if points else None)
    lines = []
    for name, (said, value) in figures.items():
        if value is not None:
            lines.append(f"# HELP fedllm_{name} {said}\n# TYPE fedllm_{name} gauge")
            lines.append(f'fedllm_{name}{{run="{run.run_id}"}} {value:.10g}')
    return "\n".join(lines) + "\n"
