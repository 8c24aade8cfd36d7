"""What votes come to: win rates, agreement, consistency and time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.rater_agreement import MISSING, estimate_alpha
from popalign_core.assessment.resampling import DEFAULT_RESAMPLES, Estimate
from popalign_core.assessment.win_rate import clustered_share
from popalign_core.raters.study import Check, Question
from popalign_core.seeds import derive_seed

Row = Mapping[str, object]


@dataclass(frozen=True)
class QuestionResult:
    """One question of one level. win_rate: of the aligned model, ties half; n: votes. agreement: n: trials."""

    level: str
    question: str
    axis: str
    win_rate: Estimate
    wins: int
    ties: int
    losses: int
    agreement: Estimate
    prompts: int
    raters: int
    median_seconds: float


@dataclass(frozen=True)
class RaterQuality:
    """How the votes were given, over all questions.

    consistency: repeats answered as the first time. attention: identical sides answered with "no difference".
    first_side: share of A among votes that name a side. median_seconds: a vote.
    """

    raters: int
    votes: int
    consistency: Estimate
    attention: Estimate
    first_side: Estimate
    median_seconds: float


def question_results(
    votes: Sequence[Row], base: str, aligned: str, *, seed: int, resamples: int = DEFAULT_RESAMPLES
) -> list[QuestionResult]:
    """A result for every question that was voted on. votes: rows of the table `votes`; checks are left out."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in votes:
        if row["check"] == Check.NONE:
            found.setdefault((str(row["level"]), str(row["question"]), str(row["axis"] or "")), []).append(row)
    order = sorted(found, key=lambda key: (key[0], list(Question).index(Question(key[1])), key[2]))
    return [_result(key, found[key], (base, aligned), seed, resamples) for key in order]


def _result(
    key: tuple[str, str, str], rows: Sequence[Row], models: tuple[str, str], seed: int, resamples: int
) -> QuestionResult:
    base, aligned = models
    preferred = [row["preferred_model_id"] for row in rows]
    wins, losses = preferred.count(aligned), preferred.count(base)
    values = np.array([1.0 if model == aligned else 0.0 if model == base else 0.5 for model in preferred])
    prompts = np.array([str(row["prompt_id"]) for row in rows])
    rng = np.random.default_rng(derive_seed(seed, "agreement", *key))
    return QuestionResult(
        *key,
        clustered_share(values, prompts),
        wins,
        len(rows) - wins - losses,
        losses,
        estimate_alpha(_codes(rows, (values * 2).astype(int)), rng=rng, resamples=resamples),
        len(set(prompts.tolist())),
        len({row["rater"] for row in rows}),
        float(np.median([_number(row["seconds"]) for row in rows])),
    )


def _codes(rows: Sequence[Row], values: np.ndarray) -> np.ndarray:
    """(trials, raters), MISSING where a rater did not vote."""
    trials, raters = (_positions([row[name] for row in rows]) for name in ("trial_id", "rater"))
    codes = np.full((max(trials) + 1, max(raters) + 1), MISSING)
    codes[trials, raters] = values
    return codes


def _positions(names: Sequence[object]) -> list[int]:
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]


def rater_quality(votes: Sequence[Row]) -> RaterQuality:
    """Over all votes, checks among them."""
    first = {(row["rater"], row["trial_id"]): row["preferred_model_id"] for row in votes}
    repeats = [row for row in votes if row["check"] == Check.REPEAT and (row["rater"], row["repeats"]) in first]
    same = [float(first[row["rater"], row["repeats"]] == row["preferred_model_id"]) for row in repeats]
    identical = [row for row in votes if row["check"] == Check.IDENTICAL]
    attentive = [float(row["preferred_model_id"] is None) for row in identical]
    sided = [row for row in votes if row["preferred_model_id"] is not None and row["check"] != Check.IDENTICAL]
    left = [float(row["preferred_model_id"] == row["left_model_id"]) for row in sided]
    return RaterQuality(
        len({row["rater"] for row in votes}),
        len(votes),
        _share(same, repeats),
        _share(attentive, identical),
        _share(left, sided),
        float(np.median([_number(row["seconds"]) for row in votes])) if votes else np.nan,
    )


def _share(values: Sequence[float], rows: Sequence[Row]) -> Estimate:
    clusters = [str(row["rater"]) for row in rows]
    if len(set(clusters)) < 2:  # one rater: votes are all that can be drawn again
        clusters = [str(place) for place in range(len(rows))]
    return clustered_share(np.array(values, dtype=float), np.array(clusters, dtype=str))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
