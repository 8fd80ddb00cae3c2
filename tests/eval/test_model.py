"""The base model in every precision, and adapters that leave it as they found it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from app.server.checkpoint import sha256
from app.site.partition import SiteError
from app.wire.adapter import Layout, Vector, initial_adapter, save_peft
from eval import EvalError
from eval.benchmarks import Question, wrap
from eval.inference import Inference
from eval.model import (
    KINDS,
    Adapter,
    Base,
    attached,
    base_model_name,
    check,
    load_base,
)
from supernode.quantise import prepare_model
from supernode.source import fingerprints
from tests.samples import ROWS, run_config
from tests.tiny_model import build_tiny_family

HUB_ID = "org/tiny"
CONFIG = run_config(lora_r=4, lora_alpha=8, target_modules="q_proj,v_proj", model_name=HUB_ID)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
V1 = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def load(name: Path | str, quantization: str, folder: Path) -> Base:
    """From ``folder``/models (prepared) or ``folder``/cache, on the CPU."""
    return load_base(str(name), quantization, "cpu", folder / "models", folder / "cache")


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """For a few questions one after the other."""
    with torch.inference_mode():
        prompts = (tokenizer.encode(wrap(row["input"])) for row in ROWS[:4])
        return torch.cat([model(torch.tensor([ids])).logits[0, -1:] for ids in prompts])


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").eval()


@pytest.fixture(scope="module")
def bases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The tiny model in any precision, each loaded once."""
    folder = tmp_path_factory.mktemp("bases")
    loaded: dict[str, Base] = {}

    def get(quantization: str) -> Base:
        if quantization not in loaded:
            loaded[quantization] = load(tiny_model, quantization, folder)
        return loaded[quantization]

    return get


@pytest.fixture(scope="module")
def base(bases: Callable[[str], Base]) -> Base:
    return bases("0")


@pytest.fixture(scope="module")
def prepared_folder(
    tiny_model: Path, models_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A site's volumes: models/ has the tiny model in all kinds under a hub id; no cache."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(models_dir, folder / "models")
    prepare_model(folder / "models", folder / "unused", str(tiny_model), "fp4", None)
    for path in (folder / "models").glob("*/base.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": HUB_ID}))
    return folder


@pytest.mark.parametrize("quantization", KINDS)
def test_the_models_own_folder_is_loaded_in_every_precision(
    bases: Callable[[str], Base], source: Any, tiny_model: Path, quantization: str
) -> None:
    base = bases(quantization)
    own, original = weights(base.model), weights(source)
    assert own.keys() == original.keys()
    assert {p.dtype for p in own.values()} == {torch.float32}
    changed = {name for name, p in own.items() if not torch.equal(p, original[name])}
    if quantization == "0":
        assert not changed
    else:  # every linear layer but the head, and nothing else
        layers = {n for n in own if "_proj" in n}
        assert changed == layers
        for name in layers:
            error = (own[name] - original[name]).norm() / original[name].norm()
            assert error < (0.02 if quantization == "8" else 0.2)
    assert not base.model.training
    assert base.facts["quantization"] == quantization
    assert base.facts["compute_dtype"] == "float32"
    assert base.facts["fingerprint"] == fingerprints(tiny_model)[KINDS[quantization]]
    assert base.tokenizer.encode("A")[0] == base.tokenizer.bos_token_id


def test_four_bits_are_sixteen_values_a_block(bases: Callable[[str], Base]) -> None:
    row = weights(bases("4").model)["model.layers.0.self_attn.q_proj.weight"][0]  # one block
    assert 2 < len(set(row.tolist())) <= 16
    row = weights(bases("0").model)["model.layers.0.self_attn.q_proj.weight"][0]
    assert len(set(row.tolist())) > 50


def test_the_precisions_answer_differently(bases: Callable[[str], Base]) -> None:
    found = [logits(bases(q).model, bases(q).tokenizer) for q in KINDS]
    for n, one in enumerate(found):
        assert torch.isfinite(one).all()
        assert all(not torch.equal(one, other) for other in found[:n])


