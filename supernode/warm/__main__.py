"""The fork server's process, as ``orders`` starts it: supernode.warm LISTENER IDLE_S PARENT."""

import gc
import importlib
import os
import socket
import sys
from pathlib import Path

from supernode.warm import libraries
from supernode.warm.server import Server, UnsafeError, end_with


def main() -> int:
    listener, idle_s, parent = sys.argv[1:]
    end_with(int(parent))
    libraries.load(os.environ["DEVICE"])
    _end_idle_threads()
    gc.freeze()  # or each child's collections would copy what all of them share
    try:
        order = Server(socket.socket(fileno=int(listener)), float(idle_s)).run()
    except UnsafeError as err:
        print(f"supernode: no warm ClientApps: the fork server cannot fork: {err}", flush=True)
        return 1
    if order is None:
        return 0
    # From here on as Flower's own program, whose folder would be the first in the path.
    sys.argv = ["flwr-clientapp", *order.argv]
    sys.path[0] = str(Path(sys.executable).parent)
    importlib.import_module(libraries.FLOWER).flwr_clientapp()
    return 0


def _end_idle_threads() -> None:
    """Libraries that keep threads end them before a fork (OpenBLAS: until it computes again)."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
