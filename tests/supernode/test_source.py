"""What people bring as a base model: whole, or refused by one line before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.site.base_model import find, load_with_lora
from app.site.examples import encode_all
from app.site.partition import Row, SiteError
from app.site.training import evaluate, train
from app.wire.adapter import Layout, initial_adapter
from supernode import quantise
from supernode.download import PrepareError
from supernode.quantise import prepare_model
from supernode.source import fingerprints
from tests.samples import ROWS, run_config
from tests.tiny_model import FAMILIES, MASKED, VOCABULARY, build_tiny_family

HUB_ID = "somebody/model"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "source")


def prepare(source: Path | str, kind: str, folder: Path) -> Path:
    return prepare_model(folder / "models", folder / "cache", str(source), kind, None)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def base_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "base.json").read_text())
    return found


# --- what is missing is not made up ---------------------------------------------------------------


def lacks_two(folder: Path) -> str:
    change_weights(folder, lambda w: (w.pop(UP), w.pop("model.norm.weight")))
    return f"its weights lack 2 of the model's arrays, the first is {UP}"


def of_another_class(folder: Path) -> str:
    arrays = load_file(folder / "model.safetensors")
    renamed = {f"decoder.{name}": array for name, array in arrays.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return f"its weights lack {len(arrays)} of the model's arrays, the first is lm_head.weight"


def one_layer_more(folder: Path) -> str:
    name = UP.replace("1", "2")
    change_weights(folder, lambda w: w.update({name: w[UP].clone()}))
    return f"its weights have 1 arrays that the model has not, the first is {name}"


def another_shape(folder: Path) -> str:
    change_json(folder / "config.json", intermediate_size=192)
    return "its weights have 6 arrays of another shape than config.json says, the first is model."


def a_pointer(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 268\n")
    return f"{file} is a Git LFS pointer, not the file; run git lfs pull there"


def a_page(folder: Path) -> str:
    file = folder / "tokenizer.json"
    file.write_text("\n<!DOCTYPE html>\n<html><body>Please log in</body></html>")
    return f"{file} is a web page, not the file; download it again, logged in if it asks for that"


def cut(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file} is damaged or cut short ("


def pickled(folder: Path) -> str:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return f"{folder} holds no .safetensors file, and no other weights are read; save it anew"


def an_adapter(folder: Path) -> str:
    """Transformers would load the model that it names, whose files are in no fingerprint."""
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    return f"{folder} holds an adapter (adapter_config.json); give its base model, or merge"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return f"{folder / 'config.json'} is missing; give the model's whole folder"


def in_two(folder: Path) -> tuple[dict[str, str], Path]:
    """Its weights as two files: the file of each array by name, and the index."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {n: f"model-0000{1 + (n > UP)}-of-00002.safetensors" for n in arrays}
    for file in sorted(set(files.values())):
        part = {n: array for n, array in arrays.items() if files[n] == file}
        save_file(part, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files, index


def a_part_lost(folder: Path) -> str:
    files, index = in_two(folder)
    (folder / files[UP]).unlink()
    return f"{index} names 1 files that are not there, the first is {files[UP]}; download"


def an_array_that_only_the_index_has(folder: Path) -> str:
    files, index = in_two(folder)
    index.write_text(json.dumps({"weight_map": files | {"model.extra.weight": files[UP]}}))
    return f"{index} names 1 arrays that its files lack, the first is model.extra.weight; download"


def parts_without_an_index(folder: Path) -> str:
    _, index = in_two(folder)
    index.unlink()
    return f"{index} is missing, which says what is in model-00001-of-00002.safetensors; give"


def whole_numbers(folder: Path) -> str:
    change_weights(folder, lambda w: w.update({UP: (w[UP] * 100).to(torch.int8)}))
    return f"{folder / 'model.safetensors'}: 1 weights are whole numbers, as of quantised ones"


def settings_cut(folder: Path) -> str:
    (folder / "generation_config.json").write_text("{")
    return f"{folder / 'generation_config.json'} is no JSON ("


def no_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return f"{folder}: its tokenizer does not load ("


def config_cut(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return f"{folder / 'config.json'} is no JSON ("


def tokenizer_cut(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{")
    return f"{folder / 'tokenizer.json'} is no JSON ("


def no_eos(folder: Path) -> str:
    change_json(folder / "tokenizer_config.json", eos_token=None)
    return f"{folder / 'tokenizer_config.json'} names no eos_token, which every answer ends in"


def a_token_too_many(folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = VOCABULARY - len(tokenizer) + 1
    tokenizer.add_tokens([f"invented{n}" for n in range(count)])
    tokenizer.save_pretrained(folder)
    return f"{folder}: the tokenizer has a token {VOCABULARY}, the model knows 0 to 299; give"


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize(
    "damage",
    [
        lacks_two, of_another_class, one_layer_more, another_shape, a_pointer, a_page, cut, pickled,
        an_adapter, no_config, config_cut, tokenizer_cut, no_eos, a_token_too_many, a_part_lost,
        an_array_that_only_the_index_has, parts_without_an_index, whole_numbers, settings_cut,
        no_tokenizer,
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_used_is_named_in_one_line_and_leaves_nothing_behind(
    source: Path, tmp_path: Path, damage: Callable[[Path], str], kind: str
) -> None:
    said = damage(source)
    with pytest.raises(PrepareError) as caught:
        prepare(source, kind, tmp_path)
    assert said in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "models").iterdir()) == []


def test_weights_in_parts_are_those_of_one_file(source: Path, tmp_path: Path) -> None:
    arrays = load_file(source / "model.safetensors")
    in_two(source)
    made = load_file(prepare(source, "none", tmp_path) / "model.safetensors")
    assert made.keys() == arrays.keys()
    assert all(torch.equal(made[n], arrays[n]) for n in arrays)


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_quantised_source_is_refused_before_its_weights_are_looked_at(
    source: Path, tmp_path: Path, method: str, kind: str
) -> None:
    change_json(source / "config.json", quantization_config={"quant_method": method, "bits": 4})
    (source / "model.safetensors").write_bytes(b"not yet read")
    with pytest.raises(PrepareError) as caught:
        prepare(source, kind, tmp_path)
    assert str(caught.value) == (
        f"{source / 'config.json'}: quantization_config: the weights are quantised already "
        f"({method}); give the original model, which is quantised here"
    )


def test_a_tokenizer_as_large_as_the_vocabulary_is_taken(source: Path, tmp_path: Path) -> None:
    a_token_too_many(source)
    change_json(source / "config.json", vocab_size=VOCABULARY + 1)
    change_weights(
        source,
        lambda w: w.update(
            {
                n: torch.cat([w[n], w[n][:1]])
                for n in ("lm_head.weight", "model.embed_tokens.weight")
            }
        ),
    )
    assert base_json(prepare(source, "none", tmp_path))["linear_layers"]["lm_head"] == [301, 64]


def test_tied_weights_are_stored_once_and_not_missed(source: Path, tmp_path: Path) -> None:
    change_json(source / "config.json", tie_word_embeddings=True)
    change_weights(source, lambda w: w.pop("lm_head.weight"))
    for kind in ("none", "nf4"):
        weights = load_file(prepare(source, kind, tmp_path) / "model.safetensors")
        expected = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(weights["model.embed_tokens.weight"], expected)


def test_what_an_older_version_made_up_is_not_kept(source: Path, tmp_path: Path) -> None:
    folder = prepare(source, "none", tmp_path)
    old = {k: v for k, v in base_json(folder).items() if k != "source"}
    lacks_two(source)
    old["fingerprint"] = fingerprints(source)["none"]
    (folder / "base.json").write_text(json.dumps(old))
    with pytest.raises(PrepareError, match="lack 2 of the model's arrays"):
        prepare(source, "none", tmp_path)


# --- an identity that covers all ------------------------------------------------------------------


def test_no_fingerprint_of_an_older_version_has_changed(tmp_path: Path) -> None:
    for name, content in {
        "config.json": '{"a": 1}', "model.safetensors": "weights", "tokenizer.model": "x",
        "README.md": "no part of it",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    # As commit db777f2 computed it.
    assert fingerprints(tmp_path)["nf4"] == "db548c926a034172"  # pragma: allowlist secret
    assert len(set(fingerprints(tmp_path).values())) == 4


@pytest.fixture
def cached(tiny_model: Path, tmp_path: Path) -> Path:
    """The cache's folder of ``HUB_ID``: no hub is asked."""
    kept = shutil.copytree(tiny_model, tmp_path / "cache" / HUB_ID.replace("/", "--"))
    (kept / "complete").touch()
    return kept


def test_other_weights_of_the_same_name_size_and_time_are_prepared_again(
    cached: Path, tmp_path: Path
) -> None:
    file = cached / "model.safetensors"
    before = file.stat()
    first = base_json(prepare(HUB_ID, "none", tmp_path))
    change_weights(cached, lambda w: w.update({UP: w[UP] + 1}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    folder = prepare(HUB_ID, "none", tmp_path)
    assert torch.equal(load_file(folder / "model.safetensors")[UP], load_file(file)[UP])
    assert base_json(folder)["fingerprint"] == fingerprints(cached)["none"] != first["fingerprint"]


def test_another_tokenizer_setting_is_prepared_again(cached: Path, tmp_path: Path) -> None:
    prepare(HUB_ID, "none", tmp_path)
    change_json(cached / "tokenizer_config.json", model_max_length=77)
    folder = prepare(HUB_ID, "none", tmp_path)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 77


def test_what_nobody_touched_is_not_read_again_and_a_touched_copy_is_kept(
    cached: Path, tmp_path: Path
) -> None:
    folder = prepare(HUB_ID, "none", tmp_path)
    told = base_json(folder) | {"fingerprint": "as nobody computes it"}
    (folder / "base.json").write_text(json.dumps(told))
    assert base_json(prepare(HUB_ID, "none", tmp_path)) == told
    right = told | {"fingerprint": fingerprints(cached)["none"]}
    (folder / "base.json").write_text(json.dumps(right))
    weights = (folder / "model.safetensors").stat().st_ino
    (cached / "model.safetensors").touch()
    after = base_json(prepare(HUB_ID, "none", tmp_path))
    assert (folder / "model.safetensors").stat().st_ino == weights
    assert after["source"] != right["source"]
    assert after | {"source": 0} == right | {"source": 0}


def test_a_source_that_changes_while_it_is_read_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "train_one_row", lambda _: change_weights(source, lambda w: None))
    with pytest.raises(PrepareError, match="has changed while it was read"):
        prepare(source, "none", tmp_path)


@pytest.mark.parametrize("typed", ["{}/", "{}//", "./{}"])
def test_a_name_is_the_same_however_it_is_typed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    monkeypatch.chdir(source.parent)
    folder = prepare(typed.format("source"), "none", tmp_path)
    assert (folder.name, base_json(folder)["name"]) == ("source-none", "source")
    for again in ("source", typed.format("source")):
        assert prepare(again, "none", tmp_path) == folder
        name = run_config(model_name=again).model_name
        assert find(tmp_path / "models", name, 0).folder == folder
    old = base_json(folder) | {"name": typed.format("source")}  # as older versions wrote it
    (folder / "base.json").write_text(json.dumps(old))
    assert find(tmp_path / "models", "source", 0).folder == folder


def test_two_names_of_one_folder_are_not_taken_for_each_other(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, "a/b")
    shutil.copytree(tiny_model, "a--b")
    change_weights(tmp_path / "a--b", lambda w: w.update({UP: w[UP] + 1}))
    prepare("a/b", "none", tmp_path)
    folder = prepare("a--b", "none", tmp_path)
    assert find(tmp_path / "models", "a--b", 0).folder == folder
    assert torch.equal(
        load_file(folder / "model.safetensors")[UP], load_file("a--b/model.safetensors")[UP]
    )
    with pytest.raises(SiteError, match="no base model a/b"):
        find(tmp_path / "models", "a/b", 0)


# --- ready is what can work -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_prepared_of_another_family_learns(tmp_path: Path, family: str, kind: str) -> None:
    build_tiny_family(tmp_path / "source", family)
    prepare(tmp_path / "source", kind, tmp_path)
    base = find(tmp_path / "models", str(tmp_path / "source"), {"none": 0, "nf4": 4}[kind])
    assert base.positions == {"gpt2": 1024, "gptj": 2048, "mpt": 2048}.get(family)
    config = run_config(
        target_modules="all-linear", lora_r=4, lora_dropout=0.0, batch_size=8, max_steps=6
    )
    layout = Layout.of(base.linear_layers, config)
    start = initial_adapter(layout, 1)
    model, tokenizer = load_with_lora(base, config, "cpu", layout, start)
    rows = encode_all([Row(r["input"], r["output"]) for r in ROWS], tokenizer, 512)
    before = evaluate(model, rows, config)
    model, _ = load_with_lora(base, config, "cpu", layout, start)
    assert train(model, rows, config, 1e-2, 1).steps == 6
    after = evaluate(model, rows, config)
    assert after.loss_sum < 0.99 * before.loss_sum


def test_gpt_2s_transposed_layers_are_linear_layers(tmp_path: Path) -> None:
    build_tiny_family(tmp_path / "source", "gpt2")
    for kind in ("none", "nf4"):
        layers = base_json(prepare(tmp_path / "source", kind, tmp_path))["linear_layers"]
        assert layers["transformer.h.0.attn.c_attn"] == [3 * 64, 64]  # [out, in]
        assert layers["transformer.h.1.mlp.c_fc"] == [4 * 64, 64]
        assert len(layers) == 2 * 4 + 1


def test_a_model_that_cannot_be_trained_is_not_ready(tmp_path: Path) -> None:
    """TrOCR's decoder loads, and gives more logits than it is asked for: each round would fail."""
    build_tiny_family(tmp_path / "source", "trocr")
    with pytest.raises(PrepareError, match=r"source \(none\) cannot be trained: ValueError: [^\n]"):
        prepare(tmp_path / "source", "none", tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", MASKED)
def test_a_model_that_sees_the_answer_is_not_ready(tmp_path: Path, family: str, kind: str) -> None:
    build_tiny_family(tmp_path / "source", family)
    with pytest.raises(PrepareError) as refused:
        prepare(tmp_path / "source", kind, tmp_path)
    assert str(refused.value) == (
        f"{tmp_path / 'source'} ({kind}) cannot be trained: it sees the words that come after (a "
        "masked model)"
    )
    assert list((tmp_path / "models").iterdir()) == []


def test_the_same_model_as_a_decoder_is_ready(tmp_path: Path) -> None:
    build_tiny_family(tmp_path / "source", "roberta")
    change_json(tmp_path / "source" / "config.json", is_decoder=True)
    prepare(tmp_path / "source", "none", tmp_path)
