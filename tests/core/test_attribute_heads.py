"""Face-attribute classifiers of transformers: labels of published ones, tiny models of the same class and format."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.attribute_heads import HeadClassifier, check_heads, parse_sources
from popalign_core.models.attribute_labels import NO_PERSON, group_of, label_fault

FAIRFACE = {
    "perceived_gender": ("Male", "Female"),
    "perceived_race": (
        "East Asian",
        "Indian",
        "Black",
        "White",
        "Middle Eastern",
        "Latino_Hispanic",
        "Southeast Asian",
    ),
    "perceived_age": ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70"),
}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fairface")
    torch.manual_seed(0)
    for axis, labels in FAIRFACE.items():
        names = dict(enumerate(labels))
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=16,
            id2label=names,
            label2id={name: index for index, name in names.items()},
        )
        ViTForImageClassification(config).save_pretrained(folder / axis)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / axis)
    return {axis: str(folder / axis) for axis in FAIRFACE}


@pytest.mark.parametrize("axis", FAIRFACE)
def test_labels_of_fairface_cover_every_group(axis: str) -> None:
    assert label_fault(list(FAIRFACE[axis]), AXES[axis]) == ""


@pytest.mark.parametrize(
    ("axis", "label", "group"),
    [
        ("perceived_gender", " Female ", "woman"),
        ("perceived_race", "Middle-Eastern", "middle eastern"),
        ("perceived_race", "Southeast Asian", "asian"),
        ("perceived_age", "30-39", "young"),
        ("perceived_age", "40-49", "middle-aged"),
        ("perceived_age", "more than 70", "old"),
        ("perceived_skin_tone", "medium_dark", "medium-dark"),
        ("perceived_gender", "No_Face", NO_PERSON),
        ("perceived_gender", "20-29", None),
    ],
)
def test_a_label_means_a_group_of_its_axis_alone(axis: str, label: str, group: str | None) -> None:
    assert group_of(label, AXES[axis]) == group


def test_a_classifier_that_lacks_a_group_is_refused() -> None:
    labels = ["african", "asian", "caucasian", "hispanic", "indian"]
    assert "no label for middle eastern" in label_fault(labels, AXES["perceived_race"])
    assert "tells martian apart" in label_fault([*FAIRFACE["perceived_race"], "martian"], AXES["perceived_race"])


def test_probabilities_are_those_of_the_library_for_one_image_at_a_time(heads: dict[str, str]) -> None:
    axes = [AXES[axis] for axis in FAIRFACE]
    found = HeadClassifier(heads, device="cpu", batch_size=2).probabilities(IMAGES, axes)
    for axis, outcome in zip(axes, found, strict=True):
        model = ViTForImageClassification.from_pretrained(heads[axis.name])
        processor = ViTImageProcessor.from_pretrained(heads[axis.name])
        for image, values in zip(IMAGES, outcome.probabilities, strict=True):
            with torch.no_grad():
                logits = model(**processor(Image.fromarray(image), return_tensors="pt")).logits
            shares = logits.softmax(dim=-1)[0].tolist()
            expected = dict.fromkeys(axis.groups, 0.0)
            for share, label in zip(shares, FAIRFACE[axis.name], strict=True):
                expected[group_of(label, axis)] += share
            assert values == pytest.approx(list(expected.values()), abs=1e-5)


def test_pictures_of_several_sizes_give_what_each_gives_alone(heads: dict[str, str]) -> None:
    classifier = HeadClassifier(heads, device="cpu")
    pictures = [IMAGES[0], IMAGES[1, :20], IMAGES[2, :, :20]]
    together = classifier.probabilities(pictures, [AXES["perceived_race"]])[0].probabilities
    alone = [classifier.probabilities(one[None], [AXES["perceived_race"]])[0].probabilities[0] for one in pictures]
    assert together == pytest.approx(np.stack(alone), abs=1e-5)
    assert classifier.probabilities([], [AXES["perceived_race"]])[0].probabilities.shape == (0, 6)


def test_a_backbone_without_its_head_is_refused(heads: dict[str, str], tmp_path: Path) -> None:
    """The library would draw the head at random, and say so in a log that nobody reads."""
    source = tmp_path / "perceived_gender"
    shutil.copytree(heads["perceived_gender"], source)
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if not name.startswith("classifier.")},
        source / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ModelNotUsable, match=r"not the weights of an image classifier: 2 are missing or misfit"):
        HeadClassifier({"perceived_gender": str(source)}, device="cpu").logits("perceived_gender", IMAGES)


def test_a_judge_is_a_folder_or_one_source_an_axis(heads: dict[str, str]) -> None:
    text = ",".join(f"{axis}={source}" for axis, source in heads.items())
    assert parse_sources(text) == heads
    assert HeadClassifier(text, device="cpu").classifier_id == HeadClassifier(heads, device="cpu").classifier_id
    check_heads(text, list(FAIRFACE))
    check_heads(str(Path(heads["perceived_age"]).parent), list(FAIRFACE))
    check_heads("perceived_gender=someone/gender", ["perceived_gender"])  # a hub id: only loading shows
    with pytest.raises(ModelNotUsable, match="no classifier for perceived_skin_tone"):
        check_heads(text, ["perceived_skin_tone"])
    with pytest.raises(InvalidInput, match="'perceived_height' is no axis"):
        check_heads("perceived_height=a/b", ["perceived_gender"])
