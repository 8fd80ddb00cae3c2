"""A site's kit: what is in it and whose, that it is not made over another, and a key made there."""

import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.site.policy import Policy
from superlink import kit_archive, site_keys
from superlink.certificates import CertificateError, load_key
from superlink.control import public_keys
from superlink.provision import main, provision, reset
from supernode import keygen
from tests.docs.pages import Page
from tests.killed import kills
from tests.samples import REPOSITORY

ADDRESS = "fed.example.org:9092"


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    provision(tmp_path / "federation", 2, "superlink:9092", ["fed.example.org"])
    return tmp_path / "federation"


def unpacked(archive: bytes, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="tar")
    return folder / "site-01"


def public_part(tmp_path: Path, name: str = "made-at-the-site") -> Path:
    """The file that supernode.keygen's standard output makes."""
    site = tmp_path / name
    site.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "supernode.keygen"], cwd=REPOSITORY, check=True,
        env=os.environ | {"SITE_DIR": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    (site / "site-01.pub").write_text(done.stdout)
    assert site_keys.fingerprint(site / "site-01.pub") in done.stderr
    return site / "site-01.pub"


def admit(federation: Path, given: Path, site: str = "site-01") -> None:
    site_keys.admit(federation, site, given.read_bytes(), str(given))


def test_the_same_files_make_the_same_archive_and_each_is_the_containers_users(
    federation: Path, tmp_path: Path
) -> None:
    archive = kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False)
    assert kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False) == archive
    assert archive[4:8] == bytes(4)  # gzip's own time
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        entries = {e.name.removeprefix("site-01/"): e for e in tar}
    files = {"README", "SHA256SUMS", "compose.yaml", "compose.cpu.yaml"}
    files |= {f"site/{n}" for n in ("site.env", "superlink-ca.crt", "supernode.key", "policy.toml")}
    assert set(entries) == files | {"site-01", "eval", "site", "site/data", "site/state"}
    assert {(e.uid, e.gid, e.mtime) for e in entries.values()} == {(10001, 10001, 0)}
    modes = {name: e.mode for name, e in entries.items() if e.isfile()}
    assert modes.pop("site/supernode.key") == 0o600
    assert set(modes.values()) == {0o644}
    site = unpacked(archive, tmp_path)
    sums = [
        f"{hashlib.sha256((site / n).read_bytes()).hexdigest()}  {n}"
        for n in sorted(files - {"SHA256SUMS"})
    ]
    assert (site / "SHA256SUMS").read_text().splitlines() == sums
    own = federation / "site-01"
    for name in ("supernode.key", "superlink-ca.crt"):
        assert (site / "site" / name).read_bytes() == (own / name).read_bytes()
    wanted = f"SUPERLINK={ADDRESS}\nPARTITION_ID=1\nNUM_PARTITIONS=2\n"
    assert (site / "site" / "site.env").read_text() == wanted
    readme = (site / "README").read_text()
    assert "$" not in readme
    assert site_keys.fingerprint(federation / "public" / "site-01.pub") in readme
    assert max(map(len, readme.splitlines())) <= 102
    assert len(readme.splitlines()) <= 68  # one page


def test_the_policy_in_it_is_that_of_the_page_without_a_rule_in_force(
    federation: Path, tmp_path: Path
) -> None:
    archive = kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False)
    site = unpacked(archive, tmp_path) / "site"
    assert str(Policy.read(site)).endswith("is in force: it has no rule")
    page = (REPOSITORY / "docs" / "hospital.md").read_text(encoding="utf-8")
    rules = (site / "policy.toml").read_text(encoding="utf-8").split("\n\n", 1)[1]
    assert f"```toml\n{re.sub('(?m)^#(?=[a-z])', '', rules)}```" in page


def test_settings_that_were_added_travel_and_one_without_an_address_is_refused(
    federation: Path,
) -> None:
    file = federation / "site-01" / "site.env"
    file.write_text("DATA_COLUMNS=ask,say\nSUPERLINK=superlink:9092\nPARTITION_ID=1\n")
    with tarfile.open(
        fileobj=io.BytesIO(kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False))
    ) as tar:
        member = tar.extractfile("site-01/site/site.env")
        assert member is not None
        assert member.read().decode() == (
            f"DATA_COLUMNS=ask,say\nSUPERLINK={ADDRESS}\nPARTITION_ID=1\n"
        )
    file.write_text("PARTITION_ID=1\n")
    with pytest.raises(CertificateError, match="no line SUPERLINK="):
        kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False)


