"""Classifiers in 16 bits: what stays in 32, what their names say, and how far they are from themselves in 32."""

import numpy as np
import pytest
import torch
from torch import nn

from popalign_core.attributes import AXES
from popalign_core.classification import Status, attribute
from popalign_core.errors import ModelNotUsable
from popalign_core.models.attribute_heads import HeadClassifier
from popalign_core.models.inference import frozen
from popalign_core.models.zero_shot import ZeroShotClassifier, check_builder

CPU = torch.device("cpu")
MIN_CONFIDENCE = 0.6


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        for values in (self.norm.running_mean, self.norm.running_var):
            assert values is not None
            values.uniform_(0.5, 1.5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.convolution(pixels)).mean(dim=(2, 3)))


def test_statistics_of_batch_normalization_are_not_rounded() -> None:
    torch.manual_seed(0)
    given = Small()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    made = frozen(given, CPU, "bfloat16")
    for name, value in made.state_dict().items():
        if name.startswith("norm."):
            assert torch.equal(value, before[name]), name
        else:
            assert value.dtype == torch.bfloat16, name
    assert made(torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not made.training
    assert made.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_in_32_bits_no_weight_changes() -> None:
    torch.manual_seed(0)
    given = Small()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in frozen(given, CPU, "float32").state_dict().items())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Noise has no label far from a border; smooth pictures of every colour have some."""
    rng = np.random.default_rng(3)
    colours = rng.integers(0, 256, (32, 4, 4, 3), np.uint8)
    return colours.repeat(16, axis=1).repeat(16, axis=2)


@pytest.mark.parametrize(
    ("classifier", "source"), [(HeadClassifier, "emoji-heads"), (ZeroShotClassifier, "emoji-clip")]
)
def test_labels_far_from_a_border_are_the_same_in_16_bits(classifier, source: str, images: np.ndarray) -> None:
    exact = classifier(source, device="cpu")
    short = classifier(source, device="cpu", dtype="bfloat16")
    assert short.classifier_id == f"{exact.classifier_id}+bfloat16"
    axes = [AXES["perceived_gender"], AXES["perceived_skin_tone"]]
    for first, second in zip(exact.probabilities(images, axes), short.probabilities(images, axes), strict=True):
        moved = np.abs(first.probabilities - second.probabilities).max(axis=1)
        assert 0 < moved.max() < 0.1
        least = np.sort(first.probabilities, axis=1)
        clear = (least[:, -1] - least[:, -2] > 0.2) & (np.abs(least[:, -1] - MIN_CONFIDENCE) > 0.1)
        before, after = (attribute(one, min_confidence=MIN_CONFIDENCE) for one in (first, second))
        sure = np.abs(first.no_person - 0.5) > 0.1
        for position in np.flatnonzero(clear & sure):
            assert (before[position].label, before[position].status) == (after[position].label, after[position].status)
        assert any(row.status is Status.OK for row in before)


@pytest.mark.parametrize(
    ("source", "known"), [("ViT-B-32", r"tags: openai, "), ("no-such-architecture", "open_clip has no weights")]
)
def test_a_builder_without_weights_is_refused(source: str, known: str) -> None:
    with pytest.raises(ModelNotUsable, match=known):
        check_builder(source, ["perceived_gender"])
    with pytest.raises(ModelNotUsable, match="could not be loaded by open_clip"):
        ZeroShotClassifier(source, device="cpu")


def test_a_builder_by_tag_or_hub_id_passes() -> None:
    for source in ("ViT-B-32@openai", "hf-hub:someone/model", "emoji-clip"):
        check_builder(source, ["perceived_gender"])
