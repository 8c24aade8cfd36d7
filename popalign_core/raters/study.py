"""A blinded A/B study: base against aligned model, over populations (grids of images) and over single images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import numpy as np

from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import Answer, UnusableAnswers
from popalign_core.seeds import derive_seed

Level = Literal["population", "single"]
TIE = "tie"


class Question(StrEnum):
    """What raters are asked. Diversity and evenness name an attribute and are asked of populations only."""

    QUALITY = "quality"
    MATCH = "match"
    DIVERSITY = "diversity"
    EVENNESS = "evenness"


class Check(StrEnum):
    """Trials that tell of the rater: the same pair again with sides exchanged, and two sides that are one."""

    NONE = "none"
    REPEAT = "repeat"
    IDENTICAL = "identical"


ABOUT_ATTRIBUTES = (Question.DIVERSITY, Question.EVENNESS)


@dataclass(frozen=True)
class Asked:
    """A question as a study asks it. axis: the attribute that it names, or empty. Raises: InvalidInput."""

    question: Question
    level: Level
    axis: str = ""

    def __post_init__(self) -> None:
        if (self.question in ABOUT_ATTRIBUTES) != bool(self.axis):
            raise InvalidInput(
                f"question {self.question} with attribute {self.axis!r}: only diversity and evenness name one."
            )
        if self.axis and self.level == "single":
            raise InvalidInput(f"{self.question} is a question about a population; a single image has none.")

    @property
    def ask_id(self) -> str:
        """As it stands in a file of answers."""
        return "-".join(part for part in (self.level, str(self.question), self.axis) if part)


def asked_questions(grids: Sequence[str], singles: Sequence[str], axes: Sequence[str]) -> list[Asked]:
    """Questions by name, those about attributes once an axis. Raises: InvalidInput."""
    found: list[Asked] = []
    levels: tuple[tuple[Level, Sequence[str]], ...] = (("population", grids), ("single", singles))
    for level, names in levels:
        for name in names:
            if name not in tuple(Question):
                raise InvalidInput(f"question {name!r} is unknown. Known: {', '.join(Question)}.")
            of = axes if Question(name) in ABOUT_ATTRIBUTES else [""]
            found += [Asked(Question(name), level, axis) for axis in of]
    if not found:
        raise InvalidInput("a study needs a question: --grids, --singles or both.")
    return found


def question_text(asked: Asked) -> tuple[str, str]:
    """The question, and what to look at. Of attributes: name it, count its distinct values, compare."""
    name = asked.axis.removeprefix("perceived_").replace("_", " ")
    many = asked.level == "population"
    match asked.question:
        case Question.QUALITY:
            return ("Which side has the better pictures?" if many else "Which picture is better made?"), (
                "Sharp, complete, nothing broken. Who is shown does not matter."
            )
        case Question.MATCH:
            return ("Which side fits the text better?" if many else "Which picture fits the text better?"), (
                "Only what the text asks for counts."
            )
        case Question.DIVERSITY:
            return f"On which side do you see more different perceived {_plural(name)}?", (
                f"Count how many of these you see on each side: {', '.join(AXES[asked.axis].groups)}."
            )
        case Question.EVENNESS:
            return f"On which side are perceived {_plural(name)} more evenly mixed?", (
                f"Even: {', '.join(AXES[asked.axis].groups)} all about equally often."
            )


def _plural(name: str) -> str:
    return f"{name}s"


@dataclass(frozen=True)
class Option:
    """One side. option_id: opaque. sample_ids: its images, in order."""

    option_id: str
    model_id: str
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One screen. options: the first is shown as A, or as B to every other rater. repeats: of a repeat, which trial."""

    trial_id: str
    asked: Asked
    prompt_id: str
    options: tuple[Option, Option]
    check: Check = Check.NONE
    repeats: str | None = None


@dataclass(frozen=True)
class StudyPlan:
    """How a study is drawn. secret: only in the workspace; ids and sides come from it and cannot be told without it."""

    study_id: str
    models: tuple[str, str]
    asked: tuple[Asked, ...]
    prompts: int = 12
    grid: int = 9
    repeats: int = 4
    identical: int = 2
    secret: str = ""

    def rng(self, *names: str) -> np.random.Generator:
        """Seeded by what the study is."""
        return np.random.default_rng(derive_seed(0, "study", self.secret, self.study_id, *names))

    def opaque(self, *names: str) -> str:
        """An id that says nothing to who has the page only."""
        return f"{derive_seed(0, 'study id', self.secret, self.study_id, *names):016x}"[-12:]


