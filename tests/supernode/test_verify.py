"""A prepared base model with one flipped bit is found by its SuperNode, before any run."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.site import verified
from app.site.base_model import BaseModel, find
from app.site.partition import SiteError
from app.site.verified import check_contents, check_verified
from supernode import verify


@pytest.fixture
def models(models_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models_dir, tmp_path / "models")


@pytest.fixture
def base(models: Path, tiny_model: Path) -> BaseModel:
    return find(models, str(tiny_model), 4)


@pytest.fixture(autouse=True)
def outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a ClientApp of this SuperNode looks."""
    path = tmp_path / "models-verified.json"
    monkeypatch.setenv("MODELS_VERIFIED", str(path))
    monkeypatch.setattr(verified, "WAIT_S", 0.0)
    return path


def flip(path: Path, bit: int = 100, at: int = -1) -> None:
    """One bit, and nothing else that could be seen: neither size nor time."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1 << bit % 8
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (before.st_size, before.st_ino)


def refusal(base: BaseModel) -> str:
    with pytest.raises(SiteError) as caught:
        check_verified(base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_as_they_were_prepared_pass(models: Path, base: BaseModel, outcome: Path) -> None:
    verify.verify(models, outcome, {})
    check_verified(base)
    check_contents(base)
    assert len(json.loads(outcome.read_text())) == 3  # each of them


@pytest.mark.parametrize("at", [0, 7, -1, 1000])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_flipped_bit_is_seen_with_file_and_cure(
    models: Path, base: BaseModel, outcome: Path, tiny_model: Path, file: str, at: int,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    size = (base.folder / file).stat().st_size
    flip(base.folder / file, at=at % size)
    base = find(models, str(tiny_model), 4)  # what looks at sizes sees nothing
    verify.verify(models, outcome, {})
    said = refusal(base)
    assert f"{file} is not what supernode.prepare wrote (sha256 {base.sha256[file][:12]}" in said
    with pytest.raises(SiteError, match=re.escape(said)):  # the evaluation's way
        check_contents(base)
    assert said.endswith(f"delete {base.folder.name} and run supernode.prepare again")
    assert f"{file} in {base.folder}" in capfd.readouterr().err  # the site's log, before any run
    check_verified(find(models, str(tiny_model), 0))  # the others are whole


def test_a_file_that_changes_later_is_read_again_and_nothing_else_is(
    models: Path, base: BaseModel, outcome: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = verify._sha256

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(verify, "_sha256", counted)
    known: dict[str, Any] = {}
    verify.verify(models, outcome, known)
    read.clear()
    verify.verify(models, outcome, known)
    assert read == []
    weights = base.folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    for changed in (bytes(content), weights.read_bytes()):
        weights.write_bytes(changed)
        assert "still being read" in refusal(base)  # an outcome of another file is none
        verify.verify(models, outcome, known)
        assert {p.parent for p in read} == {base.folder}
        if changed == content:
            assert "model.safetensors is not what supernode.prepare wrote" in refusal(base)
    check_verified(base)


def test_the_thread_of_a_supernode_reads_in_the_background_and_the_site_waits_for_it(
    models: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr(verified, "WAIT_S", 60.0)
    path = verify.start(models)
    monkeypatch.setenv("MODELS_VERIFIED", str(path))
    check_verified(base)
    assert path.parent.stat().st_mode & 0o077 == 0  # nobody else writes there
    weights = base.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert "is not what supernode.prepare wrote" in refusal(base)


def test_a_model_without_sha256_is_to_be_prepared_again(
    models: Path, base: BaseModel, tiny_model: Path, outcome: Path
) -> None:
    file = base.folder / "base.json"
    facts = json.loads(file.read_text())
    del facts["sha256"]
    file.write_text(json.dumps(facts))
    verify.verify(models, outcome, {})
    said = refusal(find(models, str(tiny_model), 4))
    assert "prepared by an older version" in said
    assert said.endswith("run supernode.prepare again")


@pytest.mark.parametrize("damage", ["cut", "another key", "no name", "deep"])
def test_a_damaged_base_json_is_named_and_the_other_models_are_verified(
    models: Path, base: BaseModel, tiny_model: Path, outcome: Path, damage: str
) -> None:
    file, other = base.folder / "base.json", find(models, str(tiny_model), 0)
    text = file.read_text()
    damaged = {
        "cut": text[:-20],
        "another key": text.replace('"files"', '"filez"'),
        "no name": text.replace('"name"', '"nama"'),
        "deep": "[" * 100_000,
    }
    file.write_text(damaged[damage])
    verify.verify(models, outcome, {})
    check_verified(other)
    with pytest.raises(SiteError, match=rf"{base.folder.name}/base\.json is not what"):
        find(models, str(tiny_model), 4)


def test_an_outcome_that_could_not_be_written_is_written_the_next_time(
    models: Path, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, Any] = {}
    outcome = tmp_path / "full" / "models-verified.json"
    monkeypatch.setenv("MODELS_VERIFIED", str(outcome))
    with pytest.raises(OSError, match="full"):  # as a disk that is full is: for a while
        verify.verify(models, outcome, known)
    outcome.parent.mkdir()
    verify.verify(models, outcome, known)
    check_verified(base)


def test_a_supernode_that_verifies_nothing_is_named(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODELS_VERIFIED")
    assert "this SuperNode is older than the app" in refusal(base)
