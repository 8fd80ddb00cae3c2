"""The prepared base model: what is in it, that it loads, and that damage is noticed."""

import hashlib
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.site.base_model import find, load_with_lora
from app.site.partition import SiteError
from app.wire.adapter import Layout, initial_adapter
from supernode.download import PrepareError
from supernode.quantise import prepare_model
from supernode.source import fingerprints
from tests.samples import ROWS, run_config
from tests.tiny_model import HIDDEN, VOCABULARY

KINDS = {"none": 0, "nf4": 4, "int8": 8}
CONFIG = run_config(lora_r=4, lora_alpha=8)


def prepare(models: Path, name: Path | str, kind: str) -> Path:
    return prepare_model(models, models.parent / "cache", str(name), kind, None)


@pytest.mark.parametrize(("kind", "bits"), KINDS.items())
def test_base_json_describes_the_model_and_its_files(
    models_dir: Path, tiny_model: Path, kind: str, bits: int
) -> None:
    folder = prepare(models_dir, tiny_model, kind)  # prepared before: found again
    base = json.loads((folder / "base.json").read_text())
    assert (base["name"], base["kind"], base["bits"]) == (str(tiny_model), kind, bits)
    files = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "base.json"}
    assert base["files"] == files
    for name in files:
        assert base["sha256"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(files)
    linear = base["linear_layers"]
    assert linear["model.layers.0.self_attn.q_proj"] == [HIDDEN, HIDDEN]
    assert linear["model.layers.1.self_attn.v_proj"] == [HIDDEN // 2, HIDDEN]
    assert linear["lm_head"] == [VOCABULARY, HIDDEN]
    assert len(linear) == 2 * 7 + 1
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o044 == 0o044 for p in folder.iterdir())


def test_the_linear_layers_do_not_depend_on_the_quantisation(
    models_dir: Path, tiny_model: Path
) -> None:
    bases = [find(models_dir, str(tiny_model), bits) for bits in KINDS.values()]
    assert len({json.dumps(b.linear_layers) for b in bases}) == 1  # order included


def test_quantising_saves_room(models_dir: Path, tiny_model: Path) -> None:
    sizes = [
        (prepare(models_dir, tiny_model, kind) / "model.safetensors").stat().st_size
        for kind in ("nf4", "int8", "none")
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


@pytest.mark.parametrize(("kind", "bits"), KINDS.items())
def test_a_prepared_model_computes_nearly_what_its_source_does(
    models_dir: Path, tiny_model: Path, kind: str, bits: int
) -> None:
    from transformers import AutoModelForCausalLM

    base = find(models_dir, str(tiny_model), bits)
    layout = Layout.of(base.linear_layers, CONFIG)
    model, tokenizer = load_with_lora(base, CONFIG, "cpu", layout, initial_adapter(layout, 1))
    ids = torch.tensor([tokenizer(ROWS[0]["input"])["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id
    source = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").eval()
    with torch.inference_mode():
        got, exact = model.eval()(ids).logits, source(ids).logits
    assert torch.isfinite(got).all()
    # B is zero: the adapter adds nothing yet, and only the quantisation tells them apart.
    error = float((got - exact).norm() / exact.norm())
    assert error <= {"none": 1e-6, "int8": 0.05, "nf4": 0.7}[kind]
    assert (error == 0) == (kind == "none")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_reuses_what_is_there(models_dir: Path, tiny_model: Path, kind: str) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in models_dir.rglob("*")}
    folder = prepare(models_dir, tiny_model, kind)
    assert folder.parent == models_dir
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in models_dir.rglob("*")} == before


def test_without_its_source_a_prepared_model_is_still_found(
    tiny_model: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    first = prepare(tmp_path / "models", source, "none")
    shutil.rmtree(source)
    assert prepare(tmp_path / "models", source, "none") == first


def test_the_same_weights_have_the_same_fingerprint_wherever_they_lie(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    prepare(tmp_path / "models", copy, "nf4")
    assert (
        find(tmp_path / "models", str(copy), 4).fingerprint
        == find(models_dir, str(tiny_model), 4).fingerprint
    )


def test_each_quantisation_has_a_fingerprint_of_its_own(models_dir: Path, tiny_model: Path) -> None:
    found = {find(models_dir, str(tiny_model), bits).fingerprint for bits in KINDS.values()}
    assert len(found) == len(KINDS)


def test_one_changed_weight_changes_the_fingerprint(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3, 5] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    prepare(tmp_path / "models", other, "none")
    assert (
        find(tmp_path / "models", str(other), 0).fingerprint
        != find(models_dir, str(tiny_model), 0).fingerprint
    )


# Each can change a result: the tokens, what they stand for, or how the model computes.
SETTINGS = [
    "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json",
    "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json",
]  # fmt: skip


@pytest.mark.parametrize("file", SETTINGS)
def test_another_tokenizer_or_setting_changes_the_fingerprint(
    tiny_model: Path, tmp_path: Path, file: str
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    with (other / file).open("ab") as changed:
        changed.write(b" ")
    for kind, ours in fingerprints(tiny_model).items():
        assert fingerprints(other)[kind] != ours


def test_what_is_no_part_of_a_model_changes_no_fingerprint(
    tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "README.md").write_text("about it")
    (other / "complete").touch()
    (other / "original").mkdir()
    (other / "original" / "params.json").write_text("{}")
    (other / ".gitattributes").write_text("")
    assert fingerprints(other) == fingerprints(tiny_model)


@pytest.mark.parametrize("damage", ["an older version's", "cut", "empty", "a list", "no text"])
def test_a_model_whose_base_json_does_not_say_enough_is_prepared_again(
    models_dir: Path, tiny_model: Path, tmp_path: Path, damage: str
) -> None:
    models = shutil.copytree(models_dir, tmp_path / "models")
    file = prepare(models, tiny_model, "none") / "base.json"
    before = file.read_text()
    damaged = {
        "an older version's": before.replace('"sha256"', '"md5"'),
        "cut": before[:-9],
        "a list": "[]",
        "no text": "\udcff",
    }
    file.write_text(damaged.get(damage, ""), errors="surrogateescape")
    prepare(models, tiny_model, "none")
    assert file.read_text() == before


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "longer"])
def test_a_damaged_file_is_named_before_anything_is_loaded(
    models_dir: Path, tiny_model: Path, tmp_path: Path, file: str, damage: str
) -> None:
    models = shutil.copytree(models_dir, tmp_path / "models")
    path = prepare(models, tiny_model, "nf4") / file
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "cut" else content + b"\0")
    with pytest.raises(SiteError, match=file) as caught:
        find(models, str(tiny_model), 4)
    assert path.parent.name in str(caught.value)  # what to delete
    find(models, str(tiny_model), 0)  # the others are whole


def test_a_model_that_was_not_prepared_is_named_with_those_that_were(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(SiteError, match="somebody/other-model") as caught:
        find(models_dir, "somebody/other-model", 4)
    assert str(tiny_model) in str(caught.value)
    for empty in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SiteError, match="prepare"):
            find(empty, str(tiny_model), 4)


def test_an_interrupted_preparation_is_neither_found_nor_in_the_way(
    models_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    done = prepare(models_dir, tiny_model, "none")
    half = tmp_path / "models" / done.name
    shutil.copytree(done, half)
    (half / "base.json").unlink()  # written last
    with pytest.raises(SiteError):
        find(tmp_path / "models", str(tiny_model), 0)
    assert prepare(tmp_path / "models", tiny_model, "none") == half
    assert find(tmp_path / "models", str(tiny_model), 0).folder == half
    assert [p.name for p in (tmp_path / "models").iterdir()] == [half.name]


def test_what_a_killed_preparation_left_is_removed_but_not_what_another_is_at(
    tiny_model: Path, tmp_path: Path
) -> None:
    target = prepare(tmp_path / "models", tiny_model, "none")
    (target / "base.json").unlink()
    killed, at_work = (target.with_name(f".{target.name}-{name}") for name in ("abc", "def"))
    for folder in (killed, at_work):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
    code += "print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(at_work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"locked\n"
        prepare(tmp_path / "models", tiny_model, "none")
        assert {p.name for p in (tmp_path / "models").iterdir()} == {target.name, at_work.name}
        other.kill()
    (target / "base.json").unlink()
    prepare(tmp_path / "models", tiny_model, "none")
    assert [p.name for p in (tmp_path / "models").iterdir()] == [target.name]


def test_an_unknown_kind_is_refused_naming_those_that_exist(
    tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(PrepareError, match="nf4, fp4, int8, none"):
        prepare(tmp_path / "models", tiny_model, "int4")
    assert not (tmp_path / "models").exists()
