"""Local training with the real Trainer on the tiny model, on the CPU."""

import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Trainer

from app.config import RunConfig
from app.server.guards import Change, _expected
from app.site import base_model, memory, training
from app.site.base_model import find, get_adapter, load_with_lora, set_adapter
from app.site.examples import IGNORED, Example, collate, encode_all
from app.site.packing import can_pack, passes
from app.site.partition import Row
from app.site.training import Trained, _InPasses, _Proximal, evaluate, settled, train
from app.wire.adapter import Layout, Vector, initial_adapter
from supernode.quantise import prepare_model
from tests.samples import ROWS, run_config
from tests.tiny_model import VOCABULARY

LR = 1e-2
BITS = pytest.mark.parametrize("bits", [0, 4], ids=["unquantised", "nf4"])


@dataclass(frozen=True)
class Site:
    model: Any
    examples: list[Example]
    layout: Layout
    config: RunConfig

    @property
    def adapter(self) -> Vector:
        return get_adapter(self.model, self.layout)

    def train(self, lr: float = LR, seed: int = 1) -> Trained:
        return train(self.model, self.examples, self.config, lr, seed)


def site(
    models_dir: Path, tiny_model: Path, bits: int = 0, rows: int = len(ROWS), **changes: object
) -> Site:
    settings: dict[str, object] = {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "batch_size": 4,
        "max_steps": 3,
        "gradient_checkpointing": False,
    }
    config = run_config(model_name=str(tiny_model), quantization=bits, **settings | changes)
    base = find(models_dir, str(tiny_model), bits)
    layout = Layout.of(base.linear_layers, config)
    start = initial_adapter(layout, config.seed)
    model, tokenizer = load_with_lora(base, config, "cpu", layout, start)
    chosen = [Row(r["input"], r["output"]) for r in ROWS[:rows]]
    return Site(model, encode_all(chosen, tokenizer, config.seq_length), layout, config)


@BITS
def test_training_lowers_the_loss_on_its_rows(
    models_dir: Path, tiny_model: Path, bits: int
) -> None:
    # A model each, as in a run: bitsandbytes on a CPU cannot train what it has evaluated.
    learner, judge, judge_after = (
        site(models_dir, tiny_model, bits, max_steps=15) for _ in range(3)
    )
    before = evaluate(judge.model, judge.examples, judge.config)
    trained = learner.train()
    set_adapter(judge_after.model, learner.layout, learner.adapter)
    after = evaluate(judge_after.model, judge_after.examples, judge.config)
    assert after.num_tokens == before.num_tokens
    assert after.loss_sum < before.loss_sum * 0.95
    # The mean over the steps lies between where it began and where it ended.
    assert after.loss_sum / after.num_tokens < trained.loss < before.loss_sum / before.num_tokens


@BITS
def test_only_the_adapter_changes(models_dir: Path, tiny_model: Path, bits: int) -> None:
    s = site(models_dir, tiny_model, bits)
    before = {n: t.clone() for n, t in s.model.state_dict().items() if isinstance(t, torch.Tensor)}
    s.train()
    changed = {
        n for n, t in s.model.state_dict().items() if n in before and not torch.equal(t, before[n])
    }
    assert {n.replace(".default.", ".") for n in changed} == set(s.layout.names)
    assert len(before) > len(changed)


@BITS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_seed_decides_the_result_bit_by_bit(
    models_dir: Path, tiny_model: Path, bits: int, dropout: float
) -> None:
    results: list[Vector] = []
    for seed in (5, 5, 6):
        s = site(models_dir, tiny_model, bits, lora_dropout=dropout)
        torch.rand(len(results) + 1)  # what happened before in the process must not matter
        s.train(seed=seed)
        results.append(s.adapter)
    assert results[0].tobytes() == results[1].tobytes()
    assert results[0].tobytes() != results[2].tobytes()


