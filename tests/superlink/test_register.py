"""The SuperLink's list becomes the folder's, and what cannot become so is said."""

import json
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from superlink.control import Control, ControlError, public_keys
from superlink.provision import provision
from superlink.register import register
from superlink.site_keys import revoke, rotate


class ListOfNodes(Control):
    """Flower's rule without Flower: a key is registered once, and once unregistered stays so."""

    def __init__(self) -> None:
        self.status: dict[bytes, str] = {}
        self.calls: list[str] = []

    def wait_until_up(self, timeout_s: float) -> None:
        pass

    def register(self, public_key: bytes) -> bool:
        self.calls.append("register")
        new = public_key not in self.status
        self.status.setdefault(public_key, "registered")
        return new

    def unregister(self, keys: Collection[bytes]) -> int:
        let_in = [k for k in keys if self.status.get(k, "unregistered") != "unregistered"]
        self.calls += ["unregister"] * len(let_in)
        self.status |= dict.fromkeys(let_in, "unregistered")
        return len(let_in)

    def nodes(self) -> list[Any]:
        """Flower never gives a node id a second time."""
        return [
            SimpleNamespace(public_key=key, node_id=2**63 + number, status=status)
            for number, (key, status) in enumerate(self.status.items())
        ]


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    provision(tmp_path, 3, "superlink:9092", [])
    return tmp_path


def let_in(nodes: ListOfNodes) -> set[bytes]:
    return {k for k, status in nodes.status.items() if status != "unregistered"}


def site_list(nodes: ListOfNodes, federation: Path) -> dict[str, bytes]:
    """sites.json as site -> public key of the node that it names."""
    key_of = {n.node_id: n.public_key for n in nodes.nodes()}
    listed = json.loads((federation / "sites" / "sites.json").read_text())
    return {site: key_of[int(node_id)] for node_id, site in listed.items()}


def test_every_site_is_registered_once(federation: Path) -> None:
    nodes = ListOfNodes()
    done = register(nodes, federation / "public", federation / "sites")
    assert (done.sites, done.new, done.shut_out, done.warnings) == (3, 3, 0, [])
    done = register(nodes, federation / "public", federation / "sites")
    assert (done.sites, done.new, done.shut_out, done.warnings) == (3, 0, 0, [])
    assert nodes.calls == ["register"] * 3  # Flower logs an error for each in excess
    assert site_list(nodes, federation) == public_keys(federation / "public")
    (file,) = (federation / "sites").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_revoked_keys_are_shut_out_first_and_only_once(federation: Path) -> None:
    nodes = ListOfNodes()
    register(nodes, federation / "public", federation / "sites")
    revoke(federation, "site-00")
    rotate(federation, "site-01")
    nodes.calls.clear()
    done = register(nodes, federation / "public", federation / "sites")
    assert (done.sites, done.new, done.shut_out, done.warnings) == (2, 1, 2, [])
    assert nodes.calls == ["unregister", "unregister", "register"]
    assert let_in(nodes) == set(public_keys(federation / "public").values())
    # A new key is a new node, and the same site; a site without a key is none.
    assert list(site_list(nodes, federation)) == ["site-01", "site-02"]
    assert site_list(nodes, federation) == public_keys(federation / "public")
    done = register(nodes, federation / "public", federation / "sites")
    assert (done.sites, done.new, done.shut_out, done.warnings) == (2, 0, 0, [])


def test_a_key_that_was_revoked_before_it_was_registered_never_is(federation: Path) -> None:
    revoke(federation, "site-00")
    nodes = ListOfNodes()
    done = register(nodes, federation / "public", federation / "sites")
    assert (done.sites, done.new, done.shut_out) == (2, 2, 0)
    assert not let_in(nodes) & set(public_keys(federation / "public" / "revoked").values())


def test_a_federation_of_revoked_sites_only_shuts_them_all_out(federation: Path) -> None:
    nodes = ListOfNodes()
    register(nodes, federation / "public", federation / "sites")
    for site in ("site-00", "site-01", "site-02"):
        revoke(federation, site)
    assert register(nodes, federation / "public", federation / "sites").shut_out == 3
    assert let_in(nodes) == set()


def test_a_revoked_key_put_back_by_hand_is_an_error_and_changes_nothing(federation: Path) -> None:
    revoke(federation, "site-01")
    (retired,) = (federation / "public" / "revoked").iterdir()
    shutil.copy(retired, federation / "public" / "site-01.pub")
    nodes = ListOfNodes()
    with pytest.raises(ControlError, match=rf"site-01\.pub is a revoked key \({retired}\)") as err:
        register(nodes, federation / "public", federation / "sites")
    assert len(str(err.value).splitlines()) == 1
    assert nodes.calls == []


def test_a_key_that_flower_has_unregistered_is_named_and_the_others_get_in(
    federation: Path,
) -> None:
    nodes = ListOfNodes()
    keys = public_keys(federation / "public")
    nodes.status[keys["site-01"]] = "unregistered"
    done = register(nodes, federation / "public", federation / "sites")
    assert let_in(nodes) == {keys["site-00"], keys["site-02"]}
    assert len(done.warnings) == 1
    assert "site-01 cannot join; run superlink.provision rotate site-01" in done.warnings[0]
    assert list(site_list(nodes, federation)) == ["site-00", "site-02"]


def test_keys_that_the_folder_does_not_know_are_counted_and_left_alone(federation: Path) -> None:
    nodes = ListOfNodes()
    nodes.status |= {b"by hand": "online", b"gone": "unregistered"}
    done = register(nodes, federation / "public", federation / "sites")
    assert [w[:17] for w in done.warnings] == ["1 more keys may j"]
    assert nodes.status[b"by hand"] == "online"
    assert site_list(nodes, federation) == public_keys(federation / "public")


@pytest.mark.parametrize("content", ["rubbish", "", "ssh-ed25519 AAAA"])
def test_a_file_that_is_no_key_is_named(federation: Path, content: str) -> None:
    (federation / "public" / "site-02.pub").write_text(content)
    with pytest.raises(ControlError, match=r"site-02\.pub is not an elliptic-curve public key"):
        register(ListOfNodes(), federation / "public", federation / "sites")


def test_no_keys_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match=r"run superlink\.provision first"):
        register(ListOfNodes(), tmp_path, tmp_path / "sites")


@pytest.mark.parametrize("name", ["site-1", "site-berlin", "site-007"])
def test_a_key_whose_file_is_named_after_no_site_is_refused(federation: Path, name: str) -> None:
    public = federation / "public"
    (public / "site-02.pub").rename(public / f"{name}.pub")
    nodes = ListOfNodes()
    with pytest.raises(ControlError, match=rf"{name}\.pub: a site is called site-00, site-01, "):
        register(nodes, public, federation / "sites")
    assert nodes.calls == []


def test_two_sites_with_one_key_are_refused(federation: Path) -> None:
    public = federation / "public"
    shutil.copy(public / "site-00.pub", public / "site-02.pub")
    nodes = ListOfNodes()
    with pytest.raises(ControlError, match=r"site-02\.pub is the key of site-00"):
        register(nodes, public, federation / "sites")
    assert nodes.calls == []


def test_a_folder_that_cannot_hold_the_list_is_named_with_its_setting(federation: Path) -> None:
    (federation / "sites").write_text("a file")
    with pytest.raises(ControlError, match=r"cannot write .*sites\.json: .*; set SITES_DIR"):
        register(ListOfNodes(), federation / "public", federation / "sites")
