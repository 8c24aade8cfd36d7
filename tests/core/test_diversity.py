"""Vendi scores against what they are by definition, and groups of unequal size."""

import numpy as np
import pytest

from popalign_core.assessment.diversity import group_diversity, vendi_score
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput

GENDER = AXES["perceived_gender"]
FIRST, SECOND = GENDER.groups


def test_it_counts_unlike_images() -> None:
    unlike = 3.0 * np.eye(5)
    assert vendi_score(unlike) == pytest.approx(5)
    assert vendi_score(np.repeat(unlike[:1], 7, axis=0)) == pytest.approx(1)
    # Two kinds, three to one: exp of the entropy of (3/4, 1/4).
    kinds = unlike[[0, 0, 0, 1]]
    assert vendi_score(kinds) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_it_is_the_definition_by_eigenvalues() -> None:
    features = np.random.default_rng(0).normal(size=(12, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.clip(np.linalg.eigvalsh(unit @ unit.T / 12), 1e-300, None)
    assert vendi_score(features) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_models_are_compared_at_one_number_of_images_and_every_group_has_a_row() -> None:
    rng = np.random.default_rng(1)
    features = {"base": rng.normal(size=(60, 8)), "round-1": rng.normal(size=(20, 8))}
    labels = {"base": [FIRST] * 50 + [None] * 10, "round-1": [FIRST] * 20}
    rows = group_diversity(features, labels, GENDER, seed=3)
    assert [(row.model_id, row.group, row.n, row.size) for row in rows] == [
        ("base", FIRST, 50, 16),
        ("round-1", FIRST, 20, 16),
        ("base", SECOND, 0, 0),
        ("round-1", SECOND, 0, 0),
    ]
    base, aligned, *empty = rows
    assert base.low < base.value < base.high
    assert base.value == pytest.approx(aligned.value, rel=0.15)
    assert all(np.isnan(row.value) for row in empty)
    assert rows[:2] == group_diversity(features, labels, GENDER, seed=3)[:2]


def test_a_group_that_looks_the_same_is_told_from_one_that_does_not() -> None:
    rng = np.random.default_rng(2)
    alike = np.ones(8) + 0.01 * rng.normal(size=(20, 8))
    features = {"base": rng.normal(size=(20, 8)), "round-1": alike}
    base, aligned, *_ = group_diversity(features, dict.fromkeys(features, [FIRST] * 20), GENDER, seed=3)
    assert aligned.high < 1.1 < 3 < base.low


def test_labels_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InvalidInput, match="3 images of base and 2 labels"):
        group_diversity({"base": np.ones((3, 2))}, {"base": [FIRST, None]}, GENDER, seed=0)
    with pytest.raises(InvalidInput, match=r"got shape \(0, 4\)"):
        vendi_score(np.zeros((0, 4)))
