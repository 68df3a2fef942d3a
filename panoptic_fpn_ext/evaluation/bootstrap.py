"""Bootstrap over images: how sure a score is, given the images it was measured on."""

from collections.abc import Callable

import numpy as np

SAMPLES = 1000
SEED = 0
LEVEL = 0.95


def resamples(number_images: int, samples: int = SAMPLES) -> np.ndarray:
    """How often each image is drawn, with replacement: float64 array (samples, number_images).

    The same numbers whenever it is asked, so that two runs on the same images can be paired.
    """
    rng = np.random.default_rng(SEED)
    chances = np.full(number_images, 1 / number_images)
    return rng.multinomial(number_images, chances, size=samples).astype(np.float64)


def ends(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval of :data:`LEVEL` of the scores of resamples, nan left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def interval(
    score: Callable[[np.ndarray], np.ndarray], number_images: int, samples: int = SAMPLES
) -> tuple[float, float]:
    """The interval of a score.

    Args:
        score: from :func:`resamples` (B, I) to the score of each, (B,).
        number_images: I.
        samples: B.
    """
    return ends(score(resamples(number_images, samples)))
