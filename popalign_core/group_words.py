"""Words that name a group. A neutral prompt must hold none of them: its population would not be the model's own.

Whole words are matched, never parts ("blacksmith" names no group), and any use of the word counts ("white-collar"
does). A word that names a gender by itself is a group word too: compounds in -man and -woman ("policeman") and the
words whose dictionary definition names one ("waitress", "waiter", "mother").
"""

import re

from popalign_core.attributes import AXES

_GENDER = (
    "men women male female masculine feminine gentleman gentlemen lady ladies boy girl guy gal dude lad he she him her "
    "his hers mother father mom mum dad son daughter brother sister husband wife uncle aunt grandmother grandfather "
    "grandma grandpa bride widow widower king queen prince princess duke duchess nun monk waiter waitress actress "
    "hostess stewardess seamstress governess mistress headmaster headmistress heiress goddess masseur masseuse "
    "comedienne ballerina housewife househusband"
)
_RACE = (
    "latino latina latinx latine hispanic caucasian african arab arabian oriental chinese japanese korean vietnamese "
    "mexican"
)
_SKIN_TONE = "pale tanned darker lighter brown-skinned olive-skinned fair-skinned"
_AGE = "younger youngest older oldest elderly aged teen teenage teenager"
# Words that only look like compounds with "man" or "men".
_NO_COMPOUNDS = frozenset(
    "human superhuman shaman german roman norman ottoman talisman caiman omen specimen regimen abdomen acumen".split()
)
_WORD = re.compile(r"[^\W\d_]+")
_COMPOUND = re.compile(r".+(?:man|men)")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, hyphens and punctuation gone."""
    return _WORD.findall(text.casefold())


def singular(word: str) -> str:
    """An English noun without its plural ending, by spelling alone; other words as they are."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "ches", "shes", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _vocabulary() -> frozenset[tuple[str, ...]]:
    groups = [words_of(group) for axis in AXES.values() for group in axis.groups]
    listed = [words_of(word) for word in " ".join((_GENDER, _RACE, _SKIN_TONE, _AGE)).split()]
    return frozenset(tuple(map(singular, words)) for words in groups + listed)


GROUP_WORDS = _vocabulary()
_LONGEST = max(map(len, GROUP_WORDS))


def find_group_words(text: str) -> list[str]:
    """The group words of a text, in their order; empty for a neutral one."""
    words = words_of(text)
    stems = tuple(map(singular, words))
    found: list[str] = []
    for start, stem in enumerate(stems):
        if _COMPOUND.fullmatch(stem) and stem not in _NO_COMPOUNDS and (stem,) not in GROUP_WORDS:
            found.append(words[start])
        for length in range(1, _LONGEST + 1):
            if len(stems[start : start + length]) == length and stems[start : start + length] in GROUP_WORDS:
                found.append(" ".join(words[start : start + length]))
    return found
