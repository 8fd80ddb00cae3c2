"""What a round costs beside the training: adapters to two sites and back, nothing else.

    python -m tests.benchmarks.round_overhead [--nodes 4,20] [--rounds 3] [--parameters 13631488]

A real SuperLink and real SuperNodes (processes, TLS, keys) with an app whose sites change one
value and send everything back. The same bytes travel as one flat array, as this project sends
them, and as 128 arrays, one for each of an 8B adapter's; then flat ones of the codecs' sizes.
Seconds from sending to the last reply, median over the rounds after the first; ratio last.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.codec import unpacked_bytes
from superlink.connection import write_connection
from superlink.control import Control
from superlink.processes import LocalFederation

PYPROJECT = """
[project]
name = "round-overhead"
version = "1.0.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "benchmark"
fab-include = ["overhead/*.py"]
[tool.flwr.app.components]
serverapp = "overhead.apps:server"
clientapp = "overhead.apps:client"
[tool.flwr.app.config]
arrays = 1
bytes = 4
rounds = 3
out = ""
"""
APPS = """
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

def record(arrays):
    return RecordDict({"a": ArrayRecord({str(n): Array(a) for n, a in enumerate(arrays)})})

@client.train()
def train(message, context):
    arrays = [a.numpy().copy() for a in message.content.array_records["a"].values()]
    for array in arrays:  # or Flower would recognise it and not send it again
        array[:8] ^= np.frombuffer(np.uint64(context.node_id).tobytes(), np.uint8)
    return Message(record(arrays), reply_to=message)

@server.main()
def main(grid, context):
    config, seconds = context.run_config, []
    rng = np.random.default_rng()
    nodes = sorted(grid.get_node_ids())
    for number in range(config["rounds"] + 1):
        size = config["bytes"] // config["arrays"]
        content = record([rng.integers(0, 256, size, np.uint8) for _ in range(config["arrays"])])
        two = [nodes[(2 * number + n) % len(nodes)] for n in range(2)]
        started = time.monotonic()
        messages = [Message(content, dst_node_id=n, message_type="train") for n in two]
        replies = list(grid.send_and_receive(messages, timeout=600))
        assert len(replies) == 2 and not any(r.has_error() for r in replies)
        seconds.append(time.monotonic() - started)
    with open(config["out"], "w") as file:
        json.dump(seconds[1:], file)
"""


@contextmanager
def federation(work: Path, nodes: int) -> Iterator[tuple[Control, Path]]:
    """SuperLink and SuperNodes; their connection, and a folder that is FLWR_HOME for flwr."""
    os.environ["ALLOW_APP_UPDATES"] = "1"  # the sites' own app is not the one that runs here
    with LocalFederation(work, work / "models", work / "results", nodes) as local:
        local.provision()
        control = local.start()
        home = work / "home"
        home.mkdir()
        write_connection(home, control.address, local.public / "ca.crt")
        while list(control.node_status().values()).count("online") < nodes:
            time.sleep(1)
        yield control, home


def rounds_s(control: Control, home: Path, app: Path, arrays: int, size: int, rounds: int) -> float:
    """Median seconds of a round. Raises RuntimeError if the run fails."""
    out = home / "seconds.json"
    config = f"arrays={arrays} bytes={size} rounds={rounds} out={json.dumps(str(out))}"
    run_app(control, home, app, config)
    seconds: list[float] = json.loads(out.read_text())
    return statistics.median(seconds)


def run_app(control: Control, home: Path, app: Path, config: str) -> None:
    """Submit the app with ``flwr run`` and wait for its end. RuntimeError if it fails."""
    flwr = str(Path(sys.executable).with_name("flwr"))
    done = subprocess.run(
        [flwr, "run", str(app), "deployment", "--run-config", config, "--format", "json"],
        env={"PATH": "/usr/bin:/bin", "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    said = json.loads(done.stdout[done.stdout.index("{") :])
    if "run-id" not in said:
        raise RuntimeError(f"flwr run: {said}")
    run_id = int(said["run-id"])
    while not (state := control.run_status(run_id)).status.startswith("finished"):
        time.sleep(1)
    if state.status != "finished:completed":
        raise RuntimeError(f"{state.status}: {state.details}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", default="4,20")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parameters", type=int, default=13_631_488)
    args = parser.parse_args()
    n, ratios = args.parameters, []
    kinds = {"128 arrays, fp32": (128, 4 * n), "flat, fp32": (1, 4 * n)}
    kinds |= {f"flat, {c}": (1, unpacked_bytes(c, n)) for c in ("bf16", "int8", "int4")}
    for nodes in map(int, args.nodes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            app = Path(folder) / "round-overhead"
            (app / "overhead").mkdir(parents=True)
            (app / "pyproject.toml").write_text(PYPROJECT)
            (app / "overhead" / "__init__.py").touch()
            (app / "overhead" / "apps.py").write_text(APPS)
            found = {}
            with federation(Path(folder) / "work", nodes) as (control, home):
                for kind, (arrays, size) in kinds.items():
                    found[kind] = rounds_s(control, home, app, arrays, size, args.rounds)
                    print(
                        f"2 of {nodes} nodes, {kind:<17} {size / 2**20:6.2f} MiB a transfer: "
                        f"{found[kind]:6.1f} s a round",
                        flush=True,
                    )
        share = found["flat, fp32"] / found["128 arrays, fp32"]
        ratios.append(f"ratio, 2 of {nodes} nodes, flat to 128 arrays: {share:.2f}")
    print("\n".join(ratios))


if __name__ == "__main__":
    main()
