"""Keys, rows and the hub's token: each container holds its own, and none of them shows."""

import base64
import json
import subprocess
from pathlib import Path

from tests.containers.conftest import (
    CONNECT,
    NODES,
    OUTSIDE,
    Federation,
    addresses,
)

FIND = "find / -path /proc -prune -o -path /sys -prune -o -type f \\( -name '*.key' -o -name "
FIND += "'train.*' -o -name hf-token -o -name '*.db' -o -name '*.secret' \\) -print 2>/dev/null"


def test_each_container_holds_its_own_keys_and_data_only(federation: Federation) -> None:
    for service in ("supernode-00", "supernode-07"):
        found = sorted(federation.shell(service, FIND).split())
        assert found == ["/site/data/train.jsonl", "/site/supernode.key"]
    found = sorted(federation.shell("superlink", FIND).split())
    own = [f"/federation/superlink/{name}" for name in ("runtime.secret", "server.key")]
    assert found == [*own, "/state/superlink.db"]
    found = federation.shell("serverapp", FIND).split()
    assert found == ["/federation/serverapp/runtime.secret"]
    modes = "stat -c %a /site/supernode.key", "stat -c %a /federation/superlink/server.key"
    assert federation.shell("supernode-07", modes[0]) == "600\n"
    assert federation.shell("superlink", modes[1]) == "600\n"
    seven, eight = (federation.shell(n, "cat /site/*.key") for n in NODES[7:9])
    assert seven != eight


def _once(federation: Federation, service: str, *command: str) -> str:
    """What a command prints in a container of a one-shot service."""
    done = federation.compose("run", "--rm", "--no-deps", "-T", service, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_prepare_holds_every_sites_rows_and_no_key_and_has_no_network(
    federation: Federation,
) -> None:
    found = _once(federation, "prepare", "sh", "-c", f"{FIND} | sort").split()
    assert found == [f"/federation/site-{n:02d}/data/train.jsonl" for n in range(20)]
    superlink = addresses(federation["superlink"])["federation"]["IPAddress"]
    asked = CONNECT.format(targets=(f"{superlink}:9092", *OUTSIDE))
    answers = _once(federation, "prepare", "python3", "-ISc", asked).splitlines()
    assert [a.split()[1] for a in answers] == ["closed"] * 3
    tries = "for f in /cache/new /data/new /federation/new /federation/site-00/new; do "
    tries += "touch $f 2>/dev/null && echo $f; done; touch /models/.tried && rm /models/.tried"
    assert _once(federation, "prepare", "sh", "-c", tries) == ""


def test_download_holds_the_hubs_token_and_nothing_of_the_federation(
    federation: Federation,
) -> None:
    found = _once(federation, "download", "sh", "-c", f"{FIND} | sort").split()
    assert found == ["/run/secrets/hf-token"]
    look = "find /federation /results /state /data -type f 2>/dev/null; true"
    assert _once(federation, "download", "sh", "-c", look) == ""


def test_no_row_is_in_the_cache_that_download_and_the_evaluation_see(
    federation: Federation,
) -> None:
    row = federation.shell("supernode-00", "head -n 1 /site/data/train.jsonl")
    answer = json.loads(row)["output"]
    assert len(answer) > 20
    search = f"import sys; from pathlib import Path; text = {answer!r}.encode()\n"
    search += "print([p for p in Path('/cache').rglob('*') if p.is_file() and text in "
    search += "p.read_bytes()], len(list(Path('/cache').rglob('*.safetensors'))))"
    assert _once(federation, "download", "python3", "-c", search) == "[] 1\n"


def test_a_site_cannot_change_its_key_its_rows_or_its_settings(federation: Federation) -> None:
    tries = "cd /site; for f in supernode.key site.env superlink-ca.crt new data/train.jsonl "
    tries += "data/new; do (echo x >> $f) 2>/dev/null && echo $f; done; "
    tries += "rm -f supernode.key 2>/dev/null && echo gone; touch state/.tried && rm state/.tried"
    assert federation.shell("supernode-07", tries) == ""


def test_no_secret_shows_in_images_settings_or_logs(federation: Federation) -> None:
    token_file = Path(federation.env["HF_TOKEN_FILE"])
    containers = federation.containers()
    mounted = {m["Source"] for m in containers["download"].attrs["Mounts"]}
    assert str(token_file) in mounted  # so it was there to be leaked
    keys = [
        federation.shell("supernode-07", "cat /site/supernode.key"),
        federation.shell("superlink", "cat /federation/superlink/server.key"),
    ]
    assert all("PRIVATE KEY" in key for key in keys)
    shown = federation.shell("serverapp", "cat /federation/serverapp/runtime.secret")
    secrets = [federation.token, base64.b64encode(federation.token.encode()).decode()]
    secrets += [shown, "PRIVATE KEY", *(key.splitlines()[1] for key in keys)]
    images = {c.attrs["Image"] for c in containers.values()}
    seen = {i: _docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", i) for i in images}
    seen |= {f"{i} (inspect)": _docker("image", "inspect", i) for i in images}
    seen |= {n: json.dumps(c.attrs) for n, c in containers.items()}
    seen["logs"] = federation.logs()
    assert min(map(len, seen.values())) > 100
    assert [(w, s[:6]) for w, text in seen.items() for s in secrets if s in text] == []


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True)
    return done.stdout
