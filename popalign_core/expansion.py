"""From subjects to prompts: a neutral one each, and one that names the groups for every cell of the crossed axes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from popalign_core.attributes import AXES, Axis, cross_axes
from popalign_core.config import ExpansionConfig
from popalign_core.errors import InvalidInput
from popalign_core.prompt_sets import load_subjects
from popalign_core.subjects import (
    SPLITS,
    NoPrompts,
    Split,
    Subject,
    check_subjects,
    clean_subject,
    refuse_group_words,
)
from popalign_core.wording import is_couple, neutral_wording, specific_wording

Kind = Literal["neutral", "specific", "fact", "no_person"]
PREFIX = "a photo of "


@dataclass(frozen=True)
class Prompt:
    """One caption. A specific one names a group on every axis and has the neutral one as its parent.

    requested: group by axis name, in the order of the axes; empty for a neutral prompt. Of a fact (a control: see
    `controls`): the groups that are known of who is depicted.
    """

    prompt_id: str
    text: str
    split: Split
    suite: str
    subject: str
    kind: Kind
    parent_id: str | None
    requested: dict[str, str] = field(hash=False)
    prefix: str

    @property
    def family_id(self) -> str:
        """The neutral prompt's id: what the seeds of a whole family are made from."""
        return self.parent_id or self.prompt_id

    @property
    def cell(self) -> tuple[str, ...]:
        """The requested groups in the order of the axes; empty for a neutral prompt."""
        return tuple(self.requested.values())


class AxisDoesNotFit(InvalidInput):
    """An axis has no meaning for a subject, or for another axis."""


def prompt_id(text: str) -> str:
    """12 hexadecimal digits that depend on the caption alone (BLAKE2b)."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def prompts_of(config: ExpansionConfig) -> list[Prompt]:
    """All prompts of a run. Raises: InvalidInput where one is not usable, or a split has none."""
    subjects = load_subjects(config.prompts, config.max_subjects)
    prompts = expand_prompts(subjects, [AXES[name] for name in config.axes], config.prefix)
    if missing := [split for split in SPLITS if all(prompt.split != split for prompt in prompts)]:
        raise NoPrompts(
            f"{', '.join(config.prompts)} has no prompts for {' and '.join(missing)}: a model is trained on one split, "
            'chosen on another and judged on the third. Add "validation=path" or "eval=path", or a built-in set.'
        )
    return prompts


def expand_prompts(subjects: Sequence[Subject], axes: Sequence[Axis], prefix: str = PREFIX) -> list[Prompt]:
    """Per subject the neutral prompt, then one for every cell in the order of `itertools.product` over the axes.

    prefix: the same for all of them, so that no pair differs in style; a missing space at its end is added.
    Raises: errors of `check_subjects`; GroupWordInPrompt for the prefix; AxisDoesNotFit; InvalidInput without an axis.
    """
    check_subjects(subjects)
    prefix = " ".join(prefix.split()) + " " if prefix.strip() else ""
    refuse_group_words([prefix])
    cross_axes(axes)
    prompts: list[Prompt] = []
    for subject in subjects:
        _require_fitting(subject, [axis.name for axis in axes])
        prompts += _family(subject, axes, prefix)
    return prompts


def _family(subject: Subject, axes: Sequence[Axis], prefix: str) -> list[Prompt]:
    words = clean_subject(subject.text)

    def prompt(text: str, parent_id: str | None, requested: dict[str, str]) -> Prompt:
        kind: Kind = "specific" if requested else "neutral"
        return Prompt(prompt_id(text), text, subject.split, subject.suite, words, kind, parent_id, requested, prefix)

    neutral = prompt(neutral_wording(words, prefix), None, {})
    family = [neutral]
    for cell in product(*(axis.groups for axis in axes)):
        # Plain text, not enum members: what a table gives back must be equal.
        requested = {axis.name: str(group) for axis, group in zip(axes, cell, strict=True)}
        family.append(prompt(specific_wording(words, requested, prefix), neutral.prompt_id, requested))
    return family


def _require_fitting(subject: Subject, axes: Sequence[str]) -> None:
    if len(set(axes)) < len(axes):
        raise AxisDoesNotFit(f"an axis is named twice: {', '.join(axes)}.")
    if {"perceived_couple", "perceived_gender"}.issubset(axes):
        raise AxisDoesNotFit(
            "perceived_couple and perceived_gender cannot be crossed: the genders of both people are what a couple is."
        )
    if "perceived_couple" in axes and not is_couple(clean_subject(subject.text)):
        raise AxisDoesNotFit(
            f"perceived_couple needs subjects that begin with 'couple', and {subject.text!r} does not. "
            "Use the set 'couples', or leave the axis out."
        )
    if "perceived_gender" in axes and is_couple(clean_subject(subject.text)):
        raise AxisDoesNotFit(f"perceived_gender is of one person, and {subject.text!r} is two: use perceived_couple.")
