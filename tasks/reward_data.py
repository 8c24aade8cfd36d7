"""What a policy gradient trains on: the run's neutral training prompts, and the builder to judge what it draws."""

from popalign_core.alignment.chain import Conditions
from popalign_core.alignment.policy_gradient import RewardData
from popalign_core.alignment.reward import ParityTarget
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput
from popalign_core.models.latent_labels import latent_labeller, latent_shape
from popalign_core.models.sdxl import SdxlModel
from popalign_core.models.text_to_image import TextToImageModel
from tasks.run import classifier_of, read_prompts
from tasks.training_order import RoundOrder


def reward_data(order: RoundOrder, model: TextToImageModel) -> RewardData:
    """For a model on its device. Raises: InvalidInput for another family; NotCommitted before the expansion."""
    if not isinstance(model, SdxlModel):
        raise InvalidInput(
            f"alignment.objective is reward, which is written for SDXL alone, and the model is {model.family.title}: "
            "choose popalign, dpo or sft."
        )
    config, place = order.config, order.ref
    prompts = [p for p in read_prompts(place.workspace, place.run_id) if p.split == "train" and p.kind == "neutral"]
    encoded = model.encode_captions([prompt.text for prompt in prompts])
    axes = [AXES[name] for name in config.expansion.axes]
    builder = classifier_of("builder", config.classification, str(model.device))
    return RewardData(
        prompts=tuple(prompt.prompt_id for prompt in prompts),
        captions=Conditions(
            encoded["prompt_embeddings"],
            encoded["pooled"],
            encoded["empty_prompt_embedding"],
            encoded["empty_pooled"],
        ),
        targets=tuple(ParityTarget(axis, axis.uniform()) for axis in axes),
        label=latent_labeller(
            model, builder, axes, config.classification.min_confidence, at_once=config.alignment.micro_batch
        ),
        shape=latent_shape(model, config.sampling.image_size),
    )