@BITS
def test_accumulating_two_batches_of_two_equals_one_of_four(
    models_dir: Path, tiny_model: Path, bits: int
) -> None:
    whole = site(models_dir, tiny_model, bits, batch_size=4, gradient_accumulation_steps=1)
    split = site(models_dir, tiny_model, bits, batch_size=2, gradient_accumulation_steps=2)
    # Answers of unequal length: a mean of the batches' means would be something else.
    assert len({e.num_labels for e in whole.examples}) > 5
    start = whole.adapter
    losses = [s.train(lr=1e-3).loss for s in (whole, split)]
    moved = np.linalg.norm(whole.adapter - start)
    assert moved > 0
    assert np.linalg.norm(whole.adapter - split.adapter) < 1e-5 * np.linalg.norm(whole.adapter)
    assert np.linalg.norm(whole.adapter - split.adapter) < 1e-3 * moved
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradient_checkpointing_changes_memory_not_results(
    models_dir: Path, tiny_model: Path
) -> None:
    results: list[Vector] = []
    for checkpointing in (False, True):
        s = site(models_dir, tiny_model, 4, gradient_checkpointing=checkpointing)
        s.train()
        results.append(s.adapter)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "accumulation", "steps"),
    [
        (2, 5.0, 1, 2),
        (12, 1.0, 1, 12),
        (-1, 1.0, 1, 8),
        (-1, 2.0, 1, 16),
        (-1, 1.0, 2, 4),
        (-1, 0.5, 3, 2),
    ],
)
def test_max_steps_overrides_the_epochs_unless_it_is_minus_one(
    models_dir: Path, tiny_model: Path, max_steps: int, epochs: float, accumulation: int, steps: int
) -> None:
    s = site(
        models_dir,
        tiny_model,
        max_steps=max_steps,
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
    )
    assert len(s.examples) == 30  # 8 batches of up to 4
    # The server refuses a site that says it took more.
    assert s.train().steps == steps == s.config.steps(len(s.examples))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_tokens_reported_are_those_trained_on_without_padding(
    models_dir: Path, tiny_model: Path, accumulation: int
) -> None:
    batches: dict[str, Any] = {"batch_size": 5, "gradient_accumulation_steps": accumulation}
    s = site(models_dir, tiny_model, rows=10, max_steps=-1, num_train_epochs=3.0, **batches)
    assert s.train().tokens == 3 * sum(len(e.input_ids) for e in s.examples)

    # With max-steps the run stops in the middle of the data: only what was trained on counts.
    s = site(models_dir, tiny_model, max_steps=2, **batches)
    lengths = sorted(len(e.input_ids) for e in s.examples)
    rows = 2 * 5 * accumulation
    assert sum(lengths[:rows]) <= s.train().tokens <= sum(lengths[-rows:])


def test_without_a_learning_rate_nothing_moves(models_dir: Path, tiny_model: Path) -> None:
    s = site(models_dir, tiny_model)
    start = s.adapter
    s.train(lr=0.0)
    assert s.adapter.tobytes() == start.tobytes()


def test_the_learning_rate_is_constant_over_the_steps(models_dir: Path, tiny_model: Path) -> None:
    # While the gradient hardly turns, each step of Adam moves B by the learning rate; a warm-up
    # or a decay over these steps would move it by about half of that.
    s = site(models_dir, tiny_model, rows=4, max_steps=4)
    s.train(lr=1e-4)
    b = np.concatenate([a.ravel() for n, a in s.layout.split(s.adapter).items() if "_B" in n])
    assert np.abs(b).max() == pytest.approx(4e-4, rel=0.05)


def test_a_changes_length_goes_with_learning_rate_and_steps_as_the_guard_expects(
    models_dir: Path, tiny_model: Path
) -> None:
    """Over the reference's range of rates, and from 2 steps to 60."""

    def change(lr: float, steps: int) -> Change:
        s = site(models_dir, tiny_model, max_steps=steps)
        start = s.adapter
        s.train(lr=lr)
        return Change(float(np.linalg.norm(s.adapter - start)), lr, steps)

    usual, config = change(4.88e-5, 10), run_config()
    assert change(1e-6, 10).norm == pytest.approx(usual.norm / 48.8, rel=0.3)
    for steps in (2, 60):
        other = change(1e-5, steps)
        assert 1 / 3 < other.norm / _expected(other, usual, config) < 3


