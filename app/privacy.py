"""What a site may do to its change before it sends it: clip its length, add Gaussian noise.

At the site, so that nobody else sees the change itself, the server included. What is sent
afterwards (codec, error feedback) works on the noisy change and takes nothing of this back.
"""

import numpy as np
from flwr.supercore.differential_privacy import compute_clip_model_update

from app.adapter import Vector
from app.config import RunConfig

DELTA = 1e-5


def privatise(trained: Vector, received: Vector, config: RunConfig) -> Vector:
    """The adapter [n] with its change clipped to privacy.clip-norm, and noise on every value.

    Flower's own noise comes from numpy's global generator, which training has seeded with a
    number that the server knows; this one's is seeded by the operating system. The standard
    deviation is noise-multiplier x clip-norm.
    """
    if not config.clip_norm:
        return trained
    private = [trained]
    if (trained != received).any():  # Flower divides by the norm
        compute_clip_model_update(private, [received], config.clip_norm)
    scale = config.noise_multiplier * config.clip_norm
    noise = np.random.default_rng().standard_normal(trained.size, np.float32)
    return private[0] + np.float32(scale) * noise


def noise_norm(config: RunConfig, size: int) -> float:
    """About how long the noise on an adapter of ``size`` values is."""
    return float(config.noise_multiplier * config.clip_norm * np.sqrt(size))


def epsilon(noise_multiplier: float, uploads: int) -> float | None:
    """Epsilon at DELTA for a site that uploads so often, if nothing else about it is known.

    Two data sets of a site, however different, move its clipped change by at most twice the
    clip norm. None without the package dp-accounting, which does the reckoning.
    """
    try:
        from dp_accounting import GaussianDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return None
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier / 2), uploads)
    return float(accountant.get_epsilon(DELTA))
