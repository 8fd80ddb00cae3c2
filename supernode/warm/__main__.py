"""The fork server's process, as ``orders`` starts it: supernode.warm LISTENER IDLE_S PARENT."""

import gc
import importlib
import os
import socket
import sys
from pathlib import Path

from supernode.node_log import quiet
from supernode.warm import libraries
from supernode.warm.ending import end_at_once, end_with
from supernode.warm.server import Server, UnsafeError, end_idle_threads


def main() -> int:
    listener, idle_s, parent = sys.argv[1:]
    end_with(int(parent))
    quiet()
    libraries.load(os.environ["DEVICE"])
    end_idle_threads()
    gc.freeze()  # or each child's collections would copy what all of them share
    try:
        order = Server(socket.socket(fileno=int(listener)), float(idle_s)).run()
    except UnsafeError as err:
        print(f"supernode: no warm ClientApps: the fork server cannot fork: {err}", flush=True)
        return 1
    if order is None:
        return 0
    sys.argv = order.argv
    sys.path[0] = str(Path(sys.executable).parent)  # as Flower's own programs have it
    try:
        importlib.import_module(libraries.FLOWER).flwr_clientapp()
    except SystemExit as end:
        end_at_once(end.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
