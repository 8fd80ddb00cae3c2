"""Passes without padding: what is in them, and that no row sees another, in many kinds of model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    DynamicCache,
)

from app.site.base_model import find, load_with_lora
from app.site.examples import IGNORED, Example, collate, encode_all
from app.site.packing import can_pack, passes
from app.site.partition import Row
from app.site.training import evaluate, train
from app.wire.adapter import Layout, initial_adapter
from supernode.quantise import prepare_model
from tests.samples import ROWS, run_config
from tests.tiny_model import _tokenizer

VOCABULARY, PLENTY = 64, 10_000
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
WINDOW = {"sliding_window": 4}  # shorter than the rows
KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "mistral": WINDOW, "phi3": WINDOW,
    "mixtral": {"num_local_experts": 4},
    "gemma2": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": WINDOW | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "ctrl": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "dff": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bamba": {  # attention, then layers with a state that no mask holds back
        "num_hidden_layers": 4, "attn_layer_indices": [0, 1], "mamba_n_heads": 4,
        "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    },
}  # fmt: skip


def tiny(kind: str, attention: str | None = None) -> Any:
    """A random model of this kind, its layers strong enough to matter, with LoRA that is not 0."""
    config = AutoConfig.for_model(kind, **SHAPE | KINDS[kind])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        return get_peft_model(model, lora)


def loss_and_gradient(
    model: Any, rows: list[Example], tokens: int, packed: bool
) -> tuple[float, torch.Tensor]:
    """Summed over the rows' answer tokens."""
    model.zero_grad()
    total = 0.0
    for one in passes(collate(rows), tokens, packed):
        labels = one.pop("labels")
        loss = cross_entropy(model(**one).logits.float(), labels, reduction="sum")
        torch.autograd.backward(loss)
        total += float(loss.detach())
    gradients = [p.grad.ravel() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(gradients)


def example(ids: list[int], prompt: int = 2) -> Example:
    prompt = min(prompt, len(ids) - 1)
    return Example(ids, [IGNORED] * prompt + ids[prompt:])


FOUR = [example([3 + (7 * n * i) % 60 for i in range(n)]) for n in (9, 14, 5, 11)]
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=20)
SOME_ROWS = st.lists(st.builds(example, IDS, st.integers(1, 6)), min_size=1, max_size=7)


# --- what is in a pass ----------------------------------------------------------------------------


@settings(max_examples=100)
@given(SOME_ROWS, st.integers(1, 90), st.booleans())
def test_the_passes_hold_every_token_once_and_no_more_than_allowed(
    rows: list[Example], tokens: int, packed: bool
) -> None:
    made = list(passes(collate(rows), tokens, packed))
    found = []
    for one in made:
        assert one["use_cache"] is False
        assert ("attention_mask" in one, "position_ids" in one) == (not packed, packed)
        ids, answers, labels = one["input_ids"], one["logits_to_keep"], one["labels"].tolist()
        starts = [0]
        if packed:
            starts = [n for n, p in enumerate(one["position_ids"][0].tolist()) if p == 0]
            ends = [*starts[1:], ids.shape[1]]
            places = [p for a, b in zip(starts, ends, strict=True) for p in range(b - a)]
            assert one["position_ids"].tolist() == [places]
            cut = [(ids[0, a:b], answers[0, a:b]) for a, b in zip(starts, ends, strict=True)]
        else:
            lengths = one["attention_mask"].sum(1).tolist()
            assert ids.shape[1] == max(lengths)
            cut = [(i[:n], a[:n]) for i, a, n in zip(ids, answers, lengths, strict=True)]
            assert int(answers.sum()) == sum(int(a.sum()) for _, a in cut)
        assert ids.numel() <= tokens or len(cut) == 1
        for row, answered in cut:
            picked = answered.nonzero()[:, 0] + 1  # the token after it
            assert [int(row[p]) for p in picked] == labels[: len(picked)]
            labels = labels[len(picked) :]
            found.append((row.tolist(), picked.tolist()))
        assert labels == []
    expected = [
        (e.input_ids, [p for p in range(1, len(e.labels)) if e.labels[p] != IGNORED]) for e in rows
    ]
    assert sorted(found) == sorted(expected)


@settings(max_examples=50)
@given(SOME_ROWS)
def test_one_pass_is_what_transformers_own_collator_makes(rows: list[Example]) -> None:
    rows = sorted(rows, key=lambda e: -len(e.input_ids))
    (one,) = passes(collate(rows), PLENTY, True)
    theirs = DataCollatorWithFlattening()([vars(e) for e in rows])
    assert torch.equal(one["input_ids"], theirs["input_ids"])
    assert torch.equal(one["position_ids"], theirs["position_ids"])
    following = theirs["labels"][:, 1:]
    assert torch.equal(one["labels"], following[following != IGNORED])
    assert torch.equal(one["logits_to_keep"][:, :-1], following != IGNORED)
    assert not one["logits_to_keep"][0, -1]


# --- rows are strangers ---------------------------------------------------------------------------

FLASH = pytest.param("flash_attention_2", marks=pytest.mark.gpu)


