"""What one site answers to the preflight, and whether it can be believed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.server.site_list import CURE, site_name
from app.server.site_rows import PARTS, row_counts
from app.server.untrusted import Reason, UnfitError, count, linear_layers, one_line, table

UNLISTED = f"a node that is not in the operator's list of sites; {CURE}"


@dataclass(frozen=True)
class Answer:
    """What one site says it has; with an ``error`` nothing else."""

    partition_id: int
    error: str = ""
    num_examples: int = 0
    num_holdout: int = 0
    fingerprint: str = ""
    linear_layers: dict[str, list[int]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    turn: str = ""
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    policy: str = ""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Answer":
        """Check a site's answer. Raises: UnfitError, KeyError and others: it is no such answer."""
        partition_id = count(facts["partition-id"], "partition-id")
        if "error" in facts:
            return cls(partition_id, Reason.of(str(facts["error"])) or "an error")
        used = {part: count(facts[name], name) for part, name in PARTS.items()}
        return cls(
            partition_id,
            num_examples=used["train"],
            num_holdout=used["holdout"],
            # Only told, never reckoned with: a site that says nothing of it can take part.
            rows=row_counts(facts["rows"], used) if "rows" in facts else {},
            fingerprint=one_line(str(facts["fingerprint"]), 100),
            linear_layers=linear_layers(facts["linear-layers"]),
            versions=table(facts["versions"], "versions"),
            device=one_line(str(facts["device"]), 100),
            turn=one_line(str(facts["turn"]), 100),
            policy=one_line(str(facts.get("policy", "")), 100),
        )


def believed(facts: Mapping[str, Any], partition_id: int | None) -> Answer | str:
    """The answer of the node that the operator lists as this site, or why it cannot take part."""
    if partition_id is None:
        return UNLISTED
    unreadable = "an answer to the preflight that cannot be read"
    try:
        answer = Answer.of(facts)
    except UnfitError as err:
        return f"{unreadable}: {err}"
    except Exception:  # it may hold anything
        return unreadable
    if answer.partition_id != partition_id:
        return (
            f"it says that it is {site_name(answer.partition_id)}, and its key is that of "
            f"{site_name(partition_id)}; correct PARTITION_ID in its site.env"
        )
    return answer.error or answer
