"""The adapter as a vector: layout, initial value, and PEFT's files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from app.config import RunConfig
from app.site.base_model import BaseModel, find, get_adapter, load_with_lora
from app.wire.adapter import Layout, Vector, initial_adapter, save_peft
from supernode.quantise import prepare_model
from tests.samples import run_config
from tests.tiny_model import build_tiny_model

LINEAR = {
    f"model.layers.{i}.{name}": shape
    for i in range(12)  # past 9: sorted as text, layer 10 stands before layer 2
    for name, shape in (
        ("self_attn.q_proj", [6, 4]),
        ("self_attn.v_proj", [2, 4]),
        ("mlp.up_proj", [8, 4]),
    )
} | {"lm_head": [10, 4]}


def layout_of(linear: dict[str, list[int]], **changes: object) -> Layout:
    return Layout.of(linear, run_config(**{"lora_r": 2, **changes}))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    size = st.integers(1, 5)
    shapes = draw(st.lists(st.tuples(size, size), min_size=1, max_size=13))
    linear = {f"layers.{i}.q_proj": list(shape) for i, shape in enumerate(shapes)}
    return layout_of(linear, target_modules="q_proj", lora_r=draw(st.integers(1, 4)))


@settings(max_examples=60)
@given(layouts(), st.integers(0, 2**32))
def test_a_vector_split_and_joined_in_any_order_is_the_same_vector(
    layout: Layout, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(layout.size).astype(np.float32)
    arrays = layout.split(vector)
    assert {n: a.shape for n, a in arrays.items()} == dict(
        zip(layout.names, layout.shapes, strict=True)
    )
    shuffled = [layout.names[i] for i in rng.permutation(len(layout.names))]
    joined = layout.join({n: arrays[n].copy() for n in shuffled})
    assert joined.dtype == np.float32
    assert joined.tobytes() == vector.tobytes()


def test_every_parameter_has_exactly_one_place() -> None:
    layout = layout_of(LINEAR)
    arrays = layout.split(np.arange(layout.size, dtype=np.float32))
    together = np.concatenate([a.ravel() for a in arrays.values()])
    assert sorted(together.tolist()) == list(range(layout.size))


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_vector_of_another_length_is_refused(wrong: int) -> None:
    layout = layout_of(LINEAR)
    with pytest.raises(ValueError, match=str(layout.size)):
        layout.split(np.zeros(layout.size + wrong, np.float32))


def test_missing_and_surplus_arrays_are_refused() -> None:
    layout = layout_of(LINEAR)
    arrays = layout.split(np.zeros(layout.size, np.float32))
    surplus = {**arrays, "base_model.model.other": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match="other"):
        layout.join(surplus)
    first = layout.names[0]
    with pytest.raises(ValueError, match=first.replace(".", r"\.")):
        layout.join({n: a for n, a in arrays.items() if n != first})


@settings(max_examples=60)
@given(layouts(), st.data())
def test_the_hash_changes_with_a_name_an_order_and_a_shape(
    layout: Layout, data: st.DataObject
) -> None:
    assert Layout(tuple(layout.names), tuple(layout.shapes)).hash == layout.hash
    at = data.draw(st.integers(0, len(layout.names) - 1))
    names, shapes = list(layout.names), list(layout.shapes)
    names[at] += "x"
    assert replace(layout, names=tuple(names)).hash != layout.hash
    shapes[at] = (shapes[at][0], shapes[at][1] + 1)
    assert replace(layout, shapes=tuple(shapes)).hash != layout.hash
    turned = Layout(layout.names[1:] + layout.names[:1], layout.shapes[1:] + layout.shapes[:1])
    assert turned.hash != layout.hash


def test_the_layout_follows_the_models_order_not_the_alphabet() -> None:
    layout = layout_of(LINEAR, target_modules="v_proj,q_proj")
    numbers = [int(n.split(".layers.")[1].split(".")[0]) for n in layout.names]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 11
    assert len(layout.names) == 12 * 2 * 2
    assert all(".q_proj." in n or ".v_proj." in n for n in layout.names)


def test_all_linear_takes_every_layer_but_the_output_head() -> None:
    layout = layout_of(LINEAR, target_modules="all-linear")
    assert len(layout.names) == 2 * (len(LINEAR) - 1)
    assert not any("lm_head" in n for n in layout.names)


@pytest.mark.parametrize("target", ["k_proj", "proj", "q_proj,K_PROJ", "q_proj,", "model"])
def test_a_target_that_is_no_linear_layer_is_named_with_those_that_are(target: str) -> None:
    with pytest.raises(ValueError, match="target-modules") as caught:
        layout_of(LINEAR, target_modules=target)
    message = str(caught.value)
    assert repr(target.split(",")[-1]) in message
    assert "q_proj" in message
    assert "up_proj" in message


@settings(max_examples=40)
@given(layouts(), st.integers(0, 2**63))
def test_the_initial_adapter_is_a_function_of_the_seed_with_b_zero_and_a_in_bounds(
    layout: Layout, seed: int
) -> None:
    vector = initial_adapter(layout, seed)
    assert vector.dtype == np.float32
    assert vector.tobytes() == initial_adapter(layout, seed).tobytes()
    for name, array in layout.split(vector).items():
        if ".lora_B." in name:
            assert not array.any()
        else:
            bound = np.float32(array.shape[1] ** -0.5)
            assert np.abs(array).max() <= bound
            assert array.any()


def test_another_seed_gives_another_initial_adapter() -> None:
    layout = layout_of(LINEAR)
    assert (initial_adapter(layout, 1) != initial_adapter(layout, 2)).any()


def test_the_initial_a_is_spread_evenly_over_its_bounds() -> None:
    layout = layout_of({"layers.0.q_proj": [4, 400]}, target_modules="q_proj", lora_r=50)
    a = layout.split(initial_adapter(layout, 7))[layout.names[0]] * 20  # times sqrt(400)
    assert np.abs(a).max() > 0.99
    assert abs(a.mean()) < 0.02
    assert a.std() == pytest.approx(1 / np.sqrt(3), rel=0.02)


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("deep")
    build_tiny_model(folder / "deep", layers=12)
    prepare_model(folder / "models", folder / "cache", str(folder / "deep"), "none", None)
    return find(folder / "models", str(folder / "deep"), 0)


def _random(layout: Layout) -> Vector:
    return np.random.default_rng(3).standard_normal(layout.size, np.float32)


def _config(base: BaseModel, targets: str) -> RunConfig:
    return run_config(
        model_name=base.name, quantization=0, lora_r=3, lora_alpha=5, target_modules=targets
    )


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_peft_loads_what_we_save_key_for_key_and_computes_the_same(
    deep_base: BaseModel, tmp_path: Path, targets: str
) -> None:
    config = _config(deep_base, targets)
    layout = Layout.of(deep_base.linear_layers, config)
    vector = _random(layout)
    save_peft(tmp_path, layout, vector, config)

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(deep_base.folder, dtype="float32"), str(tmp_path)
    )
    loaded = get_peft_model_state_dict(theirs)
    wanted = layout.split(vector)
    assert set(loaded) == set(wanted)
    for name, array in wanted.items():
        assert loaded[name].shape == array.shape
        assert (loaded[name].numpy() == array).all()
    settings = theirs.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
    )

    ours, tokenizer = load_with_lora(deep_base, config, "cpu", layout, vector)
    assert get_adapter(ours, layout).tobytes() == vector.tobytes()
    ids = torch.tensor([tokenizer("Which cells make insulin?")["input_ids"]])
    with torch.inference_mode():
        a, b = ours.eval()(ids).logits, theirs.eval()(ids).logits
        plain = theirs.get_base_model()
        with theirs.disable_adapter():
            without = plain(ids).logits
    assert torch.equal(a, b)
    assert not torch.allclose(a, without, atol=1e-3)  # the adapter does something


def test_peft_itself_would_save_the_same_file(deep_base: BaseModel, tmp_path: Path) -> None:
    config = _config(deep_base, "q_proj,v_proj")
    layout = Layout.of(deep_base.linear_layers, config)
    vector = _random(layout)
    (tmp_path / "ours").mkdir()
    save_peft(tmp_path / "ours", layout, vector, config)
    model, _ = load_with_lora(deep_base, config, "cpu", layout, vector)
    model.save_pretrained(str(tmp_path / "theirs"))

    files = [load_file(tmp_path / w / "adapter_model.safetensors") for w in ("ours", "theirs")]
    assert set(files[0]) == set(files[1])
    assert all((files[0][n] == files[1][n]).all() for n in files[1])
    ours, theirs = (
        json.loads((tmp_path / w / "adapter_config.json").read_text()) for w in ("ours", "theirs")
    )
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    for key in ("r", "lora_alpha", "lora_dropout", "peft_type", "task_type", "bias"):
        assert ours[key] == theirs[key]
