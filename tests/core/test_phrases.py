"""Every built-in axis can be told to a zero-shot classifier, and so can one of a user's own."""

import json
from pathlib import Path

import numpy as np
import pytest

from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.phrases import PHRASES, described, described_axis

HATS = {"name": "perceived_hat", "groups": {"a hat": ["a person with a hat"], "no hat": "a person without a hat"}}


def written(folder: Path, values: object) -> str:
    path = folder / "axis.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def test_every_group_of_every_axis_has_phrases() -> None:
    assert {name: set(groups) for name, groups in PHRASES.items()} == {
        name: set(axis.groups) for name, axis in AXES.items()
    }


def test_an_axis_of_a_file_is_classified_like_any_other(tmp_path: Path) -> None:
    hats = described_axis(written(tmp_path, HATS))
    assert hats.axis.groups == ("a hat", "no hat")
    classifier = ZeroShotClassifier("emoji-clip", device="cpu")
    features = classifier.image_features(np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)).numpy()
    own, age = classifier.probabilities_of(features, [hats, described_axis("perceived_age")])
    assert own.probabilities.shape == (5, 2)
    assert age.probabilities.shape == (5, 3)
    assert np.allclose(own.probabilities.sum(axis=1), 1)


def test_other_phrases_have_another_digest(tmp_path: Path) -> None:
    first = described_axis(written(tmp_path, HATS)).digest
    groups = HATS["groups"] | {"a hat": ["someone in a hat"]}
    assert described_axis(written(tmp_path, HATS | {"groups": groups})).digest != first
    assert described(AXES["perceived_age"]).digest != first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (HATS | {"name": "hat"}, "perceived_ and up to 32"),
        (HATS | {"name": "perceived_gender"}, "none of perceived_gender"),
        (HATS | {"groups": {"a hat": ["a hat"]}}, "has 1 groups"),
        (HATS | {"groups": {"a hat": [], "no hat": ["x"]}}, "phrases are texts"),
        ({"name": "perceived_hat"}, "describes no axis"),
        ([1], "describes no axis"),
    ],
)
def test_a_file_that_describes_no_axis_is_refused(tmp_path: Path, values: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        described_axis(written(tmp_path, values))


def test_an_unknown_axis_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="perceived_couple, or the path"):
        described_axis("perceived_height")
