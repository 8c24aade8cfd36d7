"""What a run can be refused for before anything is loaded or drawn."""

from popalign_core.config import RunConfig
from popalign_core.controls import load_controls
from popalign_core.expansion import prompts_of
from popalign_core.models.attribute_heads import check_heads
from popalign_core.models.checkpoints import check_adapter, check_cacheable, check_source, check_unet
from popalign_core.models.detectors import check_detector
from popalign_core.models.scorers import check_scorers
from popalign_core.models.sdxl import pick_device
from popalign_core.models.zero_shot import check_builder


def check_inputs(config: RunConfig) -> None:
    """Prompts, models, classifiers, detectors, scorers and device. Raises: InvalidInput, ModelNotUsable."""
    prompts_of(config.expansion)
    load_controls(config.expansion.controls, config.expansion.prefix)
    check_source(config.model, config.sampling.image_size, config.sampling.scheduler)
    if config.model_lora:
        check_adapter(config.model_lora)
    if config.model_unet:
        check_unet(config.model_unet, config.model)
    if config.sampling.approximate.distilled_lora:
        check_adapter(config.sampling.approximate.distilled_lora)
    if config.sampling.approximate.cache_every > 1:
        check_cacheable(config.model)
    check_builder(config.classification.builder, config.expansion.axes)
    check_heads(config.classification.judge, config.expansion.axes)
    if config.detection.persons:
        check_detector(config.detection.persons, "person")
    if config.detection.faces:
        check_detector(config.detection.faces, "face")
    check_scorers(config.quality.sources)
    pick_device(config.device)
