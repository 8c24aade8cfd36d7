"""What a measure shows of populations that are exactly on target: the null band of a figure with as many images."""

from functools import lru_cache

import numpy as np

from popalign_core.assessment.disparity import MEASURES
from popalign_core.assessment.resampling import LEVELS
from popalign_core.assessment.uncertainty import known_mean, pool
from popalign_core.seeds import derive_seed

SIMULATIONS = 2000
Band = tuple[float, float]


def null_bands(sizes: np.ndarray, target: np.ndarray, *, pooled: bool = False) -> dict[str, Band]:
    """2.5 and 97.5% of every measure, of the mean over prompts or pooled, where each prompt's population is on target.

    sizes: known images of each prompt (prompts,). target: shares (groups,), or one for each prompt (prompts, groups).
    From 2,000 simulated populations that depend on sizes and target alone, so that equal figures have equal bands in
    every run. nan without an image.
    """
    return _bands(tuple(sizes.tolist()), target.astype(float).tobytes(), target.shape, pooled)


@lru_cache(maxsize=4096)
def _bands(sizes: tuple[int, ...], target: bytes, shape: tuple[int, ...], pooled: bool) -> dict[str, Band]:
    if not sum(sizes):
        return dict.fromkeys(MEASURES, (np.nan, np.nan))
    shares = np.frombuffer(target).reshape(shape)
    seed = derive_seed(0, "null band", *sizes, target.hex())
    drawn = np.random.default_rng(seed).multinomial(np.array(sizes), shares, size=(SIMULATIONS, len(sizes)))
    found: dict[str, Band] = {}
    for name, measure in MEASURES.items():
        values = measure(*pool(drawn, shares)) if pooled else known_mean(measure(drawn, shares))
        known = values[~np.isnan(values)]
        low, high = np.percentile(known, LEVELS) if known.size else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found
