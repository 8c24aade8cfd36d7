"""Low-rank adapters on a diffusers UNet, in the files that `StableDiffusionXLPipeline.load_lora_weights` reads."""

# diffusers and peft are typed in part only; what they return is annotated where it enters.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from popalign_core.errors import InvalidInput, ModelNotUsable

LoraTargets = Literal["attention", "attention_and_feed_forward", "attention_feed_forward_and_convolutions"]

ADAPTER = "popalign"
FILE_NAME = "pytorch_lora_weights.safetensors"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
TARGET_MODULES: dict[LoraTargets, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention_and_feed_forward": _ATTENTION + _FEED_FORWARD,
    "attention_feed_forward_and_convolutions": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
}


def add_lora(unet: UNet2DConditionModel, rank: int, targets: LoraTargets, seed: int) -> int:
    """Freeze the UNet and put a trainable adapter on it; returns its number of elements.

    The adapter starts as exactly nothing (B = 0), A is drawn from the seed. Its factors are float32 whatever the
    UNet's dtype: one Adam step at these learning rates is lost in bf16. Raises: InvalidInput.
    Source: Hu et al. 2021, "LoRA", with alpha = rank, so that the scale is 1.
    """
    if rank < 1:
        raise InvalidInput(f"the rank of the adapter is {rank}, expected at least 1.")
    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(TARGET_MODULES[targets]), init_lora_weights="gaussian"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER)
    factors = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    return sum(factor.numel() for factor in factors)


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapter alone into an existing folder."""
    layers = cast("dict[str, torch.nn.Module | torch.Tensor]", get_peft_model_state_dict(unet, adapter_name=ADAPTER))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=FILE_NAME)


def load_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Put the adapter of a folder on the UNet, switched on and trainable. Raises: ModelNotUsable."""
    try:
        found: tuple[Any, ...] = StableDiffusionXLPipeline.lora_state_dict(
            str(folder), weight_name=FILE_NAME, unet_config=unet.config, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(f"the adapter in {folder} cannot be read: {error}.") from error
    weights: Mapping[str, torch.Tensor] = found[0]
    StableDiffusionXLPipeline.load_lora_into_unet(weights, found[1], unet, adapter_name=ADAPTER)


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Add the adapter to the weights and remove it; the UNet then saves and loads as any other."""
    unet.fuse_lora(adapter_names=[ADAPTER])
    unet.unload_lora()
