import pickle
from itertools import combinations, product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from popalign_core.attributes import AXES, Axis
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.expansion import AxisDoesNotFit, Prompt, expand_prompts
from popalign_core.group_words import find_group_words
from popalign_core.models.emoji.captions import PREFIXES, caption
from popalign_core.models.emoji.roles import ROLES, TONES, Role
from popalign_core.subjects import (
    BlankSubject,
    GroupWordInPrompt,
    NoPrompts,
    SplitsOverlap,
    Subject,
    SubjectTwice,
    subject_key,
)
from popalign_core.wording import with_article

GENDER, RACE, TONE = AXES["perceived_gender"], AXES["perceived_race"], AXES["perceived_skin_tone"]
AGE, COUPLE = AXES["perceived_age"], AXES["perceived_couple"]
WORDS = "artist baker chef diver engineer farmer guide host inspector jeweler usher welder".split()
PEOPLE = [*WORDS, "person surfing", "friendly person", "hour counter", "X-ray technician", "university dean"]
COUPLES = ["couple hiking", "couple", "couple on a train"]
SPLITS = ("train", "validation", "eval")

axis_subsets = st.sampled_from(
    [
        subset
        for size in range(1, 5)
        for subset in combinations(AXES.values(), size)
        if not {GENDER, COUPLE} <= {*subset}
    ]
).flatmap(st.permutations)


@st.composite
def lists_and_axes(draw: st.DrawFn) -> tuple[list[Subject], list[Axis]]:
    axes = draw(axis_subsets)
    texts = draw(st.lists(st.sampled_from(COUPLES if COUPLE in axes else PEOPLE), min_size=1, max_size=4, unique=True))
    return [Subject(text, "suite", draw(st.sampled_from(SPLITS))) for text in texts], list(axes)


def subjects_of(*texts: str, split: str = "train") -> list[Subject]:
    return [Subject(text, "occupations", split) for text in texts]  # pyright: ignore[reportArgumentType]


def texts_of(subject: str, *axes: Axis, prefix: str = "a photo of ") -> list[str]:
    return [prompt.text for prompt in expand_prompts(subjects_of(subject), axes, prefix)]


@given(lists_and_axes())
def test_every_cell_once_per_neutral_prompt(case: tuple[list[Subject], list[Axis]]) -> None:
    subjects, axes = case
    prompts = expand_prompts(subjects, axes)
    cells = list(product(*(axis.groups for axis in axes)))
    families: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        families.setdefault(prompt.family_id, []).append(prompt)
    assert [family[0].subject for family in families.values()] == [subject.text for subject in subjects]
    for family in families.values():
        neutral, *specific = family
        assert (neutral.kind, neutral.parent_id, neutral.requested) == ("neutral", None, {})
        assert [prompt.cell for prompt in specific] == cells
        assert {prompt.kind for prompt in specific} == {"specific"}
        assert all(list(prompt.requested) == [axis.name for axis in axes] for prompt in specific)


@given(lists_and_axes())
def test_the_neutral_prompt_can_be_recovered(case: tuple[list[Subject], list[Axis]]) -> None:
    prompts = expand_prompts(*case)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    for prompt in prompts:
        neutral = by_id[prompt.family_id]
        assert neutral.kind == "neutral"
        assert (prompt.subject, prompt.suite, prompt.split) == (neutral.subject, neutral.suite, neutral.split)


@given(lists_and_axes(), st.sampled_from(["a photo of ", "an oil painting of", "", " 35mm,  f/2 "]))
def test_only_specific_prompts_name_groups_and_all_share_the_prefix(
    case: tuple[list[Subject], list[Axis]], prefix: str
) -> None:
    prompts = expand_prompts(*case, prefix)
    assert all(bool(find_group_words(prompt.text)) is (prompt.kind == "specific") for prompt in prompts)
    assert len({prompt.prefix for prompt in prompts}) == 1
    assert all(prompt.text.startswith(prompt.prefix) and "  " not in prompt.text for prompt in prompts)


@given(lists_and_axes())
def test_ids_are_distinct_and_independent_of_order(case: tuple[list[Subject], list[Axis]]) -> None:
    subjects, axes = case
    prompts = expand_prompts(subjects, axes)
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)
    again = expand_prompts(subjects[::-1], axes)
    assert {prompt.prompt_id: prompt for prompt in prompts} == {prompt.prompt_id: prompt for prompt in again}
    assert all(len(prompt.prompt_id) == 12 for prompt in prompts)