def call(federation: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    argv = ["superlink.provision", *arguments, "--federation", str(federation)]
    monkeypatch.setattr(sys, "argv", argv)
    return main()


def test_the_command_writes_it_for_its_owner_and_never_over_another(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    kit = ("kit", "site-01", "--address", ADDRESS)
    assert call(federation, monkeypatch, *kit) == 0
    made = tmp_path / "site-01.tar.gz"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert hashlib.sha256(made.read_bytes()).hexdigest().encode() in capsysbinary.readouterr().out
    made.write_bytes(b"another")
    assert call(federation, monkeypatch, *kit) == 1
    assert made.read_bytes() == b"another"
    assert b"is there already" in capsysbinary.readouterr().err
    assert call(federation, monkeypatch, *kit, "--output", "-") == 0
    said = capsysbinary.readouterr()
    assert said.out == kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False)
    assert b"SHA-256" in said.err


@pytest.mark.parametrize(
    ("site", "address", "why"),
    [
        ("site-07", ADDRESS, "site-07 is not there"),
        (
            "site-01",
            "elsewhere.example:9092",
            "not for elsewhere.example: superlink.provision --na",
        ),
        ("site-01", "fed.example.org", "--address: 'fed.example.org' is no address: host:port"),
        ("site-01", "0.0.0.0:9092", "--address: 0.0.0.0 is what a server listens on"),
        ("site-00", ADDRESS, "site-00 is revoked"),
    ],
)
def test_a_kit_that_nobody_could_use_is_not_made(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], site: str, address: str, why: str,
) -> None:  # fmt: skip
    site_keys.revoke(federation, "site-00")
    monkeypatch.chdir(tmp_path)
    assert call(federation, monkeypatch, "kit", site, "--address", address) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert not list(tmp_path.glob("*.gz"))


# --- A key made at the site -----------------------------------------------------------------------


def test_both_ways_end_in_the_same_folder_and_the_private_part_never_travels(
    federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = public_keys(federation / "public")["site-01"]
    before = kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False)
    site = unpacked(kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=True), tmp_path)
    assert not (site / "site" / "supernode.key").exists()
    assert "docker compose run --rm -T keygen > site-01.pub" in (site / "README").read_text()
    public = keygen.make_key(site / "site" / "supernode.key")
    given = tmp_path / "site-01.pub"
    given.write_bytes(site_keys._line(public))
    stdin = io.TextIOWrapper(io.BytesIO(given.read_bytes()))
    for source in (str(given), "-"):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert call(federation, monkeypatch, "admit", "site-01", source) == 0

    with tarfile.open(fileobj=io.BytesIO(before)) as tar:
        wanted = {e.name for e in tar}
    assert {p.relative_to(tmp_path).as_posix() for p in [site, *site.rglob("*")]} == wanted
    key = site / "site" / "supernode.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert load_key(key).public_key() == public
    # At the operator's only the public part: his own is gone, and its public key revoked.
    assert not (federation / "site-01" / "supernode.key").exists()
    assert list(public_keys(federation / "public" / "revoked").values()) == [old]
    assert site_keys.fingerprint(federation / "public" / "site-01.pub") == keygen.fingerprint(
        public
    )
    now = kit_archive.kit(federation, "site-01", ADDRESS, key_at_site=False)  # a new kit, later
    assert not (unpacked(now, tmp_path / "now") / "site" / "supernode.key").exists()
    assert provision(federation, 2, "superlink:9092", ["fed.example.org"]) == []
    assert site_keys.fingerprint(federation / "public" / "site-01.pub") == keygen.fingerprint(
        public
    )


