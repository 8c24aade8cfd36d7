"""Runs over many nights, made up, for the page that compares them."""

from datetime import UTC, datetime, timedelta

import numpy as np

from popalign_core.reporting.trend import IMAGES, TrendRun

GENDER, TONE = "perceived_gender", "perceived_skin_tone"


def night(
    number: int, *, judge: str = "heads:a@1", verdict: str = "promote", base: float = 0.5, images: int = 48
) -> TrendRun:
    """verdict: empty = it came to no decision, and only the base model was measured; failed = to nothing at all."""
    rng = np.random.default_rng(number)
    run_id = f"night-{number:03d}"
    disparities, comparisons = [], []
    sides = {"promote": ("before", "after"), "hold": ("before", "after"), "": ("before",), "failed": ()}[verdict]
    for axis, shift in ((GENDER, 0.0), (TONE, 0.125)):
        values = {"before": base + shift + rng.normal(0, 0.02), "after": 0.25 + shift / 2 + rng.normal(0, 0.02)}
        disparities += [
            {"run_id": run_id, "axis": axis, "which": side, "value": values[side], "judge_id": judge, "n": 600}
            | {"low": values[side] - 0.07, "high": values[side] + 0.06, "floor": 0.1125, "unknown": 12}
            for side in sides
        ]
        if len(sides) > 1:
            common = {"run_id": run_id, "axis": axis, "judge_id": judge}
            comparisons.append(common | {"measure": "obedience", "before": 0.95, "after": 0.94})
            comparisons.append(common | {"measure": "unknown", "before": 0.02, "after": 0.03})
    if len(sides) > 1:
        score = {"run_id": run_id, "axis": "", "measure": "clip_score", "before": 55.875, "after": 55.25}
        comparisons.append(score | {"judge_id": "open_clip:b@2"})
    stages = [
        {"run_id": run_id, "stage": stage, "seconds": seconds, "items": items}
        for stage, seconds, items in (("sampling", 301.5, 3500), ("alignment", 92.25, 120), ("assessment", 12.0, 1200))
    ]
    return TrendRun(
        run_id=run_id,
        started=(datetime(2026, 1, 1, 2, tzinfo=UTC) + timedelta(days=number)).isoformat(timespec="seconds"),
        preset="emoji",
        comparable={"Base model": "emoji", "Judge": judge if sides else "", "Held-out prompts": "15 texts, 0a1b2c3d"}
        | {IMAGES: str(images)},
        verdict="" if verdict == "failed" else verdict,
        reason="The disparity fell enough." if verdict == "promote" else "Too little." if verdict == "hold" else "",
        link=f"runs/{run_id}/report.html" if sides else "",
        disparities=disparities,
        comparisons=comparisons,
        stages=stages,
    )


def one() -> list[TrendRun]:
    return [night(0)]


def three() -> list[TrendRun]:
    return [night(0), night(1, verdict="hold"), night(2)]


def troubled() -> list[TrendRun]:
    """A night that failed, one that stopped half-way, and another judge from the sixth on."""
    verdicts = ["promote", "failed", "promote", "", "hold"]
    return [night(number, verdict=verdict) for number, verdict in enumerate(verdicts)] + [
        night(number, judge="heads:other@9", base=0.6) for number in (5, 6, 7)
    ]


def hundred() -> list[TrendRun]:
    return [night(number, verdict="hold" if number % 7 == 3 else "promote") for number in range(100)]


def nothing_measured() -> list[TrendRun]:
    return [night(0, verdict="failed")]


STATES = {"one": one, "three": three, "troubled": troubled, "hundred": hundred, "nothing measured": nothing_measured}
