"""What neutral prompts are about, and what makes a list of them usable: no group named, none twice, splits apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.group_words import find_group_words, singular, words_of
from popalign_core.wording import PERSON

Split = Literal["train", "validation", "eval"]
SPLITS: tuple[Split, ...] = get_args(Split)
# "C++ developer" is not "C developer", nor a 2D artist a 3D artist.
_KEY_WORD = re.compile(r"[^\W_]+[+#]*")
_ARTICLES = ("a", "an", "the")
# Other names of one occupation. Not complete: no list can be.
_SYNONYMS = {
    "attorney": "lawyer",
    "automotive mechanic": "auto mechanic",
    "cab driver": "taxi driver",
    "car mechanic": "auto mechanic",
    "ceo": "chief executive",
    "chief executive officer": "chief executive",
    "cop": "police officer",
    "custodian": "janitor",
    "disc jockey": "dj",
    "emt": "emergency medical technician",
    "estate agent": "real estate agent",
    "garbage collector": "waste collector",
    "hair stylist": "hairdresser",
    "hairstylist": "hairdresser",
    "hr manager": "human resources manager",
    "letter carrier": "mail carrier",
    "mortician": "funeral director",
    "physician": "doctor",
    "physiotherapist": "physical therapist",
    "postal carrier": "mail carrier",
    "programmer": "software developer",
    "realtor": "real estate agent",
    "refuse collector": "waste collector",
    "software engineer": "software developer",
    "undertaker": "funeral director",
    "vet": "veterinarian",
    "veterinary surgeon": "veterinarian",
}


@dataclass(frozen=True)
class Subject:
    """What one neutral prompt is about ("firefighter", "person surfing", "couple hiking"), without an article."""

    text: str
    suite: str
    split: Split


class NoPrompts(InvalidInput):
    """The list of subjects is empty."""


class BlankSubject(InvalidInput):
    """A subject has no words."""


class GroupWordInPrompt(InvalidInput):
    """A neutral prompt names a group."""


class SubjectTwice(InvalidInput):
    """A split has a subject twice; case, spaces, articles, plural and listed synonyms do not make another subject."""


class SplitsOverlap(InvalidInput):
    """A subject is in two splits, so that a model would be assessed on what it was trained on."""


def clean_subject(text: str) -> str:
    """The subject as it is worded: single spaces, no leading article, no full stop at the end."""
    words = text.strip().rstrip(".").split()
    if len(words) > 1 and words[0].lower() in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def subject_key(text: str) -> str:
    """What two wordings of one subject have in common.

    Blind to case, spaces, hyphens, articles, plural, the word "person" ("person surfing" is "surfing", "a friendly
    person" is "friendly") and to listed synonyms.
    """
    stems = [singular(word) for word in _KEY_WORD.findall(text.casefold()) if word not in _ARTICLES]
    stems = [word for word in stems if word not in (PERSON, "people")] or stems
    name = " ".join(stems)
    return _SYNONYMS.get(name, name).replace(" ", "")


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Refuses a list that cannot be expanded.

    Raises: NoPrompts, UnknownName (split), BlankSubject, GroupWordInPrompt, SubjectTwice, SplitsOverlap.
    """
    if not subjects:
        raise NoPrompts("there are no prompts: at least one subject is needed.")
    for subject in subjects:
        if subject.split not in SPLITS:
            raise UnknownName(kind="split", got=subject.split, known=list(SPLITS))
        if not words_of(clean_subject(subject.text)):
            raise BlankSubject(f"{subject.text!r} (suite {subject.suite!r}) is no subject: it has no words.")
    refuse_group_words([subject.text for subject in subjects])
    _refuse_repeats(subjects)


def refuse_group_words(texts: Sequence[str]) -> None:
    """Raises: GroupWordInPrompt with every text that names a group."""
    found = {text: words for text in texts if (words := find_group_words(text))}
    if found:
        named = "; ".join(f"{text!r} ({', '.join(words)})" for text, words in found.items())
        raise GroupWordInPrompt(
            f"neutral prompts must name no group, and these do: {named}. Leave the words out: the axes add them."
        )


def _refuse_repeats(subjects: Sequence[Subject]) -> None:
    first: dict[str, Subject] = {}
    repeats: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for subject in subjects:
        earlier = first.setdefault(subject_key(subject.text), subject)
        if earlier is not subject:
            repeats.setdefault((earlier.split, subject.split), []).append((earlier.text, subject.text))
    for (earlier, later), pairs in repeats.items():
        if earlier == later:
            raise SubjectTwice(f"the {earlier} prompts name a subject twice: {_listed(pairs)}. Keep one of each.")
        raise SplitsOverlap(f"the splits {earlier} and {later} share subjects: {_listed(pairs)}. Keep them in one.")


def _listed(pairs: Sequence[tuple[str, str]], most: int = 5) -> str:
    named = ", ".join(repr(one) if one == other else f"{one!r} and {other!r}" for one, other in pairs[:most])
    return named + (f" and {len(pairs) - most} more" if len(pairs) > most else "")