def test_a_loss_that_is_not_finite_is_an_error(models_dir: Path, tiny_model: Path) -> None:
    s = site(models_dir, tiny_model)
    with torch.no_grad():
        for name, parameter in s.model.named_parameters():
            if ".lora_B" in name:
                parameter.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        s.train()


def test_a_training_that_diverges_is_an_error(models_dir: Path, tiny_model: Path) -> None:
    s = site(models_dir, tiny_model, max_steps=6)
    with pytest.raises(FloatingPointError):
        s.train(lr=1e38)


@BITS
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_evaluation_adds_up_what_a_loop_by_hand_adds_up(
    models_dir: Path, tiny_model: Path, bits: int, batch_size: int
) -> None:
    s = site(models_dir, tiny_model, bits, rows=12, max_steps=20, batch_size=batch_size)
    s.train()  # so that some tokens are right
    s.model.eval()
    loss_sum, correct, tokens = 0.0, 0, 0
    with torch.inference_mode():
        for e in s.examples:
            logits = s.model(input_ids=torch.tensor([e.input_ids])).logits[0].double()
            for place in range(1, len(e.labels)):
                if e.labels[place] != IGNORED:
                    row = logits[place - 1]
                    loss_sum += float(torch.logsumexp(row, 0) - row[e.labels[place]])
                    correct += int(row.argmax()) == e.labels[place]
                    tokens += 1
    assert correct > 5
    result = evaluate(s.model, s.examples, s.config)
    assert result.num_tokens == tokens == sum(e.num_labels for e in s.examples)
    # bitsandbytes computes in bf16 on some CPUs, and padding then changes more than last digits.
    assert result.loss_sum == pytest.approx(loss_sum, rel=1e-3 if bits else 1e-5)
    assert abs(result.num_correct - correct) <= (2 if bits else 1)


def test_evaluation_ignores_dropout_and_changes_nothing(models_dir: Path, tiny_model: Path) -> None:
    s = site(models_dir, tiny_model, lora_dropout=0.9)
    s.train()  # leaves the model in training mode
    before = s.adapter
    first, second = (evaluate(s.model, s.examples, s.config) for _ in range(2))
    assert first == second
    assert s.adapter.tobytes() == before.tobytes()


# --- logits only where labels are -----------------------------------------------------------------


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@BITS
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("masked", [0, 1, 3], ids=["no", "one", "three"])
def test_loss_and_gradients_are_those_of_the_logits_at_every_place(
    models_dir: Path, tiny_model: Path, bits: int, masked: int, packed: bool
) -> None:
    s = site(models_dir, tiny_model, bits)
    rows = sorted(s.examples, key=lambda e: len(e.input_ids))[::7]  # unequal
    assert len({len(e.input_ids) for e in rows}) == len(rows) > masked
    rows = [
        Example(e.input_ids, [IGNORED] * len(e.labels)) if i < masked else e
        for i, e in enumerate(rows)
    ]
    results = []
    for every_place in (True, False):
        s.model.train()
        s.model.zero_grad()
        if every_place:
            loss = s.model(**collate(rows)).loss
        else:
            (one,) = passes(collate(rows), 10_000, packed)
            labels = one.pop("labels")
            logits = s.model(**one).logits
            assert logits.shape == (sum(e.num_labels for e in rows), VOCABULARY)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        results.append((float(loss.detach()), gradients(s.model)))
    (loss, exact), (ours, grads) = results
    assert ours == pytest.approx(loss, abs=1e-5)
    assert exact.keys() == grads.keys()
    whole = torch.cat([g.ravel() for g in exact.values()])
    difference = torch.cat([(grads[n] - g).ravel() for n, g in exact.items()])
    assert whole.norm() > 0
    assert difference.norm() < 1e-6 * whole.norm()


