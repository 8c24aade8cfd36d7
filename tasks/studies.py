"""Blinded studies: a page is made, files of votes are checked and stored, and what they come to is counted."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import AnswerFile, UnusableAnswers, read_answers, require_answered
from popalign_core.raters.study import (
    Asked,
    Check,
    Option,
    Question,
    StudyPlan,
    Trial,
    asked_questions,
    design_study,
    question_text,
    read_votes,
)
from popalign_core.raters.study_results import QuestionResult, RaterQuality, question_results, rater_quality
from popalign_core.reporting.rating_page import Ask, Item, RatingPage, Shown, render_rating_page
from storage.artifacts import ArtifactRef, is_committed, read_manifest
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.publication import publish_file
from storage.tables import read_rows, write_rows
from tasks.rating_inputs import (
    compared_models,
    held_out_rows,
    page_of,
    page_secret,
    person_key,
    pictures,
    refuse_other_page,
)
from tasks.run import BASE, read_prompts, reference, run_config

Row = dict[str, Any]


@dataclass(frozen=True)
class StudyRequest:
    """What a study is to be like. grids, singles: names of questions. image_size: pixels a side on the page."""

    name: str = "study"
    model_id: str = ""
    grids: tuple[str, ...] = ("quality", "diversity")
    singles: tuple[str, ...] = ("quality", "match")
    prompts: int = 12
    grid: int = 9
    image_size: int = 256


@dataclass(frozen=True)
class StudyResults:
    """What the votes of one study come to."""

    study_id: str
    base_model_id: str
    model_id: str
    questions: list[QuestionResult]
    raters: RaterQuality


def create_study(workspace: str, run_id: str, request: StudyRequest) -> Path:
    """Commits the study's key and writes its page; returns the page's path. Raises: InvalidInput."""
    place = Workspace.open(workspace)
    config = run_config(workspace, run_id)
    models = compared_models(place, run_id, request.model_id)
    samples = {model: held_out_rows(place, run_id, "samples", model) for model in models}
    plan = StudyPlan(
        request.name,
        models,
        tuple(asked_questions(request.grids, request.singles, config.expansion.axes)),
        prompts=request.prompts,
        grid=request.grid,
        secret=page_secret([*samples[models[0]], *samples[models[1]]], config.model_dump_json()),
    )
    trials = design_study(_common_images(samples), plan)
    page = _study_page(place, run_id, plan, trials, request.image_size)
    ref = reference(workspace, run_id, "studies", request.name)
    refuse_other_page(ref, page.digest)
    html = render_rating_page(page)
    with staged_artifact(ref) as folder:
        write_rows(folder, "studies", [row for trial in trials for row in _trial_rows(ref, page.digest, trial)])
    return publish_file(place, run_id, f"study-{request.name}.html", html.encode())


def _common_images(samples: dict[str, list[Row]]) -> dict[str, list[int]]:
    """Prompt -> indices that both models have drawn."""
    drawn = [{(row["prompt_id"], row["sample_index"]) for row in rows} for rows in samples.values()]
    found: dict[str, list[int]] = {}
    for prompt_id, index in sorted(drawn[0] & drawn[1]):
        found.setdefault(prompt_id, []).append(index)
    return found


def _study_page(place: Workspace, run_id: str, plan: StudyPlan, trials: Sequence[Trial], pixels: int) -> RatingPage:
    texts = {prompt.prompt_id: prompt.text for prompt in read_prompts(str(place.root), run_id)}
    shown = {sample for trial in trials for option in trial.options for sample in option.sample_ids}
    stored = pictures(place, run_id, shown, pixels)
    ids = {sample: plan.opaque("picture", sample) for sample in shown}
    items = [
        Item(
            trial.trial_id,
            texts[trial.prompt_id],
            tuple(
                Shown(option.option_id, tuple(ids[sample] for sample in option.sample_ids)) for option in trial.options
            ),
            (Ask(trial.asked.ask_id, *question_text(trial.asked)),),
            block=trial.asked.ask_id,
            last=trial.check == Check.REPEAT,
        )
        for trial in trials
    ]
    return RatingPage(
        "study",
        plan.study_id,
        "Which side?",
        [
            "You will see pictures on two sides, A and B, and one question at a time. Look, then choose A, B or no "
            "difference. There are no right answers: your impression counts.",
            "The pictures were made by a computer; nobody in them exists. Some questions are about how people look to "
            "you: say what you perceive.",
        ],
        items,
        {ids[sample]: data for sample, data in stored.items()},
    )


def _trial_rows(ref: ArtifactRef, digest: str, trial: Trial) -> list[Row]:
    common = {"run_id": ref.run_id, "study_id": ref.key, "page_digest": digest, **_trial_columns(trial)}
    return [
        common
        | {"option_id": option.option_id, "option_index": index, "model_id": option.model_id}
        | {"sample_ids": list(option.sample_ids)}
        for index, option in enumerate(trial.options)
    ]


def _trial_columns(trial: Trial) -> Row:
    asked = trial.asked
    question = {"level": asked.level, "question": str(asked.question), "axis": asked.axis or None}
    about = {"prompt_id": trial.prompt_id, "check": str(trial.check), "repeats": trial.repeats}
    return {"trial_id": trial.trial_id, **question, **about}


def _stored_trials(rows: Sequence[Row]) -> list[Trial]:
    by_trial: dict[str, list[Row]] = {}
    for row in rows:
        by_trial.setdefault(row["trial_id"], []).append(row)
    found: list[Trial] = []
    for trial_id, own in by_trial.items():
        first, second = sorted(own, key=lambda row: row["option_index"])
        options = tuple(Option(row["option_id"], row["model_id"], tuple(row["sample_ids"])) for row in (first, second))
        asked = Asked(Question(first["question"]), first["level"], first["axis"] or "")
        pair = (options[0], options[1])
        found.append(Trial(trial_id, asked, first["prompt_id"], pair, Check(first["check"]), first["repeats"]))
    return found


def ingest_votes(workspace: str, sources: Sequence[Path], *, incomplete: bool = False) -> list[AnswerFile]:
    """Checks all files, then commits the votes of each; a file that is refused stops all. Raises: UnusableAnswers."""
    place = Workspace.open(workspace)
    ready: dict[ArtifactRef, tuple[AnswerFile, list[Row]]] = {}
    for source in sources:
        file = read_answers(source)
        page, rows = page_of(place, "study", file, source)
        trials = _stored_trials(rows)
        expected = {(trial.trial_id, trial.asked.ask_id) for trial in trials}
        require_answered(file, expected, incomplete, source)
        ref = reference(workspace, page.run_id, "votes", person_key(file.id, file.alias))
        refuse_second_file(ref, file, ready, source)
        common = {"run_id": page.run_id, "study_id": file.id, "rater": file.alias}
        ready[ref] = (
            file,
            [
                {
                    **common,
                    **_trial_columns(vote.trial),
                    "position": vote.position,
                    "preferred_model_id": vote.preferred,
                }
                | {"left_model_id": vote.left, "seconds": vote.seconds}
                for vote in read_votes(trials, file.answers)
            ],
        )
    for ref, (file, votes) in ready.items():
        with staged_artifact(ref, facts={"checksum": file.checksum}) as folder:
            write_rows(folder, "votes", votes)
    return [file for file, _ in ready.values()]


def refuse_second_file(ref: ArtifactRef, file: AnswerFile, ready: Container[ArtifactRef], source: Path) -> None:
    """Raises: UnusableAnswers if this alias has answered the page before, on the disk or in the same call."""
    if is_committed(ref):
        same = read_manifest(ref).facts.get("checksum") == file.checksum
        what = "was ingested before" if same else f"is a second file of {file.alias!r}, with other answers"
        raise UnusableAnswers(f"{source} {what}: {file.kind} {file.id!r} counts everybody once. Nothing was stored.")
    if ref in ready:
        raise UnusableAnswers(
            f"{source} is a second file of {file.alias!r} in one call; name each once. Nothing was stored."
        )


def study_results(workspace: str, run_id: str) -> list[StudyResults]:
    """Results of every study of a run that has votes, by name."""
    place, config = Workspace.open(workspace), run_config(workspace, run_id)
    votes = read_rows(place, run_id, "votes")
    found: list[StudyResults] = []
    for study_id in sorted({row["study_id"] for row in votes}):
        own = [row for row in votes if row["study_id"] == study_id]
        sides = read_rows(place, run_id, "studies", equal={"study_id": study_id}, columns=["model_id"])
        (aligned,) = {row["model_id"] for row in sides} - {BASE}
        questions = question_results(own, BASE, aligned, seed=config.seed, resamples=config.assessment.resamples)
        found.append(StudyResults(study_id, BASE, aligned, questions, rater_quality(own)))
    return found


def require_votes(results: Sequence[StudyResults], run_id: str) -> None:
    """Raises: InvalidInput if there is nothing to show."""
    if not results:
        raise InvalidInput(f"no votes on run {run_id!r} yet: `popalign study create`, then `popalign study ingest`.")
