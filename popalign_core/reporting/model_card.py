"""The card of an exported model: how to open it, what was measured, and what it must not be taken for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from popalign_core.attributes import AXES
from popalign_core.models.families import SDXL, Family
from popalign_core.reporting import comparisons
from popalign_core.reporting.formatting import Style, as_text, measure_label, plain_words
from popalign_core.reporting.report import decision_checks, verdict
from popalign_core.reporting.report_data import Measured, ReportData, matching

if TYPE_CHECKING:
    from popalign_core.models.export import Form

_RELATIONS = {"lora": "adapter", "unet": "finetune", "transformer": "finetune", "pipeline": "finetune"}


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """form: what was written beside the card. pipeline: what `from_pretrained` opens the base model from.

    base_model: the configured pipeline. lineage: (name, value) of base, data, configuration and weights. family: of the
    base model. absent: the parts that it is without.
    """

    form: "Form"
    pipeline: str
    base_model: str
    lineage: Sequence[tuple[str, str]]
    family: Family = SDXL
    absent: Sequence[str] = ()


def opening_lines(form: "Form", pipeline: str, family: Family = SDXL, absent: Sequence[str] = ()) -> tuple[str, ...]:
    """The Python that opens an exported model with plain diffusers, run in its folder. absent: see `ExportedModel`."""
    # `to`: transformers opens text encoders in the precision they are stored in, diffusers a UNet in float32.
    base = json.dumps(pipeline, ensure_ascii=False)
    options = ", ".join([*(f"{part}=None" for part in absent), "use_safetensors=True"])
    kind, part = family.pipeline, family.denoiser
    if form == "lora":
        return (
            f"from diffusers import {kind}",
            f"pipe = {kind}.from_pretrained({base}, {options})",
            f'pipe.to(pipe.{part}.dtype).load_lora_weights(".")',
        )
    if form == part:
        return (
            f"from diffusers import {kind}, {family.network}",
            f'{part} = {family.network}.from_pretrained(".", subfolder="{part}", use_safetensors=True)',
            f"pipe = {kind}.from_pretrained({base}, {part}={part}, {options}).to({part}.dtype)",
        )
    return (f"from diffusers import {kind}", f'pipe = {kind}.from_pretrained(".", {options})')


def render_model_card(data: ReportData, model: ExportedModel) -> str:
    """A README.md with the front matter that model hubs read.

    data: of the run, at least its prompts, disparities, comparisons, scores, models and decision; without the latter
    four the card says that the model was not assessed.
    """
    row: Mapping[str, Any] = matching(data.models, model_id=data.model_id)[0]
    neutral = matching(data.prompts, kind="neutral")
    card = _environment().get_template("model_card.md.j2")
    return card.render(
        front_matter=_front_matter(model),
        data=data,
        model=model,
        row=row,
        trained_from=row.get("base_model") or model.base_model,
        code="\n".join(opening_lines(model.form, model.pipeline, model.family, model.absent)),
        axes=[AXES[name] for name in data.config["expansion"]["axes"]],
        prompt_counts={split: len(matching(neutral, split=split)) for split in ("train", "validation", "eval")},
        headline=comparisons.headline(data),
        quality=comparisons.quality(data),
        verdict=verdict(data),
        checks=decision_checks(data),
        measure_name=measure_label(data.measure),
    )


def _front_matter(model: ExportedModel) -> str:
    tags = [model.family.tag, "text-to-image", "popalign", *(["lora"] if model.form == "lora" else [])]
    facts = ModelCardData(
        base_model=model.base_model,
        base_model_relation=_RELATIONS[model.form],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    return facts.to_yaml()


def _estimate(value: Measured | None, style: Style = "plain") -> str:
    if value is None:
        return "not measured"
    text = as_text(value.value, style)
    if value.low is None or value.high is None:
        return text
    return f"{text} [{as_text(value.low, style)}, {as_text(value.high, style)}]"


def _cell(text: object) -> str:
    """Text that cannot end a cell of a table or its row."""
    return " ".join(str(text).split()).replace("|", "\\|")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("popalign_core.reporting"),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(estimate=_estimate, cell=_cell, as_text=as_text, words=plain_words)
    return environment
