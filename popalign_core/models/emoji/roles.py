"""The people that the emoji model can draw, and the skew that its training data carries on purpose.

Shares of men for occupations are rounded to 5 points from published United States statistics (the model card names
table and year per row). Activities have no such statistic: they share one default, stated by this project, that says
nothing about the world. Skin tones follow one stated skewed distribution everywhere. So the skew has both forms that
deployed models show: a default that all neutral captions fall back on, and a lean of its own for every occupation.
"""

from dataclasses import dataclass
from typing import Literal

VENDORS = ("noto", "twemoji", "fluent")
GENDERS = ("man", "woman")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE_SHARES = (0.55, 0.20, 0.12, 0.08, 0.05)
ACTIVITY_MEN_SHARE = 0.90


@dataclass(frozen=True)
class Role:
    """One role in all three emoji sets: its key there, its wording in a caption and the men's share in training."""

    key: str
    wording: str
    kind: Literal["occupation", "activity"]
    men_share: float


def _occupations(**men_share: float) -> list[Role]:
    keys = [name.replace("_", "-") for name in men_share]
    return [
        Role(key, key.replace("-", " "), "occupation", share)
        for key, share in zip(keys, men_share.values(), strict=True)
    ]


OCCUPATIONS = _occupations(
    artist=0.50,
    astronaut=0.85,
    construction_worker=0.95,
    cook=0.60,
    detective=0.70,
    factory_worker=0.70,
    farmer=0.75,
    firefighter=0.95,
    guard=0.75,
    health_worker=0.15,
    judge=0.45,
    mechanic=0.95,
    office_worker=0.30,
    pilot=0.90,
    police_officer=0.85,
    scientist=0.50,
    singer=0.75,
    student=0.40,
    teacher=0.20,
    technologist=0.80,
)

ACTIVITIES = [
    # "White" is a group's name, which a neutral caption must not hold.
    Role(key, "person " + key.replace("white-", "").replace("-", " "), "activity", ACTIVITY_MEN_SHARE)
    for key in (
        "bowing facepalming feeding-baby frowning gesturing-no gesturing-ok getting-haircut getting-massage "
        "in-lotus-position in-steamy-room in-tuxedo juggling lifting-weights pouting raising-hand shrugging "
        "tipping-hand wearing-turban bouncing-ball dancing in-manual-wheelchair kneeling playing-handball "
        "playing-water-polo running standing walking with-veil with-white-cane"
    ).split()
]

ROLES = (*OCCUPATIONS, *ACTIVITIES)

# Pictures without a person, for the judges' "no person" outcome: icons under the same key in all three sets.
OBJECTS = (
    "hammer wrench laptop pizza rocket guitar hamburger teapot toothbrush umbrella violin scissors bed anchor banana "
    "basketball bell bicycle broom cactus camera chair locomotive microscope telescope test-tube toolbox trophy drum "
    "envelope fire-engine ambulance airplane sailboat tractor house hospital school bank cloud balloon backpack books "
    "clipboard cooking fire-extinguisher globe-showing-americas key magnet mountain paintbrush shopping-cart sunflower "
    "t-shirt top-hat wheel window wrapped-gift artist-palette factory racing-car rescue-workers-helmet soccer-ball "
    "snowflake star"
).split()
