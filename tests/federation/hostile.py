"""A compromised hospital: a SuperNode whose ClientApp runs altered code.

Python imports ``sitecustomize`` at its start; that of a hostile site waits for the app's module
that answers messages and changes what an upload or the answer to the preflight holds. All else at
the site is real.
"""

from pathlib import Path

_CODE = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

class Hostile(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "app.client_app":
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            import json
            import numpy as np
            honest = module._to_send
            def hostile(trained, received, layout, config, *rest):
                {change}
            module._to_send = hostile
            decode = module.decode
            def believing(codec, payload, reference):  # its own record refuses nothing
                try:
                    return decode(codec, payload, reference)
                except ValueError:
                    return reference
            module.decode = believing
            record = module.ConfigRecord
            def claimed(facts):
                {claim}
                return record(facts)
            module.ConfigRecord = claimed
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hostile())
"""
_SEND = "return honest({}, received, layout, config, *rest)"
# What an upload becomes.
CHANGES = {
    "nan": "return np.full(trained.size, np.nan, '<f4').tobytes()",
    "huge": _SEND.format("received + np.float32(1e6) * (trained - received)"),
    "other layout": "return b'\\0' * (4 * (trained.size + 64))",
    "too large": "return bytes(6 * 2**20)",
    # Not hostile, but slow: with its work done, until somebody takes the file away.
    "late": "import pathlib, time\n"
    "                here = pathlib.Path(__file__).parent\n"
    "                (here / 'waiting').touch()\n"
    "                while (here / 'slow').exists():\n"
    "                    time.sleep(0.2)\n"
    "                " + _SEND.format("trained"),
}
# Never comes back and heeds no signal, if the file is there when its work is done.
_HANGS = """import pathlib, signal, time
                here = pathlib.Path(__file__).parent
                if (here / 'slow').exists():
                    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                        signal.signal(number, signal.SIG_IGN)
                    (here / 'waiting').touch()
                    while True:
                        {}
                """ + _SEND.format("trained")
CHANGES |= {"hangs asleep": _HANGS.format("time.sleep(9)"), "hangs busy": _HANGS.format("pass")}
# What the facts of a preflight become.
CLAIMS = {
    "another site": "facts['partition-id'] = 3",
    "another site that is there": "facts['partition-id'] = 0",
    "other weights": "facts['fingerprint'] = '\\x1b[2J\\x1b[31mbbbb\\x07' + 'b' * 10**5",
    # More than that does not pass the Fleet door.
    "3 MB of versions": "facts['versions'] = json.dumps({'python': 'x' * 3_000_000})",
}


def hostile(folder: Path, kind: str) -> dict[str, str]:
    """The settings that make a site's SuperNode send that change, or claim that; in ``folder``."""
    change = CHANGES.get(kind, _SEND.format("trained"))
    code = _CODE.replace("{change}", change).replace("{claim}", CLAIMS.get(kind, "pass"))
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}
