"""Low-rank adapters on a diffusers UNet, in the files that `StableDiffusionXLPipeline.load_lora_weights` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]
from safetensors import SafetensorError

from popalign_core.errors import InvalidInput, ModelNotUsable

LoraTargets = Literal[
    "cross_attention", "attention", "attention_and_feed_forward", "attention_feed_forward_and_convolutions"
]

ADAPTER = "popalign"
FILE_NAME = "pytorch_lora_weights.safetensors"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut")
# A string is a regular expression over whole module names, a tuple holds their ends.
TARGET_MODULES: dict[LoraTargets, str | tuple[str, ...]] = {
    "cross_attention": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
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
    modules = TARGET_MODULES[targets]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules if isinstance(modules, str) else list(modules),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER)
    return _train_only_adapter(unet)


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapter alone into an existing folder."""
    layers = cast("dict[str, torch.nn.Module | torch.Tensor]", get_peft_model_state_dict(unet, adapter_name=ADAPTER))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=FILE_NAME)


def load_lora(unet: UNet2DConditionModel, folder: Path) -> int:
    """Put the adapter of a folder on a UNet without one, ready to train on; returns its number of elements.

    Raises: ModelNotUsable.
    """
    try:
        found: tuple[Any, ...] = StableDiffusionXLPipeline.lora_state_dict(
            str(folder), weight_name=FILE_NAME, unet_config=unet.config, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(f"the adapter in {folder} cannot be read: {error}.") from error
    weights: Mapping[str, torch.Tensor] = found[0]
    StableDiffusionXLPipeline.load_lora_into_unet(weights, found[1], unet, adapter_name=ADAPTER)
    return _train_only_adapter(unet)


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Add the adapter to the weights and remove it; the UNet then saves and loads as any other."""
    unet.fuse_lora(adapter_names=[ADAPTER])
    unet.unload_lora()


def _train_only_adapter(unet: UNet2DConditionModel) -> int:
    elements = 0
    for name, parameter in unet.named_parameters():
        chosen = f".{ADAPTER}." in name
        parameter.requires_grad_(chosen)
        if chosen:
            parameter.data = parameter.data.float()
            elements += parameter.numel()
    return elements
