"""What people said: votes of blinded studies, and shares corrected by audits of the judge."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from popalign_core.assessment.corrected_shares import ADJUSTED_COUNT, AS_CLASSIFIED, POST_STRATIFIED
from popalign_core.assessment.resampling import Estimate
from popalign_core.raters.study_results import QuestionResult, RaterQuality, question_results, rater_quality
from popalign_core.reporting.charts import dumbbell, nice_ticks, scale_head, stacked_bar
from popalign_core.reporting.comparisons import ComparedRow
from popalign_core.reporting.formatting import axis_label, plain_words
from popalign_core.reporting.report_data import Change, Measured, ReportData, Row, matching, measured, paired

METHODS = {
    AS_CLASSIFIED: "as classified",
    POST_STRATIFIED: "corrected by the model's own audited images",
    ADJUSTED_COUNT: "corrected by all audited images",
}


@dataclass(frozen=True)
class VotedQuestion:
    """One question in words. bar: wins, ties and losses as shares of one bar."""

    label: str
    of: str
    result: QuestionResult
    win_rate: Measured
    alpha: Measured | None
    bar: Markup


@dataclass(frozen=True)
class Study:
    """One study's results. checks: of repeats, identical sides and the first side, as far as they were asked."""

    study_id: str
    questions: Sequence[VotedQuestion]
    raters: RaterQuality
    checks: Sequence[tuple[str, Measured, int]]


@dataclass(frozen=True)
class CorrectedAxis:
    """Shares of one axis's groups with and without correction. bounds: (group, method, before, after) in words."""

    label: str
    audit_id: str
    auditors: int
    audited: int
    rows: Sequence[ComparedRow]
    head: Markup
    bounds: Sequence[tuple[str, str, Change]]
    matrix: "Confusion | None"


@dataclass(frozen=True)
class Confusion:
    """perceived x predicted cells with their intervals. counts: images that people perceived so."""

    perceived: Sequence[tuple[str, int]]
    predicted: Sequence[str]
    cells: Sequence[Sequence[Measured | None]]


def studies(data: ReportData) -> list[Study]:
    """Every study that has votes, by name."""
    seed = int(data.config.get("seed", 0))
    found: list[Study] = []
    for study_id in sorted({str(row["study_id"]) for row in data.votes}):
        votes = matching(data.votes, study_id=study_id)
        results = question_results(votes, data.base_model_id, data.model_id, seed=seed)
        quality = rater_quality(votes)
        checks = (
            ("Pairs shown twice, answered alike", quality.consistency),
            ("Two sides that are one, told", quality.attention),
            ("A chosen where a side was chosen", quality.first_side),
        )
        shown = [(text, _measured(value), value.n) for text, value in checks if value.n]
        found.append(Study(study_id, [_voted(result) for result in results], quality, shown))
    return found


def _voted(result: QuestionResult) -> VotedQuestion:
    total = result.wins + result.ties + result.losses
    level = "grids of images" if result.level == "population" else "single images"
    axis = axis_label(result.axis).lower()
    return VotedQuestion(
        label=": ".join(part for part in (plain_words(result.question), axis) if part),
        of=level,
        result=result,
        win_rate=_measured(result.win_rate),
        alpha=_measured(result.agreement) if result.agreement.value == result.agreement.value else None,
        bar=stacked_bar([count / total for count in (result.losses, result.ties, result.wins)]),
    )


def _measured(value: Estimate) -> Measured:
    return Measured(value.value, value.low, value.high, n=value.n)


def corrected_axes(data: ReportData) -> list[CorrectedAxis]:
    """Every audited axis of the run's two models, by the newest labels of each audit."""
    rows = matching(data.corrected_shares, judge_id=data.judge_id)
    keys = sorted({(str(row["audit_id"]), str(row["axis"])) for row in rows})
    return [
        _corrected_axis(data, audit_id, axis, matching(rows, audit_id=audit_id, axis=axis)) for audit_id, axis in keys
    ]


def _corrected_axis(data: ReportData, audit_id: str, axis: str, rows: Sequence[Row]) -> CorrectedAxis:
    sides = paired(rows, ("group", "method"), data)
    shown = {key: of for key, of in sides.items() if key[1] in (AS_CLASSIFIED, POST_STRATIFIED)}
    changes = {key: Change(measured(a, "share"), measured(b, "share")) for key, (a, b) in shown.items()}
    values = [side for change in changes.values() for side in (change.before, change.after) if side is not None]
    top = max([0.01, *(side.high or side.value for side in values)])
    ticks = [tick for tick in nice_ticks(0.0, top) if tick <= top]
    order = {str(row["group"]): place for place, row in reversed(list(enumerate(rows)))}
    ranked = sorted(changes, key=lambda key: (order[str(key[0])], list(METHODS).index(str(key[1]))))
    bounds = [
        (str(group), METHODS[str(method)], Change(*(_bounds(side) for side in of)))
        for (group, method), of in sides.items()
    ]
    return CorrectedAxis(
        label=axis_label(axis),
        audit_id=audit_id,
        auditors=int(rows[0]["auditors"]),
        audited=max(int(row["audited"]) for row in rows),
        rows=[
            ComparedRow(str(key[0]), changes[key], dumbbell(changes[key], top, ticks), METHODS[str(key[1])])
            for key in ranked
        ],
        head=scale_head(top, ticks, as_shares=True),
        bounds=sorted(bounds, key=lambda item: order[item[0]]),
        matrix=_matrix(matching(data.confusion_matrices, audit_id=audit_id, axis=axis, judge_id=data.judge_id)),
    )


def _bounds(row: Row | None) -> Measured | None:
    return None if row is None else Measured(row["share"], row["bound_low"], row["bound_high"])


def _matrix(rows: Sequence[Row]) -> Confusion | None:
    if not rows:
        return None
    perceived = {str(row["perceived"]): int(row["n"]) for row in rows}
    predicted = list(dict.fromkeys(str(row["predicted"]) for row in rows))
    of = {(row["perceived"], row["predicted"]): measured(row, "share") for row in rows}
    seen = [(name, n) for name, n in perceived.items() if n]
    return Confusion(seen, predicted, [[of[name, outcome] for outcome in predicted] for name, _ in seen])