def test_a_key_made_at_the_site_can_be_replaced_revoked_and_reset(
    federation: Path, tmp_path: Path
) -> None:
    first, second = public_part(tmp_path), public_part(tmp_path, "another")
    admit(federation, first)
    admit(federation, first)  # once more: nothing happens
    assert len(site_keys.retired_files(federation, "site-01")) == 1
    admit(federation, second)
    with pytest.raises(CertificateError, match="is a revoked key; have the site make another"):
        admit(federation, first)
    site_keys.revoke(federation, "site-01")
    provision(federation, 2, "superlink:9092", ["fed.example.org"])
    assert site_keys.is_revoked(federation, "site-01")
    site_keys.rotate(federation, "site-01")  # from now on a key of the operator's
    assert (federation / "site-01" / "supernode.key").exists()
    assert not (federation / "site-01" / "supernode.pub").exists()
    third = public_part(tmp_path, "third")
    admit(federation, third)
    reset(federation)
    assert provision(federation, 2, "superlink:9092", ["fed.example.org"]) == []
    now = site_keys.fingerprint(federation / "public" / "site-01.pub")
    assert now not in map(site_keys.fingerprint, (first, second, third))


def test_only_a_public_key_of_its_own_is_admitted_and_a_private_one_is_never_copied(
    federation: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in federation.rglob("*") if p.is_file()}
    own, private = public_part(tmp_path), tmp_path / "made-at-the-site" / "supernode.key"
    (tmp_path / "rsa.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKHEChvpIZ8wKKNdTSRCPfbi9q+3NSIqmfiH4PyhUIzc"
    )
    for site, given, why in (
        ("site-01", private, "is a private key, which nobody but the site should have"),
        ("site-01", tmp_path / "rsa.pub", "is not an elliptic-curve public key in one line"),
        ("site-01", federation / "public" / "site-00.pub", "is the key of site-00"),
        ("site-07", own, "site-07 is not one of this federation's"),
    ):
        with pytest.raises(CertificateError, match=why):
            admit(federation, given, site)
    assert {p: p.read_bytes() for p in federation.rglob("*") if p.is_file()} == before


def test_an_admission_that_was_killed_anywhere_is_completed_or_has_not_begun(
    federation: Path, tmp_path: Path
) -> None:
    given, old = public_part(tmp_path), public_keys(federation / "public")["site-01"]
    new = site_keys.fingerprint(given)
    outcomes = set()
    for copy in kills(lambda f: admit(f, given), federation):
        provision(copy, 2, "superlink:9092", ["fed.example.org"])
        assert provision(copy, 2, "superlink:9092", ["fed.example.org"]) == []
        begun = site_keys.fingerprint(copy / "public" / "site-01.pub") == new
        assert (copy / "site-01" / "supernode.pub").exists() == begun
        assert (copy / "site-01" / "supernode.key").exists() != begun
        retired = list(public_keys(copy / "public" / "revoked").values())
        assert retired == ([old] if begun else [])
        outcomes.add(begun)
    assert outcomes == {False, True}


