"""Low-rank adapters on a UNet or a transformer of diffusers, in the files that `load_lora_weights` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
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
# The caption's side of joint attention.
_CAPTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# A string is a regular expression over whole module names, a tuple holds their ends.
TARGET_MODULES: dict[LoraTargets, str | tuple[str, ...]] = {
    "cross_attention": r".*\.attn2\.(to_q|to_k|to_v|to_out\.0)",
    "attention": _ATTENTION,
    "attention_and_feed_forward": _ATTENTION + _FEED_FORWARD,
    "attention_feed_forward_and_convolutions": _ATTENTION + _FEED_FORWARD + _CONVOLUTIONS,
}
TRANSFORMER_MODULES: dict[LoraTargets, tuple[str, ...]] = {
    "cross_attention": _CAPTION,
    "attention": _ATTENTION + _CAPTION,
    "attention_and_feed_forward": _ATTENTION + _CAPTION + _FEED_FORWARD + ("ff_context.net.0.proj", "ff_context.net.2"),
}
Network = UNet2DConditionModel | SD3Transformer2DModel


def add_lora(unet: Network, rank: int, targets: LoraTargets, seed: int) -> int:
    """Freeze the UNet or transformer and put a trainable adapter on it; returns its number of elements.

    The adapter starts as exactly nothing (B = 0), A is drawn from the seed. Its factors are float32 whatever the
    network's dtype: one Adam step at these learning rates is lost in bf16. Raises: InvalidInput.
    Source: Hu et al. 2021, "LoRA", with alpha = rank, so that the scale is 1.
    """
    if rank < 1:
        raise InvalidInput(f"the rank of the adapter is {rank}, expected at least 1.")
    modules = target_modules(unet, targets)
    unet.requires_grad_(False)
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


def target_modules(network: Network, targets: LoraTargets) -> str | tuple[str, ...]:
    """Which layers those are in that network. Raises: InvalidInput where it has none of the kind."""
    if isinstance(network, UNet2DConditionModel):
        return TARGET_MODULES[targets]
    if targets not in TRANSFORMER_MODULES:
        raise InvalidInput(f"a transformer has no {targets} to adapt; it has {', '.join(TRANSFORMER_MODULES)}.")
    return TRANSFORMER_MODULES[targets]


def save_lora(unet: Network, folder: Path) -> None:
    """Write the adapter alone into an existing folder."""
    layers = cast("dict[str, torch.nn.Module | torch.Tensor]", get_peft_model_state_dict(unet, adapter_name=ADAPTER))
    # The files of an adapter for a UNet are the same in all families.
    if isinstance(unet, UNet2DConditionModel):
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=FILE_NAME)
    else:
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=FILE_NAME)


def load_lora(unet: Network, folder: Path) -> int:
    """Put the adapter of a folder on a network without one, ready to train on; returns its number of elements.

    Raises: ModelNotUsable.
    """
    options: dict[str, Any] = {"weight_name": FILE_NAME, "use_safetensors": True, "local_files_only": True}
    try:
        if isinstance(unet, UNet2DConditionModel):
            found: Any = StableDiffusionXLPipeline.lora_state_dict(str(folder), unet_config=unet.config, **options)
            StableDiffusionXLPipeline.load_lora_into_unet(found[0], found[1], unet, adapter_name=ADAPTER)
        else:
            weights: Mapping[str, torch.Tensor] = StableDiffusion3Pipeline.lora_state_dict(str(folder), **options)
            StableDiffusion3Pipeline.load_lora_into_transformer(weights, unet, adapter_name=ADAPTER)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(f"the adapter in {folder} cannot be read: {error}.") from error
    return _train_only_adapter(unet)


def merge_lora(unet: Network) -> None:
    """Add the adapter to the weights and remove it; the network then saves and loads as any other."""
    unet.fuse_lora(adapter_names=[ADAPTER])
    unet.unload_lora()


def _train_only_adapter(unet: Network) -> int:
    elements = 0
    for name, parameter in unet.named_parameters():
        chosen = f".{ADAPTER}." in name
        parameter.requires_grad_(chosen)
        if chosen:
            parameter.data = parameter.data.float()
            elements += parameter.numel()
    return elements
