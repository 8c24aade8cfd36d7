"""Numbers and names as a reader sees them. Every number stands in a <data> element that carries its exact value."""

import math
import re
from collections.abc import Iterable
from typing import Literal

from markupsafe import Markup

from popalign_core.attributes import CROSSING
from popalign_core.reporting.report_data import Measured

Style = Literal["plain", "share", "count", "seconds", "ratio", "significant"]
MEASURES = {
    "l2": "L2 disparity",
    "unbiased_squared_l2": "Squared L2, less what sampling adds",
    "total_variation": "Total variation",
    "kl_divergence": "KL divergence",
    "normalized_entropy": "Entropy, share of the largest possible",
    "worst_group_share": "Share of the rarest group",
    "paper_code_disparity": "L2 over the observed groups only, as in the paper's code",
    "clip_score": "CLIP score",
    "pickscore": "PickScore",
    "hps": "Human preference score (HPS v2.1)",
    "aesthetics": "Aesthetic score (LAION)",
    "vqa": "Asked whether the image shows the prompt (VQA)",
    "paired_similarity": "Likeness of the two models' images of one noise",
    "fact": "Shows the group that is a fact",
    "people_without_being_asked": "Somebody in pictures without a person",
    "vendi_score": "Diversity (Vendi score)",
    "frechet_to_base": "Frechet distance",
    "fd_dinov2": "Frechet distance (FD-DINOv2)",
    "fid": "Frechet distance (Inception)",
    "kid": "Kernel distance (KID)",
    "cmmd": "CMMD",
    "cohen_kappa": "Cohen's kappa",
    "observed_agreement": "share of equal labels",
}
_NOT_MEASURED = Markup('<span class="absent">not measured</span>')


def as_text(value: float, style: Style = "plain") -> str:
    """A number in the style's unit and precision, e.g. 0.471, 71.2%, 1,024, 1 min 40 s."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else "minus infinite" if value < 0 else "not a number"
    match style:
        case "plain":
            return f"{value:.3f}"
        case "share":
            return f"{100 * value:.1f}%"
        case "count":
            return f"{value:,.0f}"
        case "seconds":
            minutes, seconds = divmod(round(value), 60)
            return f"{value:.1f} s" if round(value, 1) < 60 else f"{minutes} min {seconds} s"
        case "ratio":
            return f"{value:.2f}"
        case "significant":
            return f"{value:g}" if value == round(value) and abs(value) < 1e4 else f"{value:#.4g}"


def number(value: float | None, style: Style = "plain") -> Markup:
    """One number, or "not measured"; one that is not a number was not measured either."""
    if value is None or math.isnan(value):
        return _NOT_MEASURED
    return Markup('<data value="{}">{}</data>').format(repr(value), as_text(value, style))


def estimate(value: Measured | None, style: Style = "plain") -> Markup:
    """A number and its 95% interval, or "not measured"."""
    if value is None:
        return _NOT_MEASURED
    if value.low is None or value.high is None:
        return Markup('<span class="estimate">{}</span>').format(number(value.value, style))
    return Markup('<span class="estimate">{} <span class="interval">{} to {}</span></span>').format(
        number(value.value, style), number(value.low, style), number(value.high, style)
    )


def axis_label(axis: str) -> str:
    """An axis in words: "Perceived gender", crossed "Perceived gender and skin tone"; empty if there is none."""
    names = [part.removeprefix("perceived_").replace("_", " ") for part in axis.split(CROSSING)]
    return "Perceived " + " and ".join(names) if axis else ""


def measure_label(measure: str) -> str:
    """A measure's name in words."""
    name, _, axis = measure.partition(":")
    if axis:
        return f"{MEASURES.get(name, plain_words(name))}: {axis_label(axis).lower()}"
    return MEASURES.get(name, plain_words(name))


def plain_words(name: str) -> str:
    """A column's or check's name without underscores, first letter large."""
    words = re.sub(r"\bclip\b", "CLIP", name.replace("_", " ").strip())
    return words[:1].upper() + words[1:]


def from_to(counts: Iterable[int | None]) -> str:
    """The range of counts: "48", "44 to 48" where they differ, "no" if there are none."""
    present = sorted({count for count in counts if count is not None})
    if not present:
        return "no"
    return f"{present[0]:,}" if len(present) == 1 else f"{present[0]:,} to {present[-1]:,}"