def test_keygen_never_replaces_a_key_and_says_what_is_wrong(tmp_path: Path) -> None:
    pub = public_part(tmp_path)
    key = pub.with_name("supernode.key")
    content, public = key.read_bytes(), pub.read_text()
    command = [sys.executable, "-m", "supernode.keygen"]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "supernode.key").write_text("no key")
    for env, said in (
        ({"SITE_DIR": str(tmp_path / "odd")}, "is there already, and is no private key of a site"),
        ({"SITE_DIR": str(tmp_path / "none")}, "No such file or directory"),
        ({"SITE_DIR": ""}, "SITE_DIR is not set"),
    ):
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=os.environ | env,
            check=False,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
    env = os.environ | {"SITE_DIR": str(pub.parent)}
    with pub.open("w") as file:  # as the shell does it, before anything is asked
        again = subprocess.run(
            command, cwd=REPOSITORY, env=env, check=True, stdout=file,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert "was there already, and stays" in again.stderr
    assert (pub.read_text(), site_keys.fingerprint(pub) in again.stderr) == (public, True)
    assert key.read_bytes() == content
    assert [p.name for p in pub.parent.iterdir() if "key" in p.name] == ["supernode.key"]


# --- Its compose files, beside the big one --------------------------------------------------------


def services(path: str) -> dict[str, Any]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!reset", lambda loader, node: None)
    text = (REPOSITORY / path).read_text()
    found: dict[str, Any] = yaml.load(text, Loader)["services"]  # noqa: S506 (it is a SafeLoader)
    return found


def test_a_kits_supernode_is_the_one_of_the_big_file_but_for_where_it_is() -> None:
    ours = services("superlink/kit/compose.yaml")["supernode"]
    theirs = services("compose.yaml")["supernode-07"]
    elsewhere = {"volumes", "depends_on", "networks", "attach"}
    assert ours.keys() - elsewhere == theirs.keys() - elsewhere
    for name in ours.keys() - elsewhere - {"image", "environment"}:
        assert ours[name] == theirs[name], name
    assert ours["image"] == theirs["image"].replace("fedllm-medical", "${REGISTRY:-fedllm-medical}")
    env = {k: v for k, v in ours["environment"].items() if not k.endswith("_proxy")}
    assert env == theirs["environment"]
    assert ours["depends_on"] == {"check": {"condition": "service_completed_successfully"}}


def test_a_kit_reaches_the_hub_as_the_big_file_does() -> None:
    ours, theirs = (
        services(f)["download"]["environment"]
        for f in ("superlink/kit/compose.yaml", "compose.yaml")
    )
    assert ours == theirs | {"DATA_SOURCE": "bundled"}  # the rows are the site's own


def test_every_service_of_a_kit_is_as_hardened_and_sees_no_more_than_it_needs() -> None:
    ours, big = services("superlink/kit/compose.yaml"), services("compose.yaml")
    for name, service in ours.items():
        for setting in ("user", "read_only", "cap_drop", "security_opt", "pids_limit", "init"):
            assert service[setting] == big["provision"][setting], (name, setting)
    assert "site" not in "".join(ours["download"]["volumes"] + ours["prepare"]["volumes"])
    assert {n for n, s in ours.items() if s.get("network_mode") == "none"} == {
        "keygen", "prepare", "eval",
    }  # fmt: skip
    assert ours["eval"]["volumes"] == ["models:/models:ro", "cache:/cache:ro", "./eval:/eval"]
    assert ours["check"]["volumes"] == ours["supernode"]["volumes"]
    assert ours["check"]["environment"] == ours["supernode"]["environment"]
    assert [v for v in ours["check"]["volumes"] if v.startswith("./")] == [
        "./site:/site:ro", "./site/state:/site/state"
    ]  # fmt: skip
    assert all(s.get("ports") is None for s in ours.values())


def test_without_a_gpu_a_kit_reserves_none() -> None:
    ours, cpu = (services(f"superlink/kit/compose{kind}.yaml") for kind in ("", ".cpu"))
    reserving = {n for n, s in ours.items() if "deploy" in s}
    assert reserving == {"prepare", "check", "supernode", "eval"}
    for name in reserving:
        assert cpu[name]["deploy"] == {"resources": {"reservations": None}}
    assert cpu["check"]["entrypoint"] == [
        x.replace("reference", "demo").replace(
            "ContactDoctor/Bio-Medical-Llama-3-8B", "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
        for x in ours["check"]["entrypoint"]
    ]


def test_the_pages_command_makes_a_file_of_nobody_else_and_overwrites_none(
    federation: Path, tmp_path: Path
) -> None:
    """The shell makes the file there, with a private key in it. As it stands, but for compose."""
    page = Page.read(REPOSITORY / "docs" / "operator.md")
    (line,) = [command for command, _ in page.commands if "--output -" in command]
    compose = "docker compose run --rm -T provision python3"
    assert compose in line
    line = line.replace(compose, sys.executable).replace("superlink.example:9092", ADDRESS)
    line = line.replace("site-07", "site-01")
    env = os.environ | {"FEDERATION_DIR": str(federation), "PYTHONPATH": str(REPOSITORY)}
    kit = tmp_path / "site-01.tar.gz"

    def call() -> int:
        return subprocess.run(["sh", "-c", line], cwd=tmp_path, env=env, umask=0o022).returncode

    assert call() == 0
    assert stat.S_IMODE(kit.stat().st_mode) == 0o600
    assert unpacked(kit.read_bytes(), tmp_path / "unpacked").is_dir()
    kit.write_text("of before")
    assert call() != 0
    assert kit.read_text() == "of before"
