"""How large a run's adapter is, by what its ServerApp has written down."""

import json
import os
import stat
from pathlib import Path

_MOST_BYTES = 4 * 2**20  # of a run.json; that of 100 sites has a tenth


def adapter_bytes(results: Path, run_id: int) -> int:
    """Of the adapter in float32, than which no codec has more; 0 if it is not known.

    The ServerApp writes it before it sends the first adapter. It is code that came with a run, so
    its file is neither followed to another nor waited for, and may hold anything.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with os.fdopen(os.open(results / str(run_id) / "run.json", flags), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            facts = json.loads(file.read(_MOST_BYTES)) if regular else {}
        return max(0, 4 * int(facts["adapter_parameters"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0
