"""What a site may do to its change before it sends it: clip its length, add Gaussian noise.

At the site, so that nobody else sees the change itself, the server included. What is sent
afterwards (codec, error feedback) works on the noisy change and takes nothing of this back.
"""

import numpy as np
from flwr.supercore.differential_privacy import compute_clip_model_update

from app.config import RunConfig
from app.wire.adapter import Vector


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
