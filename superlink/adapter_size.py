"""How large a run's adapter is, by what its ServerApp has written down."""

from pathlib import Path

from superlink import run_files


def adapter_bytes(results: Path, run_id: int) -> int:
    """Of the adapter in float32, than which no codec has more; 0 if it is not known.

    The ServerApp writes it before it sends the first adapter.
    """
    try:
        return max(0, 4 * int(run_files.facts(results, str(run_id))["adapter_parameters"]))
    except (ValueError, TypeError, KeyError, OverflowError):
        return 0