def test_the_head_computes_no_logits_of_prompts_and_padding(
    models_dir: Path, tiny_model: Path
) -> None:
    s = site(models_dir, tiny_model, max_steps=-1, num_train_epochs=1.0)
    places: list[int] = []
    s.model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, output: places.append(output.numel() // VOCABULARY)
    )
    answers = sum(e.num_labels for e in s.examples)
    s.train()
    assert sum(places) == answers
    places.clear()
    evaluate(s.model, s.examples, s.config)
    assert sum(places) == answers


@pytest.mark.parametrize("tokens", [1, 200, 4096])
def test_no_layer_computes_padding_nor_more_tokens_in_a_pass_than_allowed(
    models_dir: Path, tiny_model: Path, tokens: int
) -> None:
    s = site(
        models_dir, tiny_model, max_steps=-1, num_train_epochs=1.0, batch_size=7,
        max_tokens_per_pass=tokens,
    )  # fmt: skip
    lengths = [len(e.input_ids) for e in s.examples]
    computed: list[int] = []
    s.model.get_base_model().model.norm.register_forward_hook(
        lambda _, inputs, output: computed.append(output.shape[0] * output.shape[1])
    )
    assert can_pack(s.model)  # asked once, of 7 tokens
    for work in (s.train, lambda: evaluate(s.model, s.examples, s.config)):
        computed.clear()
        work()
        assert sum(computed) == sum(lengths)
        assert all(n <= tokens or n in lengths for n in computed)
        assert len(computed) == {1: len(lengths), 4096: math.ceil(len(lengths) / 7)}.get(
            tokens, len(computed)
        )


def as_transformers_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches, logits at every place, the model's own loss."""

    def init(self: Any, max_tokens: int, packed: bool, **kwargs: Any) -> None:
        Trainer.__init__(self, **kwargs)

    monkeypatch.setattr(_InPasses, "__init__", init)
    monkeypatch.setattr(_InPasses, "training_step", Trainer.training_step)


@pytest.mark.parametrize("mu", [0.0, 20.0], ids=["", "fedprox"])
@pytest.mark.parametrize("accumulation", [1, 3])
@BITS
def test_a_training_ends_where_padded_batches_with_logits_at_every_place_lead(
    models_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    bits: int, accumulation: int, mu: float,
) -> None:  # fmt: skip
    def trained(tokens: int) -> tuple[Trained, Vector, Vector]:
        s = site(
            models_dir, tiny_model, bits, max_steps=4, gradient_accumulation_steps=accumulation,
            max_tokens_per_pass=tokens,
        )  # fmt: skip
        start = s.adapter
        return train(s.model, s.examples, s.config, LR, 1, mu), s.adapter, start

    results = [trained(tokens) for tokens in (1, 150, 4096)]
    as_transformers_does_it(monkeypatch)
    exact, expected, start = trained(4096)
    for ours, adapter, _ in results:
        assert ours.loss == pytest.approx(exact.loss, abs=1e-5)
        assert ours.tokens == exact.tokens
        assert np.linalg.norm(adapter - expected) < 1e-4 * np.linalg.norm(expected - start)


# --- gradient checkpointing "auto" ----------------------------------------------------------------


def test_on_a_cpu_auto_is_off_and_true_and_false_are_kept(
    models_dir: Path, tiny_model: Path
) -> None:
    base = find(models_dir, str(tiny_model), 4)
    for said, expected in (("auto", False), (True, True), (False, False)):
        config = run_config(gradient_checkpointing=said)
        assert settled(config, base, "cpu") == replace(config, gradient_checkpointing=expected)


