"""Can torch compute on this GPU? Asked by ``app.site.device``; prints one JSON object.

A process of its own: the preflight imports no torch, and what fails here may end the process.
Nothing of the site's data comes near it, so a library's own words may be passed on.
"""

import json
import sys
import time
import warnings
from typing import Any

from app.site.device import LOOK_TIMEOUT_S, wait_for


def check(lock: int) -> dict[str, Any]:
    """``error``, or name, bf16, and free and total memory in bytes; ``busy`` if not computed on.

    What is computed here takes memory as well, so it is done in the device's turn.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        import torch

        build = f"torch {torch.__version__}"
        if torch.version.cuda is None:
            return {"error": f"{build} is built for the CPU"}
        if not torch.cuda.is_available():
            why = f": {_line(warned[-1].message)}" if warned else ""
            return {"error": f"{build} finds no GPU{why}"}
    try:
        busy = not wait_for(lock, time.monotonic() + LOOK_TIMEOUT_S)
        free, total = torch.cuda.mem_get_info()
        if not busy and float(torch.ones(2, device="cuda").sum()) != 2:
            return {"error": f"{build} computes 1 + 1 wrong on it"}
        return {
            "name": torch.cuda.get_device_name(),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "free": free,
            "total": total,
            "busy": busy,
        }
    except Exception as err:  # RuntimeError, AcceleratorError and others
        return {"error": f"{build}: {type(err).__name__}: {_line(err)}"}


def _line(said: object) -> str:
    return str(said).split("\n")[0][:200]


if __name__ == "__main__":
    print(json.dumps(check(int(sys.argv[1]))))
