"""How much a run would do, counted from its configuration: prompts, images, classifications, steps."""

from collections import Counter
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.controls import CONTROLS, load_controls
from popalign_core.prompt_sets import load_subjects
from popalign_core.sample_sets import slices
from popalign_core.subjects import SPLITS

BASE = "base"
# In the place of the model that validation will have chosen.
KEPT = "kept"
GROUPS = {
    "round": "own images for training",
    "counterfactual": "counterfactuals",
    "validation": "validation",
    "evaluation": "held-out prompts",
    "trained": "trained prompts again",
    "obedience": "identity-specific held-out prompts",
    "controls": "controls",
}
ASSESSED = ("evaluation", "trained", "obedience", "controls")


@dataclass(frozen=True)
class ImageSet:
    """Images of one model for one purpose. at_most: fewer where populations are at their target.

    model_id: base, round-<n>, kept or kept-seed-<k>. purpose: "validation", "round-2", ...: what the keys of its shards
    begin with. role: builder or judge, who classifies them. seconded: the builder classifies them as well as the judge.
    """

    model_id: str
    purpose: str
    images: int
    role: Literal["builder", "judge"]
    at_most: bool = False
    seconded: bool = False

    @property
    def group(self) -> str:
        """The purpose without its round."""
        return self.purpose.partition("-")[0]


@dataclass(frozen=True)
class Training:
    """One round of fine-tuning."""

    model_id: str
    steps: int
    pairs_per_step: int

    @property
    def pairs(self) -> int:
        """Pairs that all steps come to."""
        return self.steps * self.pairs_per_step


@dataclass(frozen=True)
class Workload:
    """neutral, specific: prompts by split. Every round is counted; a run may stop after fewer."""

    neutral: dict[str, int]
    specific: dict[str, int]
    image_sets: tuple[ImageSet, ...]
    trainings: tuple[Training, ...]

    @property
    def images(self) -> int:
        """Images of all sets."""
        return sum(wanted.images for wanted in self.image_sets)


def workload(config: RunConfig) -> Workload:
    """What the run draws and trains, in the order in which it does. Raises: errors of `load_subjects`."""
    subjects = load_subjects(config.expansion.prompts, config.expansion.max_subjects)
    taken = Counter(subject.split for subject in subjects)
    cells = prod(len(AXES[name].groups) for name in config.expansion.axes)
    neutral = {str(split): taken[split] for split in SPLITS}
    specific = {split: count * cells for split, count in neutral.items()}

    controls = Counter(prompt.kind for prompt in load_controls(config.expansion.controls, ""))

    def images(purpose: str) -> int:
        prompts = {"neutral": neutral, "specific": specific, **{kind: {"eval": controls[kind]} for kind in CONTROLS}}
        return sum(prompts[part.kind][part.split] * part.per_prompt for part in slices(purpose, config.images))

    sets = [ImageSet(BASE, "validation", images("validation"), "builder")]
    # A policy gradient draws its own, and keeps none of them.
    own = config.alignment.objective == "reward"
    for number in range(1, config.alignment.rounds + 1):
        if not own and (config.alignment.redraw or number == 1):
            parent = f"round-{number - 1}" if number > 1 else BASE
            sets.append(ImageSet(parent, f"round-{number}", images("round"), "builder"))
            if config.populations.winners == "counterfactual":
                most = neutral["train"] * config.images.train_neutral
                sets.append(ImageSet(parent, f"counterfactual-{number}", most, "builder", at_most=True))
        sets.append(ImageSet(f"round-{number}", "validation", images("validation"), "builder"))
    seconded = {"evaluation", "controls"} if config.classification.agreement else {"controls"}
    sets += [
        ImageSet(model, purpose, images(purpose), "judge", seconded=purpose in seconded)
        for model in (BASE, KEPT)
        for purpose in ASSESSED
    ]
    alignment = config.alignment
    trainings = [
        Training(f"round-{number}", alignment.steps, alignment.pairs_per_step)
        for number in range(1, alignment.rounds + 1)
    ]
    # Trained like the kept model; without redraw that is all rounds at the most.
    steps = alignment.steps * (1 if alignment.redraw else alignment.rounds)
    for index in range(1, alignment.seeds):
        sets.append(ImageSet(f"{KEPT}-seed-{index}", "evaluation", images("evaluation"), "judge"))
        trainings.append(Training(f"{KEPT}-seed-{index}", steps, alignment.pairs_per_step))
    return Workload(neutral, specific, tuple(wanted for wanted in sets if wanted.images), tuple(trainings))


def shard_sizes(images: int, shard_size: int) -> list[int]:
    """Images of each shard that a set is cut into."""
    return [min(shard_size, images - start) for start in range(0, images, shard_size)]


def drawn_places(images: int, batch_size: int) -> int:
    """Places in the batches of a shard: every batch is full, the last one with repeats, and costs the same."""
    return ceil(images / batch_size) * batch_size


def passes_per_image(steps: int, guidance_scale: float) -> int:
    """Calls of the UNet for one image: guidance doubles them."""
    return steps * (2 if guidance_scale > 1 else 1)
