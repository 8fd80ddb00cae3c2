"""What a site is sent: the adapter, and a job that says what for.

An upload has a name, since only the server knows which of them its adapter is made of, and what a
site adds to its next one follows from that (``app.site.feedback``).
"""

from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict


def upload_name(run_id: str, server_round: int, attempt: int) -> str:
    """Of what each site is asked for in this attempt: "11:2:0". No other order has the same."""
    return f"{run_id}:{server_round}:{attempt}"


def taken_before(chain: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[int, str]:
    """By partition id, the last upload of each site that the rounds of these lines are made of.

    Args:
        chain: run ids, oldest first, and the round after which each was left for the next one. A
            damaged checkpoint may make that an earlier round than the run before had.
        lines: of metrics.jsonl, from round 1 on, one a round.
    """
    runs: list[str] = []  # by round, which one has made it
    for earlier in chain:
        last = earlier["last_round"]
        runs = runs[:last] + [earlier["run_id"]] * (last - len(runs))
    taken: dict[int, str] = {}
    for run_id, line in zip(runs, lines, strict=True):
        name = upload_name(run_id, line["round"], line["attempts"] - 1)
        taken |= dict.fromkeys(line["partitions"], name)
    return taken


def order(
    kind: str, node_id: int, adapter: ArrayRecord, job: dict[str, Any], taken: str | None
) -> Message:
    """What one site is sent.

    Args:
        job: "round", "layout" (its hash) and "upload" (the name of what is asked for).
        taken: the site's last upload that the adapter is made of; None: there is none, and the
            order does not speak of it (Flower takes an empty text for a fault).
    """
    job = job | ({"taken": taken} if taken else {})
    content = RecordDict({"adapter": adapter, "job": ConfigRecord(job)})
    return Message(content, dst_node_id=node_id, message_type=kind)