@pytest.mark.parametrize("attention", ["eager", "sdpa", FLASH])
def test_a_rows_gradient_is_the_same_whoever_its_neighbours_are(attention: str) -> None:
    model, close = tiny("llama", attention), 1e-5
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
        model, close = model.to("cuda", torch.bfloat16), 0.02
    model.train()
    place = model.device

    def gradient(*rows: Example) -> torch.Tensor:
        batch = {n: v.to(place) for n, v in collate(list(rows)).items()}
        (one,) = passes(batch, PLENTY, True)
        labels = one.pop("labels")
        model.zero_grad()
        torch.autograd.backward(cross_entropy(model(**one).logits.float(), labels, reduction="sum"))
        return torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None]).float()

    def silent(row: Example) -> Example:
        return Example(row.input_ids, [IGNORED] * len(row.labels))

    alone = gradient(FOUR[0])
    for neighbours in ([FOUR[1]], FOUR[1:], [example([5] * 30)]):
        beside = gradient(FOUR[0], *map(silent, neighbours))
        assert (beside - alone).norm() < close * alone.norm()


@pytest.mark.parametrize("wrong", ["a cache", "a mask of ones"])
def test_the_check_sees_what_would_let_rows_see_each_other(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The two ways in which Transformers forgets about packing, and says nothing."""
    model = tiny("llama")
    layers = model.get_base_model().model
    real = layers.forward

    def forward(**given: Any) -> Any:
        if wrong == "a cache":
            given |= {"use_cache": True, "past_key_values": DynamicCache(config=layers.config)}
        else:
            given["attention_mask"] = torch.ones(given["position_ids"].shape, dtype=torch.long)
        return real(**given)

    monkeypatch.setattr(layers, "forward", forward)
    with caplog.at_level(logging.INFO):
        assert not can_pack(model)
        assert not can_pack(model)  # and says so once
    assert caplog.messages == [
        "LlamaForCausalLM has attention that does not stop where a row ends: its batches are padded"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_model_can_pack_loss_and_gradients_are_the_padded_ones(kind: str) -> None:
    model = tiny(kind)
    model.eval()
    assert can_pack(model) == (kind not in ("gemma2", "opt", "bamba"))
    assert not model.training
    loss, exact = loss_and_gradient(model, FOUR, PLENTY, False)
    for tokens in (1, 20, PLENTY):
        ours, gradient = loss_and_gradient(model, FOUR, tokens, can_pack(model))
        assert ours == pytest.approx(loss, rel=1e-5)
        assert (gradient - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("training", [True, False])
def test_asking_a_model_leaves_it_as_it_was_and_draws_no_random_number(training: bool) -> None:
    model = tiny("bamba").train(training)
    before = [(n, id(m), m.training) for n, m in model.named_modules()]
    state = torch.random.get_rng_state()
    can_pack(model)
    assert [(n, id(m), m.training) for n, m in model.named_modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


MODEL: list[Any] = []


@settings(max_examples=40)
@given(SOME_ROWS, st.integers(1, 90), st.booleans())
def test_no_cap_and_no_packing_changes_loss_or_gradients(
    rows: list[Example], tokens: int, packed: bool
) -> None:
    if not MODEL:
        MODEL.append(tiny("llama"))
    loss, exact = loss_and_gradient(MODEL[0], rows, PLENTY, False)
    ours, gradient = loss_and_gradient(MODEL[0], rows, tokens, packed)
    assert ours == pytest.approx(loss, rel=1e-5)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()


# --- models that cannot ---------------------------------------------------------------------------


def test_a_model_without_position_ids_is_padded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    layers = model.get_base_model().model

    def forward(inputs_embeds: Any, use_cache: bool) -> Any:
        raise AssertionError

    monkeypatch.setattr(layers, "forward", forward)
    with caplog.at_level(logging.INFO):
        assert not can_pack(model)
    assert "LlamaForCausalLM has no position ids: its batches are padded" in caplog.text


def test_gemma_2_has_no_sdpa_and_trains_padded_with_eager_attention(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = _tokenizer()
    shape = SHAPE | KINDS["gemma2"] | {"hidden_size": 64, "vocab_size": len(tokenizer)}
    source = tmp_path / "gemma"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **shape | {
        "max_position_embeddings": 512, "intermediate_size": 128, "head_dim": 16,
    })).save_pretrained(source)  # fmt: skip
    tokenizer.save_pretrained(source)
    prepare_model(tmp_path / "models", tmp_path / "cache", str(source), "nf4", None)
    config = run_config(
        model_name=str(source), quantization=4, batch_size=8, max_steps=8, lora_dropout=0.0,
        gradient_checkpointing=True,
    )  # fmt: skip
    base = find(tmp_path / "models", str(source), 4)
    layout = Layout.of(base.linear_layers, config)
    start = initial_adapter(layout, 1)
    model, tokenizer = load_with_lora(base, config, "cpu", layout, start)
    assert model.get_base_model().config._attn_implementation == "eager"
    examples = encode_all([Row(r["input"], r["output"]) for r in ROWS], tokenizer, 512)
    with caplog.at_level(logging.INFO):
        trained = train(model, examples, config, 1e-2, 1)
    said = [m for m in caplog.messages if "padded" in m]
    assert said == ["Gemma2ForCausalLM has only eager attention: its batches are padded"]
    judge, _ = load_with_lora(base, config, "cpu", layout, start)
    before = evaluate(judge, examples, config)
    assert trained.steps == 8
    assert trained.loss < before.loss_sum / before.num_tokens
