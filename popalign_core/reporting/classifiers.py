"""How far the two classifiers agree, and why images have no group."""

from collections.abc import Sequence

from popalign_core.reporting.comparisons import HELD_OUT, SPLITS, ComparedNumber
from popalign_core.reporting.formatting import axis_label, from_to, measure_label, plain_words
from popalign_core.reporting.report_data import Change, Measured, ReportData, Row, matching, measured, paired


def agreements(data: ReportData) -> list[ComparedNumber]:
    """Kappa and the share of equal labels, of both models; `of` says how many images both gave a group."""
    ours = matching(data.agreements, judge_id=data.judge_id, builder_id=data.builder_id)
    return [
        ComparedNumber(
            name=f"{axis_label(str(axis))}: {measure_label(str(measure))}",
            of=f"{SPLITS.get(str(split), split)}, {from_to(_images(before, after))} images",
            unit="",
            change=Change(measured(before), measured(after)),
            style="share" if measure == "observed_agreement" else "plain",
        )
        for (split, axis, measure), (before, after) in paired(ours, ("split", "axis", "measure"), data).items()
    ]


def unlabelled(data: ReportData) -> list[ComparedNumber]:
    """Share of held-out images of each status but ok, by classifier; statuses that none has are left out."""
    rows = [row for row in matching(data.status_counts, split=HELD_OUT) if row["status"] != "ok"]
    names = {data.judge_id: "judge", data.builder_id: "builder"}
    return [
        ComparedNumber(
            name=f"{axis_label(str(axis))}: {plain_words(str(status)).lower()}",
            of=f"{names[str(judge)]}, {from_to(_images(before, after))} images",
            unit="",
            change=Change(_share(before), _share(after)),
            style="share",
        )
        for (judge, axis, status), (before, after) in paired(rows, ("judge_id", "axis", "status"), data).items()
        if judge in names and any(row is not None and row["count"] for row in (before, after))
    ]


def _images(*rows: Row | None) -> Sequence[int]:
    return [int(row["n"]) for row in rows if row is not None]


def _share(row: Row | None) -> Measured | None:
    return None if row is None else Measured(float(row["share"]), n=int(row["n"]))
