"""Volumes of an older version, of somebody else, or half of one."""

import os

import pytest

from tests.containers.conftest import Federation


def test_a_results_volume_of_an_older_version_gives_one_line_with_its_cure(
    federation: Federation,
) -> None:
    other = Federation(f"fedllm-older-{os.getpid()}", federation.env)
    run = ("run", "--rm", "-T", "--no-deps")
    give = ("--user", "0", "--cap-add", "CHOWN", "serverapp", "chown", "10001", "/results")
    try:
        assert other.compose("run", "--rm", "-T", "provision").returncode == 0
        # (An empty one is given to its owner by the engine.)
        assert other.compose(*run, "serverapp", "touch", "/results/run").returncode == 0
        assert other.compose(*run, *give).returncode == 0
        start = ("timeout", "60", "python3", "-m", "superlink.serverapp")
        refused = other.compose(*run, "serverapp", *start)
        assert refused.returncode == 1
        (line,) = [x for x in refused.stderr.splitlines() if "serverapp: " in x]
        cure = line.split("docker compose ")[1].split()
        assert other.compose(*cure).returncode == 0
        assert other.compose(*run, "serverapp", "touch", "/results/tried").returncode == 0
    finally:
        other.compose("down", "-v")


FOREIGN = {
    "another CA's certificate": (
        "mkdir /federation/public && echo x > /federation/public/ca.crt",
        "provision: /federation/public/ca.crt is there but /federation/ca/ca.key is not: put it "
        "back, or delete /federation to start anew (every site then needs a new kit)",
    ),
    "a folder of another user": (
        "chmod 0555 /federation",
        "provision: /federation/public: Permission denied",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_federation_volume_that_is_not_ours_gives_one_line(
    federation: Federation, what: str
) -> None:
    spoil, line = FOREIGN[what]
    other = Federation(f"fedllm-foreign-{os.getpid()}", federation.env)
    try:
        spoilt = other.compose("run", "--rm", "-T", "provision", "sh", "-c", spoil)
        assert spoilt.returncode == 0, spoilt.stderr
        up = other.compose("up", "-d", "superlink")
        assert up.returncode == 1
        assert 'service "provision" didn\'t complete successfully: exit 1' in up.stderr
        assert other.logs("provision").splitlines() == [line]
    finally:
        other.compose("down", "-v")


def test_site_folders_without_public_keys_get_them_again(federation: Federation) -> None:
    other = Federation(f"fedllm-stale-{os.getpid()}", federation.env)
    key = ("run", "--rm", "-T", "provision", "sh", "-c", "cat /federation/site-00/supernode.key")
    try:
        assert other.compose("run", "--rm", "provision").returncode == 0
        before = other.compose(*key).stdout
        lost = "rm -r /federation/public /federation/ca/*"
        other.compose("run", "--rm", "-T", "provision", "sh", "-c", lost)
        again = other.compose("run", "--rm", "-T", "provision")
        assert again.stdout.startswith("provision: CA, server certificate for superlink,")
        assert "PRIVATE KEY" in before
        assert other.compose(*key).stdout == before
    finally:
        other.compose("down", "-v")
