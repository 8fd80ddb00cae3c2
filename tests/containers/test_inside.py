"""Attempts of a process inside to do more than it may. Comes after test_up.py."""

import subprocess

import pytest

from tests.containers.conftest import LONG_RUNNING, Federation

SERVICES = ["superlink", "serverapp", "page", "supernode-00", "supernode-19"]
ONE_SHOT = {"provision", "download", "prepare", "register", "submit", "fetch"}


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_can_be_written_but_volumes_and_memory(
    federation: Federation, service: str
) -> None:
    places = ["/", "/opt", "/usr", "/etc", "/home", "/opt/fedllm-medical", "/opt/venv/bin"]
    tries = f"for d in {' '.join(places)}; do touch $d/tried; done 2>&1; "
    tries += "touch /tmp/tried /home/fed/.flwr-tried && echo allowed"
    *refused, last = federation.shell(service, tries).splitlines()
    assert last == "allowed"
    assert len(refused) == len(places)
    assert all(line.endswith("Read-only file system") for line in refused), refused


@pytest.mark.parametrize("service", SERVICES)
def test_every_process_is_an_ordinary_user_without_capabilities(
    federation: Federation, service: str
) -> None:
    script = "for p in /proc/[0-9]*; do cat $p/status && echo ==; done 2>/dev/null"
    processes = [p for p in federation.shell(service, script).split("==\n") if "Uid:" in p]
    assert len(processes) >= 3  # init, entrypoint, Flower
    for process in processes:
        fields = dict(line.split(":\t", 1) for line in process.splitlines() if ":\t" in line)
        assert set(fields["Uid"].split()) == {"10003" if service == "serverapp" else "10001"}
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
        assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_every_container_also_the_one_shots_was_made_with_these_settings(
    federation: Federation,
) -> None:
    containers = federation.containers()
    # An evaluation leaves the `fetch` behind that it waited for.
    assert {*containers, "fetch"} == {*LONG_RUNNING, *ONE_SHOT}
    for name, container in containers.items():
        made, host = container.attrs["Config"], container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"], name
        assert host["CapDrop"] == ["ALL"], name
        assert not host["CapAdd"], name
        assert host["SecurityOpt"] == ["no-new-privileges:true"], name
        assert not host["Privileged"], name
        assert (host["PidMode"], host["IpcMode"], host["UsernsMode"]) == ("", "private", ""), name
        user = "10003:10001" if name == "serverapp" else "10001:10001"
        assert made["User"] == user, name
        assert host["Memory"] >= 4 << 30, name
        assert host["PidsLimit"] == 4096, name
        assert set(host["Tmpfs"]) == {"/tmp", "/home/fed"}, name
        assert not [m for m in container.attrs["Mounts"] if "docker.sock" in m["Source"]], name
        policy = "unless-stopped" if name in LONG_RUNNING else "no"
        policy = "on-failure" if name == "submit" else policy
        assert host["RestartPolicy"]["Name"] == policy, name


def test_the_engine_enforces_the_limits(federation: Federation) -> None:
    def run(script: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ("run", "--rm", "--no-deps", "-T", "provision", "python3", "-ISc", script)
        return federation.compose(*command, **env)

    fill = "x = bytearray(256 * 2**20); print('filled')"
    assert run(fill).stdout == "filled\n"
    assert run(fill, TASK_MEMORY="64m").returncode == 137
    fork = "import os, time\nfor n in range(16): os.fork() or (time.sleep(9), os._exit(0))"
    assert run(fork, PIDS="400").returncode == 0
    assert "BlockingIOError" in run(fork, PIDS="8").stderr


def test_no_site_can_put_anything_where_all_sites_lock_their_gpus(federation: Federation) -> None:
    lock = "/locks/device-0.lock"
    tries = [
        f"rm -f {lock}", f"echo x > {lock}", "touch /locks/new", "mkfifo /locks/device-40.lock",
        f"ln -sf /site/site.env {lock}", f"mv {lock} /locks/gone", f"chmod 000 {lock}",
        "mkdir /locks/device-41.lock",
    ]  # fmt: skip
    script = "; ".join(f"({t}) 2>/dev/null && echo '{t}'" for t in tries) + "; echo tried"
    assert federation.shell("supernode-07", script) == "tried\n"
    # They are locks all the same, and the same ones for all.
    hold = f"import fcntl, time; f = open('{lock}'); fcntl.flock(f, 2); print('held', flush=True)"
    tried = f"import fcntl; fcntl.flock(open('{lock}'), 2 | 4)"
    assert federation.python("supernode-08", tried) == ""
    client = federation["supernode-07"].client.api
    command = ["python3", "-ISc", f"{hold}; time.sleep(20)"]
    started = client.exec_create(federation["supernode-07"].id, command)
    assert next(iter(client.exec_start(started["Id"], stream=True))) == b"held\n"
    assert "BlockingIOError" in federation.python("supernode-08", tried)