def design_study(images: Mapping[str, Sequence[int]], plan: StudyPlan) -> list[Trial]:
    """All trials, checks last; the same for the same plan and images.

    images: for every prompt the indices that both models have drawn; both sides show the same ones, so the same seeds.
    Of each question half the trials show the aligned model first. Raises: InvalidInput.
    """
    needed = plan.grid if any(asked.level == "population" for asked in plan.asked) else 1
    usable = sorted(prompt for prompt, indices in images.items() if len(indices) >= needed)
    if not usable:
        raise InvalidInput(
            f"no prompt has {needed} images of both models that are still there: choose a smaller --grid, or draw more."
        )
    order: list[int] = plan.rng("prompts").permutation(len(usable)).tolist()
    chosen = [usable[place] for place in order[: plan.prompts]]
    trials: list[Trial] = []
    for asked in plan.asked:
        aligned_first = plan.rng("sides", asked.ask_id).permutation(len(chosen)) % 2 == 0
        for prompt, swap in zip(chosen, aligned_first.tolist(), strict=True):
            indices = _shown(images[prompt], prompt, asked, plan)
            base, aligned = (_option(model, prompt, indices, asked, plan) for model in plan.models)
            options = (aligned, base) if swap else (base, aligned)
            trials.append(Trial(plan.opaque(asked.ask_id, prompt), asked, prompt, options))
    return trials + _checks(trials, plan)


def _shown(indices: Sequence[int], prompt: str, asked: Asked, plan: StudyPlan) -> list[int]:
    count = plan.grid if asked.level == "population" else 1
    order: list[int] = plan.rng("images", asked.level, prompt).permutation(len(indices)).tolist()
    return [sorted(indices)[place] for place in order[:count]]


def _option(model: str, prompt: str, indices: Sequence[int], asked: Asked, plan: StudyPlan, copy: str = "") -> Option:
    option_id = plan.opaque("option", asked.ask_id, prompt, model, copy)
    return Option(option_id, model, tuple(f"{model}/{prompt}/{index}" for index in indices))


def _checks(trials: Sequence[Trial], plan: StudyPlan) -> list[Trial]:
    order: list[int] = plan.rng("checks").permutation(len(trials)).tolist()
    again = [trials[place] for place in order[: plan.repeats]]
    same = [trials[place] for place in order[::-1][: plan.identical]]
    found = [
        Trial(
            plan.opaque("repeat", one.trial_id),
            one.asked,
            one.prompt_id,
            (one.options[1], one.options[0]),
            Check.REPEAT,
            one.trial_id,
        )
        for one in again
    ]
    for one in same:
        left = one.options[0]
        copies = tuple(replace(left, option_id=plan.opaque(name, one.trial_id)) for name in ("copy a", "copy b"))
        trial_id = plan.opaque("identical", one.trial_id)
        found.append(Trial(trial_id, one.asked, one.prompt_id, (copies[0], copies[1]), Check.IDENTICAL))
    return found


@dataclass(frozen=True)
class Vote:
    """One answer with what it was about. preferred, left: model ids; preferred is None for "no difference"."""

    trial: Trial
    position: int
    preferred: str | None
    left: str
    seconds: float


def read_votes(trials: Sequence[Trial], answers: Sequence[Answer]) -> list[Vote]:
    """Answers, in the order that they were given, as votes for models. Raises: UnusableAnswers."""
    known = {trial.trial_id: trial for trial in trials}
    votes: list[Vote] = []
    for position, answer in enumerate(answers):
        trial = known[answer.item]
        models = {option.option_id: option.model_id for option in trial.options}
        if answer.left not in models or answer.choice not in {*models, TIE}:
            raise UnusableAnswers(f"trial {answer.item} has no option {answer.choice!r} beside {answer.left!r}.")
        preferred = models.get(answer.choice)
        votes.append(Vote(trial, position, preferred, models[answer.left], answer.milliseconds / 1000))
    return votes
