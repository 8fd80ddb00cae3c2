"""The noise that ``app.site.privacy`` adds to what travels: its length, and what it promises."""

import numpy as np

from app.config import RunConfig

DELTA = 1e-5


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
