from collections import Counter

import pytest

from popalign_core.attributes import AXES
from popalign_core.config import ImageCounts
from popalign_core.errors import UnknownName
from popalign_core.expansion import Prompt, expand_prompts
from popalign_core.sample_sets import image_requests, slices
from popalign_core.sampling import ImageRequest
from popalign_core.subjects import Subject

AXES_USED = (AXES["perceived_gender"], AXES["perceived_skin_tone"])
CELLS = 10
COUNTS = ImageCounts(train_neutral=12, train_specific=2, validation=3, evaluation=4, trained=2, obedience=1)
PROMPTS = expand_prompts(
    [Subject("firefighter", "s", "train"), Subject("judge", "s", "validation"), Subject("pilot", "s", "eval")],
    AXES_USED,
)
BY_ID = {prompt.prompt_id: prompt for prompt in PROMPTS}


def requests(purpose: str, round_index: int = 1, prompts: list[Prompt] = PROMPTS) -> list[ImageRequest]:
    wanted = slices(purpose, COUNTS, round_index)
    return image_requests(prompts, wanted, model_id="base", run_seed=7, cells=CELLS)


@pytest.mark.parametrize(
    ("purpose", "split", "neutral", "specific"),
    [
        ("round", "train", 12, 20),
        ("validation", "validation", 3, 0),
        ("evaluation", "eval", 4, 0),
        ("trained", "train", 2, 0),
        ("obedience", "eval", 0, 10),
    ],
)
def test_a_purpose_draws_what_was_asked_for(purpose: str, split: str, neutral: int, specific: int) -> None:
    drawn = [BY_ID[request.prompt_id] for request in requests(purpose)]
    assert Counter(prompt.kind for prompt in drawn) == Counter({"neutral": neutral, "specific": specific})
    assert {prompt.split for prompt in drawn} == {split}


def test_every_image_has_an_identity_of_its_own() -> None:
    drawn = [request.sample_id for purpose in ("round", "validation", "evaluation") for request in requests(purpose)]
    assert len(set(drawn)) == len(drawn)


def test_each_specific_image_shares_its_noise_with_a_neutral_one_of_its_round() -> None:
    drawn = requests("round", 2)
    seeds: dict[str, set[int]] = {"neutral": set(), "specific": set()}
    for request in drawn:
        seeds[BY_ID[request.prompt_id].kind].add(request.seed)
    assert seeds["specific"] <= seeds["neutral"]


def test_rounds_share_no_noise() -> None:
    first, second = ({request.seed for request in requests("round", number)} for number in (1, 2))
    assert not first & second


def test_seeds_do_not_depend_on_the_model_or_on_other_prompts() -> None:
    alone = [prompt for prompt in PROMPTS if prompt.split == "train"]
    assert requests("round") == requests("round", prompts=alone)


def test_an_unknown_purpose_is_named() -> None:
    with pytest.raises(UnknownName, match="evaluation"):
        requests("evaluate")
