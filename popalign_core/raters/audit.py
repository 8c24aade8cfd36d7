"""A blinded audit of a classifier: a random sample of images, stratified by what the classifier said of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.attributes import AXES, Axis
from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import Answer, UnusableAnswers
from popalign_core.seeds import derive_seed

CANNOT_TELL_CHOICE, NO_PERSON_CHOICE = "cannot_tell", "no_person"


@dataclass(frozen=True)
class Candidate:
    """An image that could be audited. predicted: axis -> outcome, a group, "no person" or "unknown"."""

    sample_id: str
    model_id: str
    prompt_id: str
    predicted: Mapping[str, str]

    @property
    def stratum(self) -> str:
        """Model and predicted outcomes together: within it, every image is as likely to be audited."""
        return " | ".join([self.model_id, *(self.predicted[axis] for axis in sorted(self.predicted))])


@dataclass(frozen=True)
class AuditedImage:
    """An image of the sample. item_id: opaque. inclusion_probability: with which it was drawn."""

    item_id: str
    candidate: Candidate
    inclusion_probability: float


def draw_audit(candidates: Sequence[Candidate], images: int, audit_id: str, secret: str) -> list[AuditedImage]:
    """A stratified random sample, in an order that says nothing; the same for the same candidates and secret.

    images: of the sample in all, shared out so that small strata are audited whole and large ones alike (two at least
    where there are two). secret: only in the workspace. Raises: InvalidInput.
    """
    strata: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda one: one.sample_id):
        strata.setdefault(candidate.stratum, []).append(candidate)
    least = sum(min(2, len(own)) for own in strata.values())
    if not strata or images < least:
        raise InvalidInput(
            f"an audit of {images} images is too small for {len(strata)} strata (model and predicted groups): it needs "
            f"{least} at least, two of each. Raise --images."
        )
    sizes = allocate({name: len(own) for name, own in strata.items()}, images)
    found: list[AuditedImage] = []
    for name, own in strata.items():
        rng = np.random.default_rng(derive_seed(0, "audit", secret, audit_id, name))
        order: list[int] = rng.permutation(len(own)).tolist()
        for place in order[: sizes[name]]:
            item_id = f"{derive_seed(0, 'audit id', secret, audit_id, own[place].sample_id):016x}"[-12:]
            found.append(AuditedImage(item_id, own[place], sizes[name] / len(own)))
    return sorted(found, key=lambda image: image.item_id)


def allocate(strata: Mapping[str, int], images: int) -> dict[str, int]:
    """Images of each stratum: as even as their sizes allow, which is best for a matrix with a row for each."""
    left, sizes = images, dict.fromkeys(strata, 0)
    open_strata = sorted(strata, key=lambda name: (strata[name], name))
    for place, name in enumerate(open_strata):
        sizes[name] = min(strata[name], left // (len(open_strata) - place))
        left -= sizes[name]
    return sizes


@dataclass(frozen=True)
class Judgement:
    """What one auditor said of one image on one axis. group is None unless status is ok."""

    item_id: str
    axis: str
    group: str | None
    status: str
    seconds: float


def audit_choices(axis: Axis) -> list[str]:
    """What can be answered: the whole vocabulary, "cannot tell" and "no person"."""
    return [*axis.groups, CANNOT_TELL_CHOICE, NO_PERSON_CHOICE]


def read_judgements(answers: Sequence[Answer]) -> list[Judgement]:
    """Answers as judgements; ask is the axis. Raises: UnusableAnswers."""
    found: list[Judgement] = []
    for answer in answers:
        axis = AXES[answer.ask]
        if answer.choice not in audit_choices(axis):
            raise UnusableAnswers(f"{answer.choice!r} is no answer to {axis.name}: {', '.join(audit_choices(axis))}.")
        group = answer.choice if answer.choice in axis.groups else None
        status = "ok" if group else answer.choice
        found.append(Judgement(answer.item, axis.name, group, status, answer.milliseconds / 1000))
    return found