def test_an_id_is_the_same_in_every_release() -> None:
    (neutral, *_) = expand_prompts(subjects_of("firefighter"), [GENDER])
    assert neutral.prompt_id == "ed6cc27a6938"


def test_requested_groups_are_plain_text() -> None:
    prompts = expand_prompts(subjects_of("firefighter"), [GENDER, TONE])
    assert {type(group) for prompt in prompts for group in prompt.cell} == {str}
    assert pickle.loads(pickle.dumps(prompts)) == prompts


@pytest.mark.parametrize("role", ROLES, ids=[role.key for role in ROLES])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_wording_is_the_one_that_the_emoji_model_was_trained_on(role: Role, prefix: str) -> None:
    crossed = [caption(role, gender, tone, prefix) for gender in GENDER.groups for tone in TONES]
    gendered = [caption(role, gender, None, prefix) for gender in GENDER.groups]
    toned = [caption(role, None, tone, prefix) for tone in TONES]
    neutral = caption(role, None, None, prefix)
    assert texts_of(role.wording, GENDER, TONE, prefix=prefix) == [neutral, *crossed]
    assert texts_of(role.wording, GENDER, prefix=prefix) == [neutral, *gendered]
    assert texts_of(role.wording, TONE, prefix=prefix) == [neutral, *toned]


def test_words_for_groups_stand_in_one_order_whatever_the_order_of_the_axes() -> None:
    for axes in ((AGE, TONE, RACE, GENDER), (GENDER, RACE, TONE, AGE)):
        texts = texts_of("firefighter", *axes)
        assert len(texts) == 1 + 3 * 5 * 6 * 2
        assert "a photo of an old dark skinned Middle Eastern woman firefighter" in texts
        assert "a photo of a young light skinned White man firefighter" in texts


def test_a_gender_replaces_the_word_person() -> None:
    assert texts_of("person surfing", GENDER)[1:] == ["a photo of a man surfing", "a photo of a woman surfing"]
    assert texts_of("friendly person", GENDER)[2] == "a photo of a friendly woman"
    assert texts_of("friendly person", AGE)[3] == "a photo of a friendly old person"
    assert texts_of("chairperson", GENDER)[1] == "a photo of a man chairperson"


def test_couples() -> None:
    assert texts_of("couple hiking", COUPLE) == [
        "a photo of a couple hiking",
        "a photo of a man and a woman hiking",
        "a photo of two men hiking",
        "a photo of two women hiking",
    ]
    assert "a photo of an old man and an old woman hiking" in texts_of("couple hiking", COUPLE, AGE)
    assert "a photo of two young Asian women hiking" in texts_of("couple hiking", RACE, COUPLE, AGE)
    assert texts_of("couple hiking", AGE)[3] == "a photo of an old couple hiking"


