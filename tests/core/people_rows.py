"""Made-up votes and audits of the run in report_rows."""

from dataclasses import asdict, replace

import numpy as np
import report_rows as made_up

from popalign_core.assessment.corrected_shares import AuditedPopulation, confusion_cells, correct_shares
from popalign_core.assessment.misclassification import AuditedLabels, predicted_outcomes
from popalign_core.attributes import axis_named
from popalign_core.reporting.report_data import ReportData


def votes(rng: np.random.Generator, raters: int = 5) -> list[dict]:
    asked = (("population", "quality", None, 0.5), ("population", "diversity", made_up.GENDER, 0.85))
    asked += (("population", "diversity", made_up.TONE, 0.9), ("single", "match", None, 0.45))
    rows = []
    for level, question, axis, rate in asked:
        for subject in made_up.HELD_OUT:
            own = float(np.clip(rng.normal(rate, 0.1), 0, 1))
            for rater in range(raters):
                won = None if rng.random() < 0.15 else made_up.MODEL if rng.random() < own else made_up.BASE
                rows.append(
                    {"study_id": "pilot", "rater": f"r{rater}", "trial_id": f"{level}{question}{axis}{subject}"}
                    | {"level": level, "question": question, "axis": axis, "prompt_id": f"eval-{subject}"}
                    | {"check": "none", "repeats": None, "preferred_model_id": won, "left_model_id": made_up.BASE}
                    | {"seconds": float(rng.uniform(2, 9))}
                )
    repeated = [
        row | {"check": "repeat", "repeats": row["trial_id"], "trial_id": "x" + row["trial_id"]} for row in rows[:20]
    ]
    identical = [row | {"check": "identical", "trial_id": "y", "preferred_model_id": None} for row in rows[:5]]
    return [*rows, *repeated, *identical]


def audited_rows(rng: np.random.Generator) -> dict[str, list[dict]]:
    common = {"run_id": made_up.RUN, "audit_id": "audit", "auditors": 2, "judge_id": made_up.JUDGE}
    found: dict[str, list[dict]] = {"corrected_shares": [], "confusion_matrices": []}
    for name in (made_up.GENDER, made_up.TONE):
        axis = axis_named(name)
        outcomes = len(predicted_outcomes(axis))
        populations = {}
        for model in (made_up.BASE, made_up.MODEL):
            shares = np.append(0.94 * made_up.true_shares(axis, model, "judge"), [0.02, 0.04])
            counts = rng.multinomial(48, shares / shares.sum(), size=8)
            predicted = np.repeat(np.arange(outcomes), 12)
            wrong = rng.integers(len(axis.groups) + 1, size=predicted.shape)
            right = np.where(predicted < len(axis.groups) + 1, predicted, wrong)
            perceived = np.where(rng.random(predicted.shape) < 0.85, right, wrong)
            labels = AuditedLabels(axis, predicted, perceived, (counts.sum(axis=0) / 12 + 1e-9)[predicted])
            populations[model] = AuditedPopulation(counts, labels)
        own = common | {"axis": name}
        cells = confusion_cells(populations, seed=0, resamples=200)
        found["confusion_matrices"] += [own | asdict(cell) for cell in cells]
        found["corrected_shares"] += [own | asdict(row) for row in correct_shares(populations, seed=0, resamples=200)]
    return found


def run_with_people() -> ReportData:
    rng = np.random.default_rng(5)
    return replace(made_up.good_run(), votes=votes(rng), **audited_rows(rng))
