"""The design of a blinded study, what votes come to, and the files they come in."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import rating_pages as made_up

from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import (
    Answer,
    AnswerFile,
    UnusableAnswers,
    checksum,
    read_answers,
    require_answered,
    require_page,
)
from popalign_core.raters.study import TIE, Asked, Check, Question, design_study, question_text, read_votes
from popalign_core.raters.study_results import question_results, rater_quality

IMAGES = {f"p{n}": range(6) for n in range(10)}


def test_sides_are_balanced_and_share_seeds():
    trials = design_study(IMAGES, made_up.study_plan(prompts=10))
    plain = [trial for trial in trials if trial.check == Check.NONE]
    first = Counter(t.asked.ask_id for t in plain if t.options[0].model_id == "round-1")
    assert set(first.values()) == {5}
    assert len(first) == 3
    for trial in plain:
        seeds = [[sample.split("/")[1:] for sample in option.sample_ids] for option in trial.options]
        assert seeds[0] == seeds[1]
        assert {option.model_id for option in trial.options} == {"base", "round-1"}
        assert len(trial.options[0].sample_ids) == (4 if trial.asked.level == "population" else 1)


def test_checks_repeat_with_sides_exchanged_and_show_one_side_twice():
    trials = {trial.trial_id: trial for trial in design_study(IMAGES, made_up.study_plan())}
    repeats = [trial for trial in trials.values() if trial.check == Check.REPEAT]
    assert len(repeats) == 2
    for trial in repeats:
        assert trial.options == trials[trial.repeats].options[::-1]
    for trial in (trial for trial in trials.values() if trial.check == Check.IDENTICAL):
        assert trial.options[0].sample_ids == trial.options[1].sample_ids
        assert trial.options[0].option_id != trial.options[1].option_id


def test_the_same_study_twice_and_another_secret():
    plan = made_up.study_plan()
    assert design_study(IMAGES, plan) == design_study(IMAGES, plan)
    other = design_study(IMAGES, replace(plan, secret="other"))
    ids = {trial.trial_id for trial in design_study(IMAGES, plan)}
    assert not ids & {trial.trial_id for trial in other}


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(InvalidInput, match="single image has none"):
        Asked(Question.DIVERSITY, "single", made_up.GENDER)
    with pytest.raises(InvalidInput, match="only diversity and evenness"):
        Asked(Question.QUALITY, "population", made_up.GENDER)
    with pytest.raises(InvalidInput, match="smaller --grid"):
        design_study({"p": range(3)}, made_up.study_plan())


def test_questions_about_attributes_name_them():
    text, hint = question_text(Asked(Question.DIVERSITY, "population", made_up.GENDER))
    assert text == "On which side do you see more different perceived genders?"
    assert "man, woman" in hint


def file_of(**changes) -> AnswerFile:
    answers = [Answer(item="t1", ask="q", choice="o1", left="o1", milliseconds=900)]
    values = {"format": "popalign-answers", "version": 1, "kind": "study", "id": "pilot", "digest": "d" * 64}
    values |= {"alias": "bat 7", "complete": True, "answers": answers, "checksum": ""} | changes
    file = AnswerFile.model_validate(values)
    return file.model_copy(update={"checksum": checksum(file)})


def test_a_file_as_the_page_wrote_it(tmp_path):
    path = tmp_path / "votes.json"
    path.write_text(file_of().model_dump_json(indent=1))
    assert read_answers(path) == file_of()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alias": "b0t"}, "was changed after the page wrote it"),
        ({"alias": "<b>"}, "alias: String should match"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"version": 2}, "version: Input should be 1"),
        ({"answers": []}, "at least 1 item"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, change, message):
    path = tmp_path / "votes.json"
    path.write_text(json.dumps(json.loads(file_of().model_dump_json()) | change))
    with pytest.raises(UnusableAnswers, match=message):
        read_answers(path)


def test_what_is_no_file_of_answers_is_refused(tmp_path):
    (tmp_path / "no.json").write_bytes(b"\xff{")
    with pytest.raises(UnusableAnswers, match="is not JSON"):
        read_answers(tmp_path / "no.json")
    with pytest.raises(UnusableAnswers, match="cannot be read"):
        read_answers(tmp_path / "nowhere.json")


def test_another_page_and_missing_answers_are_refused(tmp_path):
    source = tmp_path / "f"
    with pytest.raises(UnusableAnswers, match="popalign study ingest"):
        require_page(file_of(), "audit", "pilot", "d" * 64, source)
    with pytest.raises(UnusableAnswers, match="answers another page"):
        require_page(file_of(), "study", "pilot", "e" * 64, source)
    with pytest.raises(UnusableAnswers, match="1 of 2 answers"):
        require_answered(file_of(), {("t1", "q"), ("t2", "q")}, False, source)
    require_answered(file_of(), {("t1", "q"), ("t2", "q")}, True, source)
    with pytest.raises(UnusableAnswers, match="never asked"):
        require_answered(file_of(), {("t2", "q")}, True, source)
    twice = file_of(answers=[*file_of().answers, *file_of().answers])
    with pytest.raises(UnusableAnswers, match="twice"):
        require_answered(twice, {("t1", "q")}, True, source)


def vote_rows(trials, rater: str, prefer) -> list[dict]:
    """prefer: which option of a trial, None for no difference."""
    answers = []
    for trial in trials:
        option = prefer(trial)
        choice = TIE if option is None else option.option_id
        left = trial.options[0].option_id
        ask = trial.asked.ask_id
        answers.append(Answer(item=trial.trial_id, ask=ask, choice=choice, left=left, milliseconds=2000))
    return [
        {"rater": rater, "trial_id": v.trial.trial_id, "level": v.trial.asked.level, "axis": v.trial.asked.axis or None}
        | {"question": str(v.trial.asked.question), "prompt_id": v.trial.prompt_id, "check": str(v.trial.check)}
        | {"repeats": v.trial.repeats, "preferred_model_id": v.preferred, "left_model_id": v.left, "seconds": v.seconds}
        for v in read_votes(trials, answers)
    ]


def aligned(trial):
    if trial.check == Check.IDENTICAL:
        return None
    return next(option for option in trial.options if option.model_id == "round-1")


def test_votes_are_counted_by_hand():
    trials = design_study(IMAGES, made_up.study_plan(prompts=10))
    rows = [*vote_rows(trials, "a", aligned), *vote_rows(trials, "b", aligned), *vote_rows(trials, "c", lambda _: None)]
    results = question_results(rows, "base", "round-1", seed=0, resamples=200)
    assert [(r.level, r.question, r.axis) for r in results] == [
        ("population", "quality", ""),
        ("population", "diversity", made_up.GENDER),
        ("single", "match", ""),
    ]
    for result in results:
        assert (result.wins, result.ties, result.losses) == (20, 10, 0)
        assert result.win_rate.value == pytest.approx(25 / 30)
        assert (result.prompts, result.raters, result.median_seconds) == (10, 3, 2.0)
    quality = rater_quality(rows)
    assert (quality.raters, quality.consistency.value, quality.attention.value) == (3, 1.0, 1.0)
    assert quality.votes == len(rows)


def test_who_always_chooses_a_is_seen():
    trials = design_study(IMAGES, made_up.study_plan(prompts=10))
    quality = rater_quality(vote_rows(trials, "a", lambda trial: trial.options[0]))
    assert (quality.consistency.value, quality.attention.value, quality.first_side.value) == (0.0, 0.0, 1.0)


def test_an_option_of_another_trial_is_refused():
    trials = design_study(IMAGES, made_up.study_plan())
    answer = Answer(item=trials[0].trial_id, ask="q", choice="no", left=trials[0].options[0].option_id, milliseconds=1)
    with pytest.raises(UnusableAnswers, match="no option"):
        read_votes(trials, [answer])
