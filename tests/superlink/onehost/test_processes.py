"""Services as processes: how they end."""

import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from superlink.control import ControlError
from superlink.onehost.processes import REPOSITORY, LocalFederation, free_port
from supernode.entrypoint import REFUSED
from tests.samples import IDLE

# As Flower's SuperNode: asked to end, it ends well.
NODE = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
NODE += f"print('up', flush=True)\n{IDLE}"
ENTRYPOINT = "import os, sys; from supernode.entrypoint import watch; "
ENTRYPOINT += f"sys.exit(watch([sys.executable, '-c', {NODE!r}], dict(os.environ)))"


def test_a_site_that_is_stopped_with_all_the_rest_does_not_say_that_it_was_refused(
    tmp_path: Path,
) -> None:
    federation = LocalFederation(tmp_path, tmp_path / "models", tmp_path / "results", 1)
    with subprocess.Popen(
        [sys.executable, "-c", ENTRYPOINT], cwd=REPOSITORY, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as site:  # fmt: skip
        assert site.stdout
        assert site.stdout.readline() == b"up\n"
        federation.processes["site-00"] = site
        federation.stop()
        output = site.stdout.read().decode()
    assert REFUSED not in output
    assert site.returncode == 0


def test_supernodes_that_have_ended_are_told_once_too_few_are_left(tmp_path: Path) -> None:
    federation = LocalFederation(tmp_path, tmp_path / "models", tmp_path / "results", 3)
    (tmp_path / "logs").mkdir()
    for number, code in enumerate(("input()", "exit(3)", "exit(4)")):
        name = f"site-{number:02d}"
        (tmp_path / "logs" / f"{name}.log").write_text(f"why {name}\n")
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        federation.processes[name] = process
        if number:
            process.wait()
    sites = list(federation.processes)
    federation.processes["superlink"] = federation.processes["site-01"]
    federation.check_enough_run(sites, 1)
    federation.check_enough_run(["site-00"], 2)  # more than there are: that is told in its time
    said = f"the SuperNode of site-01 has ended with exit code 3; {{}}end of its log, {tmp_path}"
    said += "/logs/site-01.log:\nwhy site-01"
    with pytest.raises(ControlError, match=f"^{re.escape(said.format(''))}$"):
        federation.check_enough_run(sites[:2], 2)
    both = re.escape(said.format("ended as well: site-02; "))
    with pytest.raises(ControlError, match=f"^{both}$"):
        federation.check_enough_run(sites, 2)
    federation.processes["site-00"].communicate(b"\n")
    with pytest.raises(ControlError, match="ended as well: site-01, site-02; "):
        federation.check_enough_run(sites, 1)


def test_a_free_port_is_none_that_a_connection_could_take_and_none_twice() -> None:
    """Or a SuperNode finds it taken when it starts, a second later."""
    given_out = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    random.seed(0)  # as Hypothesis does in each worker
    ports = [free_port() for _ in range(200)]
    random.seed(0)
    assert len({*ports, *(free_port() for _ in range(200))}) == 400
    assert min(ports) >= 10_000
    assert max(ports) < int(given_out[0])
    with socket.create_server(("127.0.0.1", ports[0])):
        pass
