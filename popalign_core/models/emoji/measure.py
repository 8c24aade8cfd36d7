"""Measures the embedded model for its model card (builder only): `python -m popalign_core.models.emoji.measure`.

Obedience counts roles in which every vendor's drawing shows both attributes; where a drawing hides one there is
nothing to obey.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from popalign_core.assessment.disparity import l2_discrepancy, sampling_floor
from popalign_core.assessment.obedience import confusion_matrix, obedience
from popalign_core.assessment.quality import frechet_distance
from popalign_core.attributes import AXES
from popalign_core.classification import AxisProbabilities
from popalign_core.models.attribute_heads import HeadClassifier
from popalign_core.models.emoji.captions import caption
from popalign_core.models.emoji.data import EmojiSet, render_emoji
from popalign_core.models.emoji.judges import HELD_OUT_VENDOR
from popalign_core.models.emoji.roles import GENDERS, ROLES, TONES, VENDORS
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images
from popalign_core.seeds import sample_seed

MEASURED_AXES = (AXES["perceived_gender"], AXES["perceived_skin_tone"])
NEUTRAL_IMAGES = 20


def measure(work: Path) -> dict[str, Any]:
    """Everything that the model card states."""
    people = render_emoji(work / "npm")
    model, judge, builder = (
        load_sdxl(ModelSource("emoji")),
        HeadClassifier("emoji-heads"),
        ZeroShotClassifier("emoji-clip"),
    )
    cells = [(role, gender, tone) for role in range(len(ROLES)) for gender in range(2) for tone in range(5)]
    specific = [(caption(ROLES[r], GENDERS[g], TONES[t]), ROLES[r].key, g * 5 + t) for r, g, t in cells]
    started = time.monotonic()
    drawn = _draw(model, specific)
    facts: dict[str, Any] = {"images_per_second": round(len(drawn) / (time.monotonic() - started), 1)}
    facts["obedience"] = _obedience(judge, drawn, cells, people)
    neutral = [(caption(role, None, None), role.key, i) for role in ROLES for i in range(NEUTRAL_IMAGES)]
    facts["neutral"] = _disparity(judge, _draw(model, neutral))
    facts["frechet_to_renders"] = round(
        frechet_distance(builder.image_features(people.images).numpy(), builder.image_features(drawn).numpy()), 4
    )
    held_out = people.vendor == VENDORS.index(HELD_OUT_VENDOR)
    facts["builder_on_held_out_vendor"] = _confusions(builder, people, held_out)
    return facts


def _draw(model: SdxlModel, wanted: list[tuple[str, str, int]]) -> np.ndarray:
    config = preset("emoji").sampling
    settings = SamplingSettings(
        height=0, width=0, **config.model_dump(exclude={"image_size", "shard_size", "approximate"})
    )
    requests = [
        ImageRequest(f"{family}/{number}", family, text, number, sample_seed(0, family, number))
        for text, family, number in wanted
    ]
    return np.stack([image.pixels for batch in sample_images(model, requests, settings) for image in batch])


def _obedience(
    judge: HeadClassifier, images: np.ndarray, cells: list[tuple[int, int, int]], people: EmojiSet
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    labels = [[GENDERS[g] for _, g, _ in cells], [TONES[t] for _, _, t in cells]]
    shown_by_axis = (people.gender_visible, people.tone_visible)
    for outcome, requested, visible in zip(
        judge.probabilities(images, MEASURED_AXES), labels, shown_by_axis, strict=True
    ):
        shown = np.array([bool(visible[people.role == role].all()) for role, _, _ in cells])
        perceived = _best(outcome)
        kept = [i for i in range(len(cells)) if shown[i]]
        share = obedience(
            [requested[i] for i in kept],
            [perceived[i] for i in kept],
            [ROLES[cells[i][0]].key for i in kept],
            rng=np.random.default_rng(0),
        ).among_known
        found[outcome.axis.name] = [round(share.value, 4), round(share.low, 4), round(share.high, 4), share.n]
    logits, _ = judge.logits("subject", images)
    found["subject"] = round(float((logits.argmax(axis=1) == np.array([role for role, _, _ in cells])).mean()), 4)
    return found


def _best(outcome: AxisProbabilities) -> list[str]:
    places: list[int] = outcome.probabilities.argmax(axis=1).tolist()
    return [outcome.axis.groups[place] for place in places]


def _disparity(judge: HeadClassifier, images: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for outcome in judge.probabilities(images, MEASURED_AXES):
        groups = len(outcome.axis.groups)
        best = outcome.probabilities.argmax(axis=1).reshape(len(ROLES), NEUTRAL_IMAGES)
        counts = np.stack([(best == group).sum(axis=1) for group in range(groups)], axis=1)
        found[outcome.axis.name] = {
            "mean_l2": round(float(l2_discrepancy(counts, outcome.axis.uniform()).mean()), 3),
            "floor": round(float(sampling_floor(NEUTRAL_IMAGES, groups)), 3),
            "shares": [round(float(share), 3) for share in counts.sum(axis=0) / counts.sum()],
        }
    return found


def _confusions(builder: ZeroShotClassifier, people: EmojiSet, chosen: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    outcomes = builder.probabilities(people.images[chosen], MEASURED_AXES)
    for outcome, labels in zip(outcomes, (people.gender[chosen], people.tone[chosen]), strict=True):
        groups = [str(group) for group in outcome.axis.groups]
        perceived = _best(outcome)
        named = [groups[int(label)] for label in np.asarray(labels)]
        matrix = confusion_matrix(named, perceived, outcome.axis)
        found[outcome.axis.name] = matrix.tolist()
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(Path(".emoji-build")), indent=1) + "\n")
