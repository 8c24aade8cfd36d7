"""Made-up rating pages with drawn faces: a study of populations and single images, and an audit."""

import numpy as np
from PIL import Image, ImageDraw

from popalign_core.attributes import axis_named
from popalign_core.raters.study import Check, StudyPlan, Trial, asked_questions, design_study, question_text
from popalign_core.reporting.contact_sheet import thumbnail
from popalign_core.reporting.rating_page import Ask, Choice, Item, RatingPage, Shown

GENDER, TONE = "perceived_gender", "perceived_skin_tone"
TONES = ["#f7d7c4", "#e3b98f", "#c68e65", "#9a643b", "#5c3a21"]
PROMPTS = {
    "p1": "a photo of a firefighter",
    "p2": "a photo of a singer",
    "p3": 'a photo of an <old> "judge"',
    "p4": "a",
}


def face(rng: np.random.Generator, size: int = 96) -> bytes:
    image = Image.new("RGB", (size, size), "#eef1f4")
    draw = ImageDraw.Draw(image)
    draw.ellipse((size * 0.2, size * 0.15, size * 0.8, size * 0.85), fill=str(rng.choice(TONES)))
    for x in (0.4, 0.6):
        draw.ellipse((size * x - 3, size * 0.42, size * x + 3, size * 0.42 + 6), fill="#222222")
    return thumbnail(np.asarray(image), size)


def study_plan(**changes) -> StudyPlan:
    asked = tuple(asked_questions(["quality", "diversity"], ["match"], [GENDER]))
    return StudyPlan("pilot", ("base", "round-1"), asked, **({"grid": 4, "repeats": 2, "secret": "s"} | changes))


def study_page(plan: StudyPlan | None = None) -> tuple[RatingPage, list[Trial]]:
    plan = plan or study_plan()
    trials = design_study({prompt: range(6) for prompt in PROMPTS}, plan)
    rng = np.random.default_rng(0)
    shown = sorted({sample for trial in trials for option in trial.options for sample in option.sample_ids})
    ids = {sample: plan.opaque("picture", sample) for sample in shown}
    items = [
        Item(
            trial.trial_id,
            PROMPTS[trial.prompt_id],
            tuple(
                Shown(option.option_id, tuple(ids[sample] for sample in option.sample_ids)) for option in trial.options
            ),
            (Ask(trial.asked.ask_id, *question_text(trial.asked)),),
            block=trial.asked.ask_id,
            last=trial.check == Check.REPEAT,
        )
        for trial in trials
    ]
    images = {ids[sample]: face(rng) for sample in shown}
    return RatingPage("study", "pilot", "Which side?", ["Look, then choose."], items, images), trials


def audit_page(images: int = 3) -> RatingPage:
    rng = np.random.default_rng(1)
    asks = []
    for name in (GENDER, TONE):
        groups = [Choice(group, group.capitalize(), str(key + 1)) for key, group in enumerate(axis_named(name).groups)]
        others = [Choice("cannot_tell", "Cannot tell", "x"), Choice("no_person", "No person", "n", whole=True)]
        asks.append(Ask(name, f"Perceived {name.removeprefix('perceived_')}?", "", (*groups, *others)))
    items = [Item(f"i{n}", "", (Shown(f"i{n}", (f"i{n}",)),), tuple(asks)) for n in range(images)]
    return RatingPage(
        "audit", "check", "What do you see?", ["Say."], items, {f"i{n}": face(rng) for n in range(images)}
    )
