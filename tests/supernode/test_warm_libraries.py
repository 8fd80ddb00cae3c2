"""What the fork server has imported when it forks, in a process of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

import app.site.libraries
from supernode.warm import libraries
from tests.samples import REPOSITORY


@pytest.fixture(scope="module")
def imported() -> dict[str, dict[str, Any]]:
    """What a fork server's process is after it has imported everything, for cuda and for cpu."""
    code = (
        "import json, os, sys; from supernode.warm import libraries, server\n"
        "for device in ('cuda', 'cpu'):\n"
        "    libraries.load(device); server.end_idle_threads(); server.check_safe()\n"
        "    threads = len(os.listdir('/proc/self/task'))\n"
        "    cuda = sys.modules['torch'].cuda.is_initialized()\n"
        "    print(json.dumps([device, threads, cuda, sorted(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    lines = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("[")]
    return {d: {"threads": n, "cuda": c, "modules": set(m)} for d, n, c, m in lines}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_real_server_may_fork_and_has_neither_app_nor_rows(
    imported: dict[str, dict[str, Any]], device: str
) -> None:
    found = imported[device]
    assert (found["threads"], found["cuda"]) == (1, False)
    packages = {name.partition(".")[0] for name in found["modules"]}
    assert {"flwr", "torch", "transformers", "accelerate"} <= packages
    assert not packages & {"app", "datasets", "pandas", "pyarrow", "scipy"}
    # At a site with GPU, what asks CUDA something when it is imported is left to the children.
    assert packages.isdisjoint({"bitsandbytes", "peft"}) == (device == "cuda")


def test_what_a_clientapp_needs_is_what_the_server_has(
    imported: dict[str, dict[str, Any]],
) -> None:
    assert set(app.site.libraries._NEEDED) <= imported["cpu"]["modules"]
    assert app.site.libraries._UNUSED == libraries.UNUSED
