"""A compromised hospital: a SuperNode whose ClientApp runs altered code.

Python imports ``sitecustomize`` at its start; that of a hostile site waits for the app's module
that makes an upload and changes what it returns. All else at the site is real.
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
            import numpy as np
            honest = module._to_send
            def hostile(trained, received, layout, config, *rest):
                {change}
            module._to_send = hostile
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hostile())
"""
_SEND = "return honest({}, received, layout, config, *rest)"
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


def hostile(folder: Path, change: str) -> dict[str, str]:
    """The settings that make a site's SuperNode send that change; writes into ``folder``."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_CODE.replace("{change}", CHANGES[change]))
    return {"PYTHONPATH": str(folder)}
