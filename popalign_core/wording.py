"""The one template by which a subject becomes a caption, neutral or naming groups.

The emoji model was trained on exactly this wording. Words for groups stand in a fixed order: age, skin tone, race,
gender. They go in front of the subject; in front of the word "person" where the subject has it, which a gender then
replaces; and for a couple they replace the word "couple".

    firefighter     a photo of a firefighter       a photo of a dark skinned woman firefighter
    person surfing  a photo of a person surfing    a photo of a dark skinned woman surfing
    couple hiking   a photo of a couple hiking     a photo of two women hiking
"""

import re
from collections.abc import Mapping

from popalign_core.attributes import PerceivedCouple, PerceivedRace

PERSON = "person"
COUPLE = "couple"
_RACE_WORDS = {
    PerceivedRace.WHITE.value: "White",
    PerceivedRace.ASIAN.value: "Asian",
    PerceivedRace.BLACK.value: "Black",
    PerceivedRace.LATINO_HISPANIC.value: "Latino",
    PerceivedRace.INDIAN.value: "Indian",
    PerceivedRace.MIDDLE_EASTERN.value: "Middle Eastern",
}
# Sound decides, not spelling: "a university", "a European", "an hour".
_CONSONANT_SOUND = re.compile(r"(?:eu|uni(?!n|m)|us[aeu]|uti|ute|one\b|once)", re.IGNORECASE)
_SILENT_H = re.compile(r"(?:hour|honest|honou?r|heir)", re.IGNORECASE)
_SPELLED_OUT = re.compile(r"[A-Z](?:[A-Z]+|(?=-))")
_LETTERS_WITH_VOWEL_SOUND = "AEFHILMNORSX"


def with_article(phrase: str) -> str:
    """The phrase behind the right one of "a" and "an" for its first word. phrase: not empty."""
    if spelled := _SPELLED_OUT.match(phrase):
        vowel = spelled[0][0] in _LETTERS_WITH_VOWEL_SOUND
    elif _SILENT_H.match(phrase):
        vowel = True
    else:
        vowel = phrase[0].lower() in "aeiou" and not _CONSONANT_SOUND.match(phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


def neutral_wording(subject: str, prefix: str) -> str:
    """The caption that names no group."""
    return prefix + with_article(subject)


def specific_wording(subject: str, requested: Mapping[str, str], prefix: str) -> str:
    """The caption that names the requested groups.

    requested: group by axis name. A couple and a gender never stand together, and a couple needs a subject that
    begins with "couple" (`expand_prompts` sees to both).
    """
    adjectives = _adjectives(requested)
    words = subject.split()
    if couple := requested.get("perceived_couple"):
        return prefix + " ".join([_couple(couple, adjectives), *words[1:]])
    gender = requested.get("perceived_gender")
    lower = [word.lower() for word in words]
    if PERSON in lower:
        place = lower.index(PERSON)
        words[place : place + 1] = [*adjectives, gender or PERSON]
    else:
        words = [*adjectives, *([gender] if gender else []), *words]
    return prefix + with_article(" ".join(words))


def is_couple(subject: str) -> bool:
    """Whether a subject is a couple and not one person."""
    return subject.lower().split()[:1] == [COUPLE]


def _adjectives(requested: Mapping[str, str]) -> list[str]:
    words: list[str] = []
    if age := requested.get("perceived_age"):
        words.append(age)
    if tone := requested.get("perceived_skin_tone"):
        words.append(f"{tone} skinned")
    if race := requested.get("perceived_race"):
        words.append(_RACE_WORDS[race])
    return words


def _couple(group: str, adjectives: list[str]) -> str:
    if group == PerceivedCouple.MAN_WOMAN:
        return " and ".join(with_article(" ".join([*adjectives, one])) for one in ("man", "woman"))
    number, people = group.split()
    return " ".join([number, *adjectives, people])
