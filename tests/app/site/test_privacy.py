"""Clipping and noise at the site: as long as asked, and nobody else's to predict."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from app import client_app, plan
from app.config import ConfigError, RunConfig
from app.site.privacy import privatise
from app.wire.adapter import Layout, Vector
from app.wire.codec import decode
from app.wire.noise import epsilon, noise_norm
from tests.samples import run_config

N = 20_000
LINEAR = {f"m.{n}_proj": [64, 64] for n in "qv"}


def vector(seed: int, scale: float = 1.0, size: int = N) -> Vector:
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def config(clip: float, noise: float = 0.0) -> RunConfig:
    return run_config(clip_norm=clip, noise_multiplier=noise)


@settings(max_examples=50)
@given(st.floats(1e-3, 1e3), st.floats(1e-6, 10), st.integers(0, 2**32))
def test_a_clipped_change_has_its_direction_and_at_most_the_length_asked(
    clip: float, scale: float, seed: int
) -> None:
    received = vector(seed)
    trained = received + vector(seed + 1, scale)
    wanted = (trained - received).astype(np.float64)
    got = (privatise(trained, received, config(clip)) - received).astype(np.float64)
    length = float(np.linalg.norm(wanted))
    rounding = 1e-6 * float(np.linalg.norm(received))  # of float32, in adding the change back
    assert np.linalg.norm(got) <= clip * 1.0001 + rounding
    factor = min(1.0, clip / length)
    assert np.linalg.norm(got - factor * wanted) <= 1e-4 * factor * length + rounding


def test_without_a_clip_norm_nothing_happens() -> None:
    received, trained = vector(1), vector(2)
    assert privatise(trained, received, config(0.0)) is trained


def test_a_site_that_learned_nothing_sends_noise_alone() -> None:
    received = vector(1)
    assert privatise(received.copy(), received, config(1.0)).tobytes() == received.tobytes()
    noisy = privatise(received.copy(), received, config(0.5, 2.0)) - received
    assert np.std(noisy) == pytest.approx(1.0, rel=0.05)
    assert np.linalg.norm(noisy) == pytest.approx(noise_norm(config(0.5, 2.0), N), rel=0.05)
    assert abs(np.mean(noisy)) < 5 / math.sqrt(N)


def test_the_noise_does_not_follow_from_a_seed_that_the_server_knows() -> None:
    received = np.zeros(N, np.float32)
    drawn = []
    for _ in range(2):
        np.random.seed(7)  # as Trainer does, from the run's seed
        drawn.append(privatise(received, received, config(1.0, 1.0)))
    assert abs(float(np.mean(drawn[0] * drawn[1]))) < 0.05


def test_what_a_site_uploads_is_clipped_in_every_codec(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SITE_DIR", str(tmp_path))
    layout = Layout.of(LINEAR, run_config(lora_r=8))
    received = vector(1, size=layout.size)
    trained = received + vector(2, size=layout.size)
    for number, codec in enumerate(("fp32", "bf16", "int8", "int4"), 1):
        wanted = run_config(lora_r=8, clip_norm=0.1, codec=codec)
        job = ConfigRecord({"round": 1, "upload": f"{number}:1:0"})
        payload = client_app._to_send(trained, received, layout, wanted, job)
        change = decode(codec, payload, received) - received
        assert np.linalg.norm(change) == pytest.approx(0.1, rel=0.2)


def test_noise_without_clipping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise-multiplier = 1 needs privacy\.clip-norm"):
        config(0.0, 1.0)


def test_epsilon_falls_with_the_noise_and_grows_with_the_uploads() -> None:
    pytest.importorskip("dp_accounting")
    by_noise = [epsilon(z, 10) or 0 for z in (1.0, 2.0, 8.0)]
    assert by_noise == sorted(by_noise, reverse=True)
    by_uploads = [epsilon(2.0, n) or 0 for n in (1, 2, 5)]
    assert by_uploads == sorted(by_uploads)
    # One Gaussian mechanism of sensitivity 1 and deviation 1 (analytic: Balle and Wang, 2018).
    assert epsilon(2.0, 1) == pytest.approx(4.3771781, rel=0.01)


def test_the_plan_states_epsilon_only_where_there_is_noise() -> None:
    layout = Layout.of(LINEAR, run_config())
    assert not [x for x in plan.plan(config(0.0), layout, 20) if "privacy" in x]
    (clipped,) = [x for x in plan.plan(config(1.0), layout, 20) if "privacy" in x]
    assert "no (epsilon, delta)" in clipped
    (noisy,) = [x for x in plan.plan(config(1.0, 2.0), layout, 20) if "privacy" in x]
    assert "epsilon 4.38 for each that it sends" in noisy
