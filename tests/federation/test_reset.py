"""The day after: somebody had what he should not, and everything is made anew."""

import shutil
from pathlib import Path

import pytest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from superlink.certificates import new_key
from superlink.onehost.processes import LocalFederation
from superlink.provision import reset
from superlink.register import register
from tests.federation.test_strangers import UNKNOWN, UNTRUSTED, Scene

pytestmark = pytest.mark.faults


def test_after_a_reset_no_old_key_certificate_or_registration_is_good_for_anything(
    tmp_path: Path,
) -> None:
    with LocalFederation(tmp_path, tmp_path / "models", tmp_path / "results", 2) as federation:
        federation.provision()
        scene = Scene(federation, federation.start_superlink())
        register(scene.control, federation.public, federation.sites_dir)
        federation.start_node(0)
        scene.wait_until("site-00", "online")
        old, half_new = scene.kit("old", "site-00"), scene.kit("half-new", "site-01")
        scene.control.register(public_key_to_bytes(new_key().public_key()))  # an intruder's

        reset(federation.federation)
        federation.stop_node(0)
        federation.kill("superlink")
        for file in (tmp_path / "superlink").glob("superlink.db*"):  # as docs/security.md says
            file.unlink()
        scene.control = federation.start_superlink()
        done = register(scene.control, federation.public, federation.sites_dir)
        assert (done.sites, done.new, done.warnings) == (2, 2, [])
        federation.start_node(0)
        shutil.copy(federation.federation / "site-01" / "superlink-ca.crt", half_new)
        scene.attempt("old", old)
        scene.attempt("half-new", half_new)
        scene.wait_until("site-00", "online")
        for name, advice in (("old", UNTRUSTED), ("half-new", UNKNOWN)):
            code, output = scene.answer(name)
            assert code != 0
            assert advice in output, output
