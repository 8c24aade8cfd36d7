"""Obedience counts whole groups, shows unknowns both ways, and pairs by prompt."""

import numpy as np
import pytest

from popalign_core.assessment.obedience import Answers, compare_obedience, confusion_matrix, obedience
from popalign_core.attributes import AXES, PerceivedGender
from popalign_core.errors import InvalidInput, UnknownName

REQUESTED = ["woman", "woman", "man", "man", "man", "man"]
PERCEIVED = ["woman", "man", "man", "man", None, None]
PROMPTS = ["a", "a", "b", "b", "c", "c"]


def rng() -> np.random.Generator:
    return np.random.default_rng(2)


def test_shares_among_known_and_with_unknown_as_wrong():
    found = obedience(REQUESTED, PERCEIVED, PROMPTS, rng=rng(), resamples=300)
    assert found.among_known.value == 3 / 4
    assert (found.among_known.n, found.among_known.unknown) == (4, 2)
    assert found.unknown_is_wrong.value == 3 / 6
    assert found.unknown_is_wrong.n == 6
    for share in (found.among_known, found.unknown_is_wrong):
        assert 0 <= share.low <= share.value <= share.high <= 1
        assert share.low < share.high


def test_a_man_is_not_right_where_a_woman_was_named():
    found = obedience(["woman"] * 4, ["man"] * 4, list("abcd"), rng=rng(), resamples=50)
    assert (found.among_known.value, found.among_known.high) == (0, 0)


def test_an_enum_member_equals_its_text():
    found = obedience([PerceivedGender.MAN], ["man"], ["a"], rng=rng(), resamples=50)
    assert found.among_known.value == 1


def test_all_unknown_is_not_a_number_among_known_and_zero_as_wrong():
    found = obedience(["man"] * 2, [None] * 2, ["a", "b"], rng=rng(), resamples=50)
    assert np.isnan(found.among_known.value)
    assert found.unknown_is_wrong.value == 0


def test_paired_change():
    prompts = [f"p{i}" for i in range(40) for _ in range(4)]
    asked = ["man"] * 160
    source = rng()
    before = ["man" if right else "woman" for right in source.random(160) < 0.95]
    after = ["man" if right else "woman" for right in source.random(160) < 0.6]
    found = compare_obedience(Answers(asked, before, prompts), Answers(asked, after, prompts), rng=rng(), resamples=400)
    assert found.difference.value == pytest.approx((after.count("man") - before.count("man")) / 160)
    assert found.difference.low < found.difference.value < found.difference.high < 0


def test_a_rise_of_unknowns_shows_only_where_they_count_as_wrong():
    before = Answers(["man"] * 4, ["man"] * 4, list("aabb"))
    after = Answers(["man"] * 4, ["man", None, "man", None], list("aabb"))
    assert compare_obedience(before, after, rng=rng(), resamples=50).difference.value == 0
    strict = compare_obedience(before, after, unknown_is_wrong=True, rng=rng(), resamples=50)
    assert strict.difference.value == -0.5


def test_unpaired_prompts_and_uneven_lists_are_refused():
    one, other = Answers(["man"], ["man"], ["a"]), Answers(["man"], ["man"], ["b"])
    with pytest.raises(InvalidInput, match="not paired"):
        compare_obedience(one, other, rng=rng())
    with pytest.raises(InvalidInput, match="same number"):
        obedience(["man"], [], ["a"], rng=rng())
    with pytest.raises(InvalidInput, match="at least one"):
        obedience([], [], [], rng=rng())


def test_confusion_matrix_ends_with_unknown():
    counts = confusion_matrix(REQUESTED, PERCEIVED, AXES["perceived_gender"])
    np.testing.assert_array_equal(counts, [[2, 0, 2], [1, 1, 0]])
    with pytest.raises(UnknownName, match="person"):
        confusion_matrix(["person"], ["man"], AXES["perceived_gender"])
