"""How often 95% intervals hold the truth, and the gate decides rightly, on populations with known shares."""

import numpy as np
import pytest
from scipy.stats import binom

from popalign_core.assessment.decision import Thresholds, decide
from popalign_core.assessment.disparity import (
    MEASURES,
    l2_discrepancy,
    total_variation,
    unbiased_squared_l2,
)
from popalign_core.assessment.prompt_intervals import prompt_intervals
from popalign_core.assessment.resampling import estimate_ratio, resample_prompts
from popalign_core.assessment.uncertainty import (
    DrawnCounts,
    clopper_pearson_interval,
    compare,
    compare_unknown,
    share_interval,
)
from popalign_core.presets import preset

SIMULATIONS, RESAMPLES = 2000, 300
GROUPS = 5
UNIFORM = np.full(GROUPS, 1 / GROUPS)
OF_MEANS = (l2_discrepancy, unbiased_squared_l2, total_variation)


def drawn(source: np.random.Generator, prompts: int, images: int, evenness: float) -> np.ndarray:
    return source.multinomial(images, source.dirichlet(np.full(GROUPS, evenness), size=prompts))


@pytest.mark.parametrize("evenness", [0.7, 30.0], ids=["far from the target", "near the sampling floor"])
def test_intervals_of_the_mean_cover(evenness):
    source, prompts, images = np.random.default_rng(5), 16, 40
    many = drawn(source, 400_000, images, evenness)
    truths = {measure: float(np.mean(measure(many, UNIFORM))) for measure in OF_MEANS}
    # Of the square without sampling the population's own: the variance of a Dirichlet's shares, (1 - 1/K) / (K a + 1).
    truths[unbiased_squared_l2] = (1 - 1 / GROUPS) / (GROUPS * evenness + 1)
    covered = dict.fromkeys(OF_MEANS, 0)
    for _ in range(SIMULATIONS):
        counts = drawn(source, prompts, images, evenness)
        resampled = DrawnCounts.of(counts, 0, UNIFORM, rng=source, resamples=RESAMPLES)
        for measure in OF_MEANS:
            found = resampled.mean(measure).estimate
            covered[measure] += found.low <= truths[measure] <= found.high
    shares = {measure.__name__: count / SIMULATIONS for measure, count in covered.items()}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def test_intervals_of_a_mean_over_images_cover():
    """Beta-binomial answers of 15 prompts: obedience, or the share of unknowns."""
    source, covered = np.random.default_rng(6), 0
    for _ in range(SIMULATIONS):
        right = source.binomial(20, source.beta(8, 2, size=15))
        picks = resample_prompts(15, source, RESAMPLES)
        found = estimate_ratio(right, np.full(15, 20), picks, limits=(0, 1)).estimate
        covered += found.low <= 0.8 <= found.high
    assert 0.93 <= covered / SIMULATIONS <= 0.97


@pytest.mark.parametrize("n", [12, 40])
def test_exact_intervals_never_cover_too_seldom(n):
    """Computed, not simulated: the binomial probability of the counts whose interval holds the share."""
    shares = np.linspace(0.001, 0.999, 999)
    counts = np.arange(n + 1)
    weights = binom.pmf(counts[:, None], n, shares)
    for interval, least in ((clopper_pearson_interval, 0.95), (lambda k, m: share_interval(k, m)[:2], 0.92)):
        ends = np.array([interval(k, n) for k in counts.tolist()])
        holds = (ends[:, :1] <= shares) & (shares <= ends[:, 1:])
        assert (weights * holds).sum(axis=0).min() >= least


@pytest.mark.parametrize(
    "shares",
    [[0.6, 0.4], [0.95, 0.05], [0.5, 0.5], [0.4, 0.3, 0.15, 0.1, 0.05], [0.8, 0.1, 0.05, 0.03, 0.02]],
    ids=lambda shares: "-".join(f"{share:g}" for share in shares),
)
def test_intervals_of_one_prompt_hold_its_shares(shares):
    """Of 40 images. They err on the safe side; of the rarest of five groups they hold in 89% and more."""
    source, truth, target = np.random.default_rng(8), np.array(shares), np.full(len(shares), 1 / len(shares))
    runs, held = 600, dict.fromkeys(MEASURES, 0)
    for _ in range(runs):
        found = prompt_intervals(source.multinomial(40, truth), target, rng=source, draws=RESAMPLES)
        for name, (low, high) in found.items():
            held[name] += low - 1e-6 <= MEASURES[name](1e9 * truth, target) <= high + 1e-6
    del held["paper_code_disparity"]  # no function of the shares
    covered = {name: hits / runs for name, hits in held.items()}
    assert min(covered[name] for name in ("l2", "total_variation")) >= 0.91, covered
    assert min(covered.values()) >= 0.87, covered


def promoted(source: np.random.Generator, kept: float, runs: int) -> float:
    """Share of runs that the gate of the preset `emoji` promotes, at its sizes: 15 held-out prompts of 40 images.

    kept: of what every prompt's shares are off the target. Nothing else changes: 95% of 40 images a prompt obey, 3% are
    unknown, and scores are alike but for a prompt's own chance.
    """
    thresholds = Thresholds.of(preset("emoji").assessment)
    prompts, images, promotions = 15, preset("emoji").images.evaluation, 0
    specific = preset("emoji").images.obedience * 10
    lean = np.array([0.95, 0.9, 0.85, 0.9, 0.8, 0.95, 0.7, 0.75, 0.85, 0.9, 0.28, 0.59, 0.8, 0.85, 0.9])
    gender = np.stack([lean, 1 - lean], axis=1)
    for _ in range(runs):
        changes, obeyed, unknown = {}, {}, {}
        for name, shares in (("gender", gender), ("tone", source.dirichlet([8, 1, 0.6, 0.4, 0.4], prompts))):
            target = np.full(shares.shape[1], 1 / shares.shape[1])
            sides = [source.multinomial(images, target + (shares - target) * part) for part in (1, kept)]
            changes[name] = compare(*sides, target, l2_discrepancy, rng=source, resamples=200)
            right = [source.binomial(specific, 0.95, prompts) for _ in range(2)]
            obeyed[name] = compare_unknown(
                *((side, np.full(prompts, specific)) for side in right), rng=source, resamples=200
            )
            missing = [source.binomial(images, 0.03, prompts) for _ in range(2)]
            unknown[name] = compare_unknown(
                *((side, np.full(prompts, images)) for side in missing), rng=source, resamples=200
            )
        picks = resample_prompts(prompts, source, 200)
        scores = [source.normal(56, 0.7, prompts) * images for _ in range(2)]
        before, after = (estimate_ratio(side, np.full(prompts, images), picks) for side in scores)
        decision = decide(changes, obeyed, after.compared_with(before), unknown, thresholds)
        promotions += decision.verdict == "promote"
    return promotions / runs


def test_the_gate_promotes_no_model_that_does_nothing_and_finds_a_true_halving():
    """80% power is planned; 250 runs of it would show under 74% in 1 of 100 seeds."""
    source = np.random.default_rng(7)
    assert promoted(source, 1.0, 250) <= 0.05
    assert promoted(source, 0.5, 250) >= 0.74
