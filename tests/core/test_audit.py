"""The sample of an audit: strata, known probabilities, and answers from a closed vocabulary."""

from collections import Counter

import pytest

from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import Answer, UnusableAnswers
from popalign_core.raters.audit import Candidate, allocate, audit_choices, draw_audit, read_judgements

GENDER = "perceived_gender"


def candidates(women: int = 6, men: int = 90) -> list[Candidate]:
    found = [Candidate(f"base/p/{n}", "base", "p", {GENDER: "woman"}) for n in range(women)]
    return found + [Candidate(f"base/q/{n}", "base", "q", {GENDER: "man"}) for n in range(men)]


def test_small_strata_are_taken_whole_and_probabilities_are_known():
    sample = draw_audit(candidates(), 26, "audit", "s")
    groups = Counter(image.candidate.predicted[GENDER] for image in sample)
    assert groups == {"woman": 6, "man": 20}
    assert {image.inclusion_probability for image in sample} == {1.0, 20 / 90}
    # Weighted by them, the sample stands for all images.
    assert sum(1 / image.inclusion_probability for image in sample) == pytest.approx(96)


def test_ids_and_order_tell_nothing_and_are_the_same_again():
    sample = draw_audit(candidates(), 26, "audit", "s")
    assert sample == draw_audit(list(reversed(candidates())), 26, "audit", "s")
    assert [image.item_id for image in sample] == sorted(image.item_id for image in sample)
    assert not {image.item_id for image in sample} & {image.item_id for image in draw_audit(candidates(), 26, "a", "t")}


def test_allocation_uses_everything():
    assert allocate({"a": 3, "b": 100, "c": 100}, 43) == {"a": 3, "b": 20, "c": 20}
    assert sum(allocate({"a": 5, "b": 7, "c": 8}, 20).values()) == 20


def test_too_small_an_audit_is_refused():
    with pytest.raises(InvalidInput, match="needs 4 at least"):
        draw_audit(candidates(), 3, "audit", "s")


def test_answers_come_from_the_vocabulary():
    def given(choice: str) -> list[Answer]:
        return [Answer(item="i", ask=GENDER, choice=choice, left="", milliseconds=1500)]

    assert audit_choices(AXES[GENDER]) == ["man", "woman", "cannot_tell", "no_person"]
    (one,) = read_judgements(given("woman"))
    assert (one.group, one.status, one.seconds) == ("woman", "ok", 1.5)
    (one,) = read_judgements(given("no_person"))
    assert (one.group, one.status) == (None, "no_person")
    with pytest.raises(UnusableAnswers, match="no answer to perceived_gender"):
        read_judgements(given("dark"))