@pytest.mark.parametrize(
    ("axes", "subject", "message"),
    [
        ((GENDER, COUPLE), "couple hiking", "cannot be crossed"),
        ((GENDER,), "couple hiking", "use perceived_couple"),
        ((COUPLE,), "firefighter", "begin with 'couple'"),
        ((AGE, AGE), "firefighter", "twice"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes: tuple[Axis, ...], subject: str, message: str) -> None:
    with pytest.raises(AxisDoesNotFit, match=message):
        texts_of(subject, *axes)


def test_no_axis_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no attribute axis"):
        texts_of("firefighter")


@pytest.mark.parametrize(
    ("phrase", "article"),
    [
        ("firefighter", "a"),
        ("artist", "an"),
        ("hour counter", "an"),
        ("honest person", "an"),
        ("hotel manager", "a"),
        ("university dean", "a"),
        ("unhappy person", "an"),
        ("uniformed guard", "a"),
        ("urban planner", "an"),
        ("usher", "an"),
        ("euphonium player", "a"),
        ("one-legged pirate", "a"),
        ("X-ray technician", "an"),
        ("UX designer", "a"),
        ("HVAC technician", "an"),
        ("DJ", "a"),
        ("IT support technician", "an"),
        ("Indian chef", "an"),
    ],
)
def test_articles_follow_the_sound(phrase: str, article: str) -> None:
    assert with_article(phrase) == f"{article} {phrase}"


@pytest.mark.parametrize(
    ("subject", "word"),
    [
        ("old man", "man"),
        ("Asian chef", "Asian"),
        ("policeman", "policeman"),
        ("firemen", "firemen"),
        ("businesswoman", "businesswoman"),
        ("waitress", "waitress"),
        ("Waiters", "waiters"),
        ("men's barber", "men"),
        ("female pilot", "female"),
        ("white-collar worker", "white"),
        ("dark horse breeder", "dark"),
        ("teenagers' counselor", "teenagers"),
        ("middle aged clerk", "middle aged"),
        ("Middle-Eastern cook", "middle eastern"),
        ("Latina singer", "latina"),
        ("king", "king"),
        ("ladies' tailor", "ladies"),
    ],
)
def test_group_words_in_neutral_prompts_are_refused_by_name(subject: str, word: str) -> None:
    with pytest.raises(GroupWordInPrompt, match=f"(?i){subject}.*{word}"):
        expand_prompts(subjects_of("baker", subject), [GENDER])


@pytest.mark.parametrize(
    "subject",
    [
        "blacksmith",
        "goldsmith",
        "human resources manager",
        "chairperson",
        "salesperson",
        "middle school teacher",
        "shaman",
        "blackjack dealer",
        "mandolin player",
        "womenswear designer",
        "lighting technician",
        "lightship keeper",
        "child psychologist",
        "senior accountant",
        "person feeding baby",
        "boycott organizer",
        "actor",
        "midwife",
        "mediumship researcher",
    ],
)
def test_parts_of_words_are_no_group_words(subject: str) -> None:
    assert find_group_words(subject) == []
    assert expand_prompts(subjects_of(subject), [GENDER])[0].subject == subject


def test_every_group_of_every_axis_is_a_group_word() -> None:
    assert all(find_group_words(f"a {group} clerk") for axis in AXES.values() for group in axis.groups)


def test_a_group_word_in_the_prefix_is_refused() -> None:
    with pytest.raises(GroupWordInPrompt, match="black"):
        texts_of("firefighter", GENDER, prefix="a black and white photo of ")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("nurse", "nurse"),
        ("nurse", "Nurses"),
        ("fire fighter", "firefighter"),
        ("X-ray technician", "x ray  technicians"),
        ("astronomer", "an astronomer."),
        ("person surfing", "surfing"),
        ("friendly person", "Friendly people"),
        ("lawyer", "attorney"),
        ("Hair stylists", "hairdresser"),
    ],
)
def test_wordings_of_one_subject_count_as_one(one: str, other: str) -> None:
    assert subject_key(one) == subject_key(other)
    with pytest.raises(SubjectTwice, match="train"):
        expand_prompts(subjects_of(one, other), [GENDER])
    with pytest.raises(SplitsOverlap, match="train and eval share"):
        expand_prompts([*subjects_of(one), *subjects_of(other, split="eval")], [GENDER])


@pytest.mark.parametrize(
    ("one", "other"),
    [("nurse", "nurse practitioner"), ("boss", "bos"), ("C++ coder", "C# coder"), ("2D artist", "3D artist")],
)
def test_other_subjects_stay_apart(one: str, other: str) -> None:
    assert len(expand_prompts([*subjects_of(one), *subjects_of(other, split="eval")], [GENDER])) == 6


@given(st.lists(st.sampled_from(WORDS), min_size=6, max_size=40))
def test_long_lists_of_overlaps_are_cut(texts: list[str]) -> None:
    assume(len(set(texts)) < len(texts))
    with pytest.raises(SubjectTwice) as caught:
        expand_prompts(subjects_of(*texts), [GENDER])
    assert 20 < len(str(caught.value)) < 200


def test_empty_lists_blank_subjects_and_unknown_splits_are_refused() -> None:
    with pytest.raises(NoPrompts, match="at least one"):
        expand_prompts([], [GENDER])
    for text in ("", "  ", "...", "12"):
        with pytest.raises(BlankSubject, match="no words"):
            expand_prompts(subjects_of(text), [GENDER])
    with pytest.raises(UnknownName, match=r"unknown split 'test'. Known: train"):
        expand_prompts(subjects_of("nurse", split="test"), [GENDER])


def test_articles_and_spaces_of_a_subject_are_dropped() -> None:
    assert texts_of(" the  chief\texecutive. ", GENDER)[0] == "a photo of a chief executive"


def test_errors_survive_pickling() -> None:
    with pytest.raises(GroupWordInPrompt) as caught:
        expand_prompts(subjects_of("old man"), [GENDER])
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy)) == (GroupWordInPrompt, str(caught.value))