@pytest.mark.parametrize("quantization", KINDS)
def test_a_prepared_model_is_the_same_as_one_quantised_on_load(
    prepared_folder: Path, bases: Callable[[str], Base], tiny_model: Path, quantization: str
) -> None:
    prepared, own = load(HUB_ID, quantization, prepared_folder), bases(quantization)
    there, here = weights(prepared.model), weights(own.model)
    assert there.keys() == here.keys()
    for name, p in there.items():
        assert p.dtype == torch.float32
        assert torch.allclose(p, here[name], rtol=0, atol=1e-6), name
    assert prepared.linear_layers == own.linear_layers
    kind = KINDS[quantization]
    assert prepared.fingerprints == {fingerprints(tiny_model)[kind]}
    assert prepared.facts["fingerprint"] == own.facts["fingerprint"]
    assert (prepared.name, prepared.facts["kind"]) == (HUB_ID, kind)


def test_the_linear_layers_do_not_depend_on_the_precision(bases: Callable[[str], Base]) -> None:
    assert len({json.dumps(bases(q).linear_layers) for q in KINDS}) == 1
    assert bases("4").linear_layers["model.layers.1.self_attn.v_proj"] == [32, 64]
    assert len(bases("4").linear_layers) == 2 * 7 + 1


def test_a_prepared_file_cut_short_is_noticed(prepared_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared_folder, tmp_path / "site")
    (path,) = (tmp_path / "site" / "models").glob("*-nf4/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SiteError, match=r"model\.safetensors"):
        load(HUB_ID, "nf4-bf16", tmp_path / "site")
    load(HUB_ID, "0", tmp_path / "site")  # another folder, untouched


def test_what_prepare_took_from_the_hub_is_used_for_other_precisions(
    tiny_model: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "cache" / "org--tiny"
    shutil.copytree(tiny_model, kept)
    (kept / "complete").touch()
    base = load(HUB_ID, "4", tmp_path)
    assert base.facts["fingerprint"] == fingerprints(tiny_model)["fp4"]


def test_the_fingerprints_are_those_that_prepare_would_record(
    tiny_model: Path, models_dir: Path, base: Base
) -> None:
    recorded = [json.loads(p.read_text()) for p in models_dir.glob("*/base.json")]
    assert len(recorded) == 3
    assert {b["fingerprint"] for b in recorded} < base.fingerprints
    assert base.fingerprints == set(fingerprints(tiny_model).values())


@pytest.mark.parametrize("name", [HUB_ID, "/no/such/folder", "tiny"])
def test_an_unknown_base_model_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(EvalError, match=r"supernode\.prepare") as caught:
        load(name, "4", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (name, "--quantization 4", str(tmp_path / "models")))
    says = "the hub has no such names, only" if name[0] == "/" else "HF_HUB_OFFLINE forbids to ask"
    assert f", and {says}" in message


def test_what_the_hubs_cache_holds_is_loaded_where_nobody_can_be_asked(
    tiny_model: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "cache" / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(tiny_model, kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    assert load(HUB_ID, "0", tmp_path).fingerprints == set(fingerprints(tiny_model).values())


def test_a_source_without_safetensors_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EvalError, match=r"holds no \.safetensors file") as caught:
        load(folder, "4", tmp_path)
    assert str(folder) in str(caught.value)


def test_weights_that_only_a_pickle_holds_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    torch.save({n: torch.from_numpy(w) for n, w in weights.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(EvalError, match=r"model\.safetensors"):
        load(folder, "0", tmp_path)


def test_weights_of_another_shape_than_the_config_says_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"hidden_size": 64', '"hidden_size": 128'))
    with pytest.raises(EvalError, match="have 21 arrays of another shape than"):
        load(folder, "0", tmp_path)


def test_a_quantised_source_is_refused(models_dir: Path, tmp_path: Path) -> None:
    (folder,) = models_dir.glob("*-nf4")
    with pytest.raises(EvalError, match="quantised already"):
        load(folder, "4", tmp_path)


def test_quantised_weights_from_the_hub_are_refused_too(models_dir: Path, tmp_path: Path) -> None:
    """They would be scored as another precision than the one asked for."""
    (folder,) = models_dir.glob("*-nf4")
    kept = shutil.copytree(folder, tmp_path / "cache" / "org--tiny")
    (kept / "complete").touch()
    with pytest.raises(EvalError, match="quantised already"):
        load(HUB_ID, "4", tmp_path)


@pytest.mark.parametrize(
    "config", [None, "{", "{}", '{"model_type": "vit"}', '{"model_type": "no such model"}']
)
def test_a_source_that_is_no_causal_model_is_refused(
    tiny_model: Path, tmp_path: Path, config: str | None
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "config.json").unlink()
    if config:
        (folder / "config.json").write_text(config)
    with pytest.raises(EvalError, match=r"model"):
        load(folder, "0", tmp_path)


def test_source_weights_cut_short_are_an_eval_error(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(EvalError, match=r"model"):
        load(folder, "0", tmp_path)


def lacking(folder: Path) -> str:
    arrays = load_file(folder / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        del arrays[name]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return "its weights lack 2 of the model's arrays, the first is model.layers.1.mlp.up_proj"


def of_two_models(folder: Path) -> str:
    arrays = load_file(folder / "model.safetensors")
    arrays["model.layers.2.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return "its weights have 1 arrays that the model has not, the first is model.layers.2.mlp.up"


def a_pointer(folder: Path) -> str:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    return "model.safetensors is a Git LFS pointer, not the file; run git lfs pull there"


@pytest.mark.parametrize("quantization", ["0", "4"])
@pytest.mark.parametrize("damage", [lacking, of_two_models, a_pointer])
def test_no_made_up_weights_are_scored(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], str], quantization: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    said = damage(folder)
    with pytest.raises(EvalError) as caught:
        load(folder, quantization, tmp_path)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gemma2", "bloom", "gpt2"])
def test_a_model_of_another_family_answers_and_takes_its_adapter(tmp_path: Path, kind: str) -> None:
    """Without SDPA (gemma2, bloom), or with transposed weights (gpt2)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    build_tiny_family(tmp_path / "model", kind)
    base = load(tmp_path / "model", "0", tmp_path)
    config = run_config(lora_r=4, lora_alpha=8, target_modules="all-linear")
    own = logits(base.model, base.tokenizer)
    adapter = random_adapter(base, tmp_path / "a", config=config)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    peft = PeftModel.from_pretrained(plain, str(adapter.folder)).eval()
    questions = [Question(row["input"], "A") for row in ROWS]
    with attached(adapter, base) as model:
        changed = logits(model, base.tokenizer)
        answers = dict(Inference(model, base.tokenizer, 4).answers(questions, ["A", "B"], {}))
    assert torch.equal(changed, logits(peft, base.tokenizer))
    assert not torch.allclose(own, changed, atol=1e-3)
    assert torch.equal(logits(base.model, base.tokenizer), own)
    for index, question in enumerate(questions):
        ids = torch.tensor([base.tokenizer.encode(wrap(question.prompt))])
        with torch.inference_mode():
            alone = int(peft(ids).logits[0, -1].argmax())
        assert answers[index].output == base.tokenizer.decode([alone], skip_special_tokens=True)


def random_adapter(
    base: Base, folder: Path, seed: int = 1, config: Any = CONFIG, **facts: Any
) -> Adapter:
    """A PEFT folder as a run writes it, all arrays random."""
    layout = Layout.of(base.linear_layers, config)
    vector: Vector = initial_adapter(layout, seed)
    vector += np.random.default_rng(seed).normal(0, 0.1, vector.shape).astype(np.float32)
    folder.mkdir(parents=True)
    save_peft(folder, layout, vector, config)
    return Adapter(folder, "fl", **facts)


def rewrite(adapter: Adapter, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the arrays of the adapter's file."""
    arrays = load_file(adapter.weights)
    change(arrays)
    save_file(arrays, adapter.weights, {"format": "pt"})


def change_config(adapter: Adapter, **changes: object) -> None:
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("quantization", KINDS)
def test_an_adapter_changes_the_logits_and_leaves_no_trace(
    bases: Callable[[str], Base], tmp_path: Path, quantization: str
) -> None:
    base = bases(quantization)
    before, own = logits(base.model, base.tokenizer), weights(base.model)
    seen: list[torch.Tensor] = []
    for seed in (1, 2, 1):
        adapter = random_adapter(base, tmp_path / f"{len(seen)}", seed)
        with attached(adapter, base) as model:
            assert not model.training
            seen.append(logits(model, base.tokenizer))
        assert torch.equal(logits(base.model, base.tokenizer), before)
    assert torch.equal(seen[0], seen[2])
    for one, other in ((seen[0], before), (seen[1], before), (seen[0], seen[1])):
        assert float((one - other).abs().max()) > 0.01
    after = weights(base.model)
    assert after.keys() == own.keys()
    assert all(torch.equal(p, own[name]) for name, p in after.items())


def test_an_exception_inside_leaves_no_trace_either(base: Base, tmp_path: Path) -> None:
    before, own = logits(base.model, base.tokenizer), weights(base.model)
    for n, error in enumerate((KeyboardInterrupt, EvalError)):
        with pytest.raises(error), attached(random_adapter(base, tmp_path / f"{n}"), base):
            raise error
        assert torch.equal(logits(base.model, base.tokenizer), before)
        assert weights(base.model).keys() == own.keys()


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_pefts_own_loading_gives_the_same_logits(
    base: Base, tiny_model: Path, tmp_path: Path, targets: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = run_config(lora_r=4, lora_alpha=8, target_modules=targets, model_name=HUB_ID)
    adapter = random_adapter(base, tmp_path / "a", config=config)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    peft = PeftModel.from_pretrained(plain, str(adapter.folder)).eval()
    with attached(adapter, base) as model:
        here = logits(model, base.tokenizer)
    assert torch.equal(here, logits(peft, base.tokenizer))


def test_the_adapter_is_what_lora_says(base: Base, tmp_path: Path) -> None:
    """W + alpha/r B A, computed by hand."""
    adapter = random_adapter(base, tmp_path / "a")
    arrays = {n: torch.from_numpy(a) for n, a in load_file(adapter.weights).items()}
    with attached(adapter, base) as model:
        here = logits(model, base.tokenizer)
    own = {name: p.clone() for name, p in base.model.named_parameters()}
    try:
        with torch.no_grad():
            for name, p in base.model.named_parameters():
                a = f"base_model.model.{name.removesuffix('weight')}lora_A.weight"
                if a in arrays:
                    p += 8 / 4 * arrays[a.replace("lora_A", "lora_B")] @ arrays[a]
        by_hand = logits(base.model, base.tokenizer)
    finally:
        with torch.no_grad():
            for name, p in base.model.named_parameters():
                p.copy_(own[name])
    assert torch.allclose(here, by_hand, atol=1e-3)
    assert not torch.allclose(here, logits(base.model, base.tokenizer), atol=1e-2)


@pytest.mark.parametrize("fault", ["another rank", "an array is missing", "no such type", "no r"])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_what_peft_does_not_take_is_an_eval_error_and_leaves_no_trace(
    tiny_model: Path, tmp_path: Path, fault: str
) -> None:
    base = load(tiny_model, "0", tmp_path)
    before, own = logits(base.model, base.tokenizer), weights(base.model)
    adapter = random_adapter(base, tmp_path / "a")
    if fault == "another rank":
        change_config(adapter, r=8)
    elif fault == "an array is missing":
        rewrite(adapter, lambda arrays: arrays.pop(Q0))
    elif fault == "no such type":
        change_config(adapter, peft_type="NONE_SUCH")
    else:
        change_config(adapter, r="four")

    def use() -> None:
        with attached(adapter, base):
            pass

    with pytest.raises(EvalError) as caught:
        use()
    message = str(caught.value)
    assert str(adapter.folder) in message
    assert "\n" not in message
    assert torch.equal(logits(base.model, base.tokenizer), before)
    assert weights(base.model).keys() == own.keys()
    with attached(random_adapter(base, tmp_path / "sound"), base) as model:
        assert not torch.equal(logits(model, base.tokenizer), before)


def refused(adapter: Adapter, base: Base) -> str:
    with pytest.raises(EvalError) as caught:
        check(adapter, base)
    message = str(caught.value)
    assert str(adapter.folder) in message
    assert "\n" not in message
    return message


def test_a_sound_adapter_is_taken(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(random_adapter(base, tmp_path / "a"), base)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_weights_cut_short_are_named(base: Base, tmp_path: Path, kept: int) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    adapter.weights.write_bytes(adapter.weights.read_bytes()[:kept])
    assert "adapter_model.safetensors is damaged or cut short" in refused(adapter, base)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_an_adapter_of_another_precision_is_taken(base: Base, tmp_path: Path, dtype: str) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    arrays = load_file(adapter.weights)
    save_file({n: a.astype(dtype) for n, a in arrays.items()}, adapter.weights)
    with attached(adapter, base) as model:
        side = next(p for n, p in model.named_parameters() if ".q_proj.lora_B" in n)
        wanted = next(a for n, a in arrays.items() if ".q_proj.lora_B" in n)
        np.testing.assert_allclose(side.detach().float().numpy(), wanted, atol=1e-3)


def test_what_holds_no_adapters_numbers_is_told_as_what_it_is(base: Base, tmp_path: Path) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    arrays = load_file(adapter.weights)
    save_file({n: (a * 100).astype(np.int8) for n, a in arrays.items()}, adapter.weights)
    assert f"{len(arrays)} weights are whole numbers" in refused(adapter, base)
    adapter.weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "is a Git LFS pointer, not the file" in refused(adapter, base)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(base: Base, tmp_path: Path, file: str) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    (adapter.folder / file).unlink()
    assert file in refused(adapter, base)


def test_a_missing_folder_is_named(base: Base, tmp_path: Path) -> None:
    assert "no adapter in" in refused(Adapter(tmp_path / "gone", "fl"), base)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '"x"', '{"base_model_name_or_path": null}', "\udcff"]
)
def test_a_broken_config_names_no_base_model(base: Base, tmp_path: Path, text: str) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    path = adapter.folder / "adapter_config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(EvalError, match=r"adapter_config\.json|base_model_name_or_path") as caught:
        base_model_name(adapter)
    assert str(path) in str(caught.value)


def test_the_base_model_is_the_one_the_adapter_names(base: Base, tmp_path: Path) -> None:
    assert base_model_name(random_adapter(base, tmp_path / "a")) == HUB_ID


@pytest.mark.parametrize(
    ("name", "shape"),
    [(Q0, (4, 65)), (Q0, (4,)), (Q0, ()), (V1, (33, 4)), (V1, (64, 4)), (V1, (32,))],
)
def test_an_array_of_another_shape_is_named(
    base: Base, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    rewrite(adapter, lambda arrays: arrays.update({name: np.zeros(shape, np.float32)}))
    message = refused(adapter, base)
    assert name in message
    assert str(list(shape)) in message


@pytest.mark.parametrize(
    "name",
    [
        Q0.replace("layers.0", "layers.2"),
        Q0.replace("q_proj", "query"),
        Q0.replace("base_model.model.model", "base_model.model"),
    ],
)
def test_an_array_of_an_unknown_layer_is_named(base: Base, tmp_path: Path, name: str) -> None:
    adapter = random_adapter(base, tmp_path / "a")
    rewrite(adapter, lambda arrays: arrays.update({name: arrays[Q0]}))
    assert name in refused(adapter, base)


def test_an_adapter_that_names_a_mirror_is_taken_with_a_note(
    base: Base, prepared_folder: Path, tmp_path: Path
) -> None:
    """Fingerprint and shapes tell whether it fits; a name tells who copied the weights."""
    hub = load(f"{HUB_ID}/", "0", prepared_folder)
    adapter = random_adapter(hub, tmp_path / "a")
    assert check(adapter, hub) == ""
    change_config(adapter, base_model_name_or_path=f"{HUB_ID}/")  # the same name, typed otherwise
    assert check(adapter, hub) == ""
    change_config(adapter, base_model_name_or_path="org/other")
    said = "fl is an adapter of org/other, scored on org/tiny: "
    assert check(adapter, hub) == f"{said}its arrays fit, no more is known."
    known = Adapter(adapter.folder, "fl", fingerprint=hub.facts["fingerprint"])
    assert check(known, hub) == f"{said}the weights are the same."
    with attached(adapter, hub) as model:
        assert not torch.equal(logits(model, hub.tokenizer), logits(base.model, base.tokenizer))
    assert check(adapter, base) == ""  # a path says nothing of its model's name
    change_config(adapter, base_model_name_or_path="/somebody/elses/folder")
    assert check(adapter, hub) == ""
    rewrite(adapter, lambda arrays: arrays.update({V1: np.zeros((64, 4), np.float32)}))
    change_config(adapter, base_model_name_or_path="org/other")
    assert "the adapter is of another base model" in refused(adapter, hub)


def test_the_fingerprint_of_any_precision_of_these_weights_is_taken(
    base: Base, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("nf4", "fp4", "int8", "none"):
        mark = fingerprints(tiny_model)[kind]
        check(random_adapter(base, tmp_path / kind, fingerprint=mark), base)
    assert capsys.readouterr().err == ""


def test_another_fingerprint_is_refused_with_both(base: Base, tmp_path: Path) -> None:
    message = refused(random_adapter(base, tmp_path / "a", fingerprint="0123456789abcdef"), base)
    assert "0123456789abcdef" in message
    assert all(mark in message for mark in base.fingerprints)


def test_a_prepared_model_knows_one_fingerprint_and_says_so(
    prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = load(HUB_ID, "0", prepared_folder)
    capsys.readouterr()
    (own,) = hub.fingerprints
    check(random_adapter(hub, tmp_path / "a", fingerprint=own), hub)
    assert capsys.readouterr().err == ""
    check(random_adapter(hub, tmp_path / "b", fingerprint="0123456789abcdef"), hub)
    said = capsys.readouterr().err
    assert said.startswith("eval: cannot compare base models: ")
    assert "0123456789abcdef" in said
    assert own in said


def test_the_sha256_is_that_of_the_weights_file(base: Base, tmp_path: Path) -> None:
    import hashlib

    adapter = random_adapter(base, tmp_path / "a")
    assert sha256(adapter.folder) == hashlib.sha256(adapter.weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("quantization", KINDS)
def test_weights_stored_in_bfloat16_are_computed_in_what_was_asked_for(
    tiny_model: Path, tmp_path: Path, quantization: str
) -> None:
    """As hub models are stored; a prepared copy must not keep their type, nor their rounding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype="bfloat16").save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(half)
    prepare_model(tmp_path / "models", tmp_path, str(half), KINDS[quantization], None)
    for path in (tmp_path / "models").glob("*/base.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": HUB_ID}))
    prepared, own = load(HUB_ID, quantization, tmp_path), load(half, quantization, tmp_path)
    there, here = weights(prepared.model), weights(own.model)
    assert {p.dtype for p in (*there.values(), *here.values())} == {torch.float32}
    for name, p in there.items():
        assert torch.allclose(p, here[name], rtol=0, atol=1e-6), name
    assert torch.isfinite(logits(prepared.model, prepared.tokenizer)).all()
