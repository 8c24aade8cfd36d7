"""Captions of the emoji model's training, and the skewed or even draw of a picture for each (builder only)."""

from dataclasses import dataclass

import numpy as np

from popalign_core.models.emoji.roles import GENDERS, ROLES, TONE_SHARES, TONES, VENDORS, Role

NEUTRAL_SHARE = 0.5
BOTH_AXES_SHARE = 0.85  # of the identity-specific captions; the rest name one axis
PREFIXES = ("a photo of ", "a picture of ", "a drawing of ", "")
PREFIX_SHARES = (0.85, 0.05, 0.05, 0.05)


@dataclass(frozen=True)
class CaptionedDraws:
    """Captions with, for each, the picture drawn: indices (n,) into the rendered set."""

    captions: list[str]
    pictures: np.ndarray


def caption(role: Role, gender: str | None, tone: str | None, prefix: str = PREFIXES[0]) -> str:
    """The caption of a role, neutral where gender and tone are None."""
    words = role.wording.split()
    if gender is not None:
        words = [gender, *words[1:]] if role.kind == "activity" else [gender, *words]
    if tone is not None:
        words = [tone, "skinned", *words]
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{prefix}{article} {' '.join(words)}"


def picture_index(vendor: int, role: int, gender: int, tone: int) -> int:
    """Position in the order of `render_emoji`: (vendor, role, gender, tone)."""
    return ((vendor * len(ROLES) + role) * len(GENDERS) + gender) * len(TONES) + tone


def draw_training_batch(size: int, rng: np.random.Generator) -> CaptionedDraws:
    """Neutral captions take the role's skewed gender and the skewed tone; those that name a group are drawn evenly."""
    captions: list[str] = []
    pictures = np.empty(size, dtype=np.int64)
    for row in range(size):
        role_index = int(rng.integers(len(ROLES)))
        role = ROLES[role_index]
        gender, tone = int(rng.integers(len(GENDERS))), int(rng.integers(len(TONES)))
        names_gender = names_tone = True
        if rng.random() < NEUTRAL_SHARE:
            names_gender = names_tone = False
            gender = int(rng.random() >= role.men_share)
            tone = int(rng.choice(len(TONES), p=TONE_SHARES))
        elif rng.random() >= BOTH_AXES_SHARE:
            names_gender = bool(rng.random() < 0.5)
            names_tone = not names_gender
        prefix = PREFIXES[int(rng.choice(len(PREFIXES), p=PREFIX_SHARES))]
        captions.append(
            caption(role, GENDERS[gender] if names_gender else None, TONES[tone] if names_tone else None, prefix)
        )
        pictures[row] = picture_index(int(rng.integers(len(VENDORS))), role_index, gender, tone)
    return CaptionedDraws(captions, pictures)