@pytest.mark.parametrize("room", [1, 0, -1])
def test_on_a_gpu_auto_goes_by_what_is_free_and_what_torch_holds_unused(
    models_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, room: int,
) -> None:  # fmt: skip
    """With stand-ins for what CUDA says of its memory."""
    base = find(models_dir, str(tiny_model), 4)
    config = run_config(gradient_checkpointing="auto", lora_r=4)
    weights = memory.stored(base.folder, 4, bf16=True)
    without = replace(config, gradient_checkpointing=False)
    more = memory.needed(weights, base.linear_layers, without) - weights.size
    monkeypatch.setattr(
        training, "device_and_dtype", lambda device: (torch.device(device), torch.bfloat16)
    )
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (more - 2000 + room, 2 * more))
    with caplog.at_level(logging.INFO, "app"):
        assert settled(config, base, "cuda").gradient_checkpointing is (room < 0)
    assert len(caplog.messages) == 1
    assert f"gradient checkpointing {'on' if room < 0 else 'off'}: without it" in caplog.text


# --- A small model's weights on a CPU are expanded once -------------------------------------------


@pytest.mark.parametrize("bits", [4, 8], ids=["nf4", "int8"])
def test_expanded_weights_are_frozen_and_train_to_the_same_adapter(
    models_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    base = find(models_dir, str(tiny_model), bits)
    in_float32 = 4 * sum(out * inputs for out, inputs in base.linear_layers.values())
    ends = {}
    for most in (in_float32, in_float32 - 1):
        monkeypatch.setattr(base_model, "EXPANDED_BYTES", most)
        s = site(models_dir, tiny_model, bits)
        held = {str(p.dtype) for n, p in s.model.named_parameters() if ".base_layer." in n}
        assert held == {"torch.float32" if most == in_float32 else f"torch.{'u' * (bits == 4)}int8"}
        learns = {n for n, p in s.model.named_parameters() if p.requires_grad}
        assert learns == {n for n, _ in s.model.named_parameters() if ".lora_" in n}
        ends[most] = s.train().loss, s.adapter
    (loss, adapter), (packed_loss, packed_adapter) = ends.values()
    # int8 rounds what it multiplies with as well, unless it is expanded.
    near = 1e-5 if bits == 4 else 2e-2
    assert loss == pytest.approx(packed_loss, rel=near)
    moved = packed_adapter - initial_adapter(s.layout, s.config.seed)
    assert np.linalg.norm(adapter - packed_adapter) < (0.01 if bits == 4 else 0.5) * np.linalg.norm(
        moved
    )


# --- bf16, as on a GPU that has it ----------------------------------------------------------------


def test_in_bf16_embeddings_and_head_stay_as_stored_and_norms_and_adapter_are_float32(
    models_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(source)
    prepare_model(tmp_path / "models", tmp_path / "cache", str(source), "nf4", None)

    def dtypes(s: Site) -> dict[str, torch.dtype]:
        ends = (
            "embed_tokens.weight",
            "lm_head.weight",
            "norm.weight",
            "q_proj.lora_A.default.weight",
        )
        named = dict(s.model.named_parameters())
        return {e: next(p.dtype for n, p in named.items() if n.endswith(e)) for e in ends}

    on_cpu = site(tmp_path / "models", source, 4, max_steps=10)
    assert set(dtypes(on_cpu).values()) == {torch.float32}
    exact = on_cpu.train()

    def as_on_a_gpu(device: str) -> tuple[torch.device, torch.dtype]:
        return torch.device(device), torch.bfloat16

    monkeypatch.setattr(base_model, "device_and_dtype", as_on_a_gpu)
    monkeypatch.setattr(training, "device_and_dtype", as_on_a_gpu)
    mixed, judge = (site(tmp_path / "models", source, 4, max_steps=10) for _ in range(2))
    assert list(dtypes(mixed).values()) == [torch.bfloat16] * 2 + [torch.float32] * 2
    # One that is stored in float32 stays so: nothing is rounded that need not be.
    assert set(dtypes(site(models_dir, tiny_model, 4)).values()) == {torch.float32}
    trained = mixed.train()
    assert trained.loss == pytest.approx(exact.loss, rel=0.01)
    before, after = (evaluate(s.model, s.examples, s.config) for s in (judge, mixed))
    assert after.num_tokens == before.num_tokens
    assert after.loss_sum < before.loss_sum * 0.95


# --- FedProx: near the received adapter -----------------------------------------------------------


def distance_after(s: Site, **proximal: float) -> float:
    start = s.adapter
    train(s.model, s.examples, s.config, LR, 1, **proximal)
    return float(np.linalg.norm(s.adapter - start))


@BITS
def test_the_larger_mu_is_the_nearer_the_adapter_stays(
    models_dir: Path, tiny_model: Path, bits: int
) -> None:
    far, nearer, near = (
        distance_after(site(models_dir, tiny_model, bits, max_steps=10), proximal_mu=mu)
        for mu in (0.0, 1.0, 100.0)
    )
    assert near < 0.5 * far
    assert near < nearer < far


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_mu_of_zero_is_no_mu_bit_by_bit(
    models_dir: Path, tiny_model: Path, dropout: float
) -> None:
    results: list[tuple[bytes, float]] = []
    for proximal in ({}, {"proximal_mu": 0.0}, {"proximal_mu": 1.0}):
        s = site(models_dir, tiny_model, lora_dropout=dropout)
        trained = train(s.model, s.examples, s.config, LR, 1, **proximal)
        results.append((s.adapter.tobytes(), trained.loss))
    assert results[0] == results[1]
    assert results[0][0] != results[2][0]


def test_the_first_step_does_not_feel_mu_as_nothing_has_moved_yet(
    models_dir: Path, tiny_model: Path
) -> None:
    results: list[Vector] = []
    for mu in (0.0, 1e6):
        s = site(models_dir, tiny_model, max_steps=1)
        train(s.model, s.examples, s.config, LR, 1, mu)
        results.append(s.adapter)
    assert results[0].tobytes() == results[1].tobytes()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), mu=st.floats(1e-6, 1e3), steps=st.integers(1, 4))
