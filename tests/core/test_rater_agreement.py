"""Krippendorff's alpha on published examples, and at its ends."""

import numpy as np
import pytest

from popalign_core.assessment.rater_agreement import MISSING, estimate_alpha, krippendorff_alpha
from popalign_core.errors import InvalidInput


def table(*raters: str) -> np.ndarray:
    """One string a rater, a sign a unit; `.` is no value."""
    return np.array([[MISSING if sign == "." else ord(sign) for sign in rater] for rater in raters]).T


@pytest.mark.parametrize(
    ("raters", "alpha"),
    [
        # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: examples A, B and C, nominal.
        (("0100000010", "1110010000"), 0.095),
        (("aabbdcccedda", "babbbccceddd"), 0.692),
        (("123321412...", "1233224125.3", ".3332342251.", "12332441251."), 0.743),
    ],
)
def test_published_examples(raters, alpha):
    assert krippendorff_alpha(table(*raters)) == pytest.approx(alpha, abs=5e-4)


def test_ends():
    assert krippendorff_alpha(table("abab", "abab")) == 1
    assert krippendorff_alpha(table("abab", "baba")) < 0
    assert np.isnan(krippendorff_alpha(table("aaaa", "aaaa")))
    assert np.isnan(krippendorff_alpha(table("ab..", "..ab")))


def test_single_values_do_not_count():
    assert krippendorff_alpha(table("aabbdcccedda....", "babbbcccedddabcd")) == pytest.approx(0.692, abs=5e-4)


def test_the_interval_holds_the_value_and_counts_units():
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=60)
    codes = np.stack([np.where(rng.random(60) < 0.8, truth, rng.integers(3, size=60)) for _ in range(3)], axis=1)
    found = estimate_alpha(codes, rng=rng, resamples=400)
    assert found.low < found.value < found.high
    assert found.n == 60
    assert np.isnan(estimate_alpha(table("ab..", "..ab"), rng=rng).value)


def test_names_are_refused():
    with pytest.raises(InvalidInput, match="integers"):
        krippendorff_alpha(np.array([["a", "b"]]))
