"""Which images a run draws for which purpose, in a fixed order that shards cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from popalign_core.config import ImageCounts
from popalign_core.errors import UnknownName
from popalign_core.expansion import Prompt
from popalign_core.sampling import ImageRequest
from popalign_core.seeds import sample_seed

# Trained prompts are measured on noise that no round has used.
TRAINED_FIRST = 1_000_000
Purpose = Literal["validation", "evaluation", "trained", "obedience", "controls", "round"]


@dataclass(frozen=True)
class Slice:
    """A number of images for every prompt of a split and kind, from a first index on.

    family_images: indices that a family has in this slice; specific prompts share them out among themselves.
    """

    split: str
    kind: str
    first_index: int
    per_prompt: int
    family_images: int


def slices(purpose: str, images: ImageCounts, round_index: int = 1) -> list[Slice]:
    """What a purpose draws. Every round has images of its own, with the same indices for neutral and specific prompts.

    A further "round" of the evaluation draws as many as all before it. Raises: UnknownName.
    """
    first = (round_index - 1) * images.train_neutral
    doubled = images.evaluation * 2 ** max(round_index - 2, 0)
    known = {
        "validation": [Slice("validation", "neutral", 0, images.validation, images.validation)],
        "evaluation": [Slice("eval", "neutral", doubled if round_index > 1 else 0, doubled, doubled)],
        "trained": [Slice("train", "neutral", TRAINED_FIRST, images.trained, images.trained)],
        "obedience": [Slice("eval", "specific", 0, images.obedience, images.evaluation)],
        "controls": [Slice("eval", kind, 0, images.controls, images.controls) for kind in ("fact", "no_person")],
        "round": [
            Slice("train", "neutral", first, images.train_neutral, images.train_neutral),
            Slice("train", "specific", first, images.train_specific, images.train_neutral),
        ],
    }
    if purpose not in known:
        raise UnknownName(kind="purpose", got=purpose, known=list(known))
    return known[purpose]


def image_requests(
    prompts: Sequence[Prompt], wanted: Sequence[Slice], *, model_id: str, run_seed: int, cells: int
) -> list[ImageRequest]:
    """All requests of the slices, by prompt and index.

    The c-th of a neutral prompt's `cells` specific prompts takes the family's indices c * per_prompt ..., beginning
    again where they are used up, so that every specific image shares its initial noise with a neutral one. Only a
    prompt that needs more images than its family has goes on past them.
    """
    requests: list[ImageRequest] = []
    position: dict[str, int] = {}
    for part in wanted:
        for prompt in prompts:
            if (prompt.split, prompt.kind) != (part.split, part.kind):
                continue
            start = 0
            if prompt.parent_id is not None:
                rank = position.get(prompt.parent_id, 0)
                position[prompt.parent_id] = rank + 1
                start = (rank % cells) * part.per_prompt
            span = max(part.family_images, part.per_prompt)
            for place in range(start, start + part.per_prompt):
                index = part.first_index + place % span
                requests.append(
                    ImageRequest(
                        sample_id=f"{model_id}/{prompt.prompt_id}/{index}",
                        prompt_id=prompt.prompt_id,
                        text=prompt.text,
                        index=index,
                        seed=sample_seed(run_seed, prompt.family_id, index),
                    )
                )
    return requests