def test_the_gradient_added_is_mu_times_the_distance_moved(
    seed: int, mu: float, steps: int
) -> None:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)  # the base model
    received = [p.detach().clone() for p in model.parameters()]
    callback = _Proximal(model, mu)
    trained = list(model[1].parameters())
    for step in range(steps):
        gradients = [torch.randn_like(p) for p in trained]
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.add_(torch.randn_like(parameter), alpha=1 if step else 0)
                parameter.grad = gradient.clone()
        before = [p.detach().clone() for p in model.parameters()]
        callback.on_pre_optimizer_step(None, None, None)
        for parameter, gradient, start in zip(trained, gradients, received[2:], strict=True):
            assert parameter.grad is not None
            expected = gradient + mu * (parameter.detach() - start)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6 * mu)
        # Neither the weights move, nor what they are held to, nor is the base model trained.
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model[0].parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_proximal_gradient_is_added_once_a_step_behind_the_clipping(
    models_dir: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    seen: list[tuple[float, float, float]] = []
    added = _Proximal.on_pre_optimizer_step

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        def norm(values: list[torch.Tensor]) -> float:
            return float(torch.cat([v.detach().ravel() for v in values]).norm())

        before = [p.grad.clone() for p, _ in self.pairs]
        added(self, *args, **kwargs)
        moved = norm([p - r for p, r in self.pairs])
        more = norm([p.grad - g for (p, _), g in zip(self.pairs, before, strict=True)])
        seen.append((norm(before), moved, more))

    monkeypatch.setattr(_Proximal, "on_pre_optimizer_step", watched)
    s = site(models_dir, tiny_model, max_steps=4, gradient_accumulation_steps=accumulation)
    train(s.model, s.examples, s.config, LR, 1, 50.0)
    assert len(seen) == 4
    clipped, moved, more = (np.array(x) for x in zip(*seen, strict=True))
    assert clipped.max() <= 1 + 1e-4  # the Trainer's max_grad_norm, of the loss alone
    assert moved[0] == 0
    assert (moved[1:] > 0).all()
    assert more.max() > 1
    np.testing.assert_allclose(more, 50 * moved, rtol=1e-3)
