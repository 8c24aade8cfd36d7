"""Policies over a loaded model, and what training leaves of them."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from popalign_core.alignment.adapters import FullPolicy, LoraPolicy, Policy, TrainablePart
from popalign_core.alignment.denoiser import Schedule
from popalign_core.alignment.sharding import all_whole, is_sharded, shard
from popalign_core.errors import InvalidInput
from popalign_core.models.denoisers import NetworkDenoiser, repeated_blocks, sharded_groups
from popalign_core.models.denoisers import SdxlDenoiser as SdxlDenoiser
from popalign_core.models.lora import add_lora, load_lora, save_lora
from popalign_core.models.text_to_image import TextToImageModel


def noise_schedule(model: TextToImageModel, image_size: int = 0) -> Schedule:
    """The forward process that a pipeline was trained on. image_size: pixels a side, 0 = the model's own."""
    return model.schedule(image_size)


@dataclass(frozen=True)
class PassOptions:
    """How passes are computed.

    gradient_checkpointing: activations are computed twice instead of kept. mixed_precision: as in the settings.
    compiled: the network's repeated blocks through torch.compile, each kind once a size of pass. sharded: the weights
    of policy and reference are divided over the processes of torch's default group.
    """

    gradient_checkpointing: bool = False
    mixed_precision: bool = False
    compiled: bool = False
    sharded: bool = False


PLAIN = PassOptions()
# Of a block's code: its kinds, times the sizes of a pass. torch's own limit of 8 is for graphs that follow a value.
MOST_GRAPHS = 64


def make_policy(
    model: TextToImageModel,
    *,
    lora_rank: int,
    trainable: TrainablePart = "all",
    seed: int,
    earlier_lora: Path | None = None,
    passes: PassOptions = PLAIN,
    image_size: int = 0,
) -> Policy:
    """A policy over a loaded model's denoiser: fine-tuning in float32 (rank 0) of that part, or a LoRA adapter on it.

    The adapter is on all attention, or on what the caption enters by alone where the conditioning is the part to train.
    earlier_lora: folder of the adapter of the round before; training goes on from it and compares with it. The model
    must then have been loaded without an adapter. image_size: pixels a side that the images were drawn at, which SDXL
    is conditioned on and a flow may be shifted by; 0 = the model's own.
    Raises: InvalidInput for a sharded adapter.
    """
    if passes.sharded and lora_rank:
        raise InvalidInput("a LoRA is not sharded: alignment.sharded is for full fine-tuning, alignment.lora_rank = 0.")
    denoiser = model.denoiser(image_size)
    assert isinstance(denoiser, NetworkDenoiser)  # of every family
    # A sharded one is copied and divided in the host's memory: a device never has both models whole.
    denoiser.to("cpu" if passes.sharded else model.device)
    network = denoiser.network
    if passes.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if lora_rank == 0:
        # Master weights in float32: at these learning rates an update is lost in bfloat16.
        torch.nn.Module.to(network, torch.float32)  # diffusers' own warns that nothing must stay in float32: all does
        conditioning = model.family.conditioning
        formats = {"mixed_precision": passes.mixed_precision, "compiled": passes.compiled}
        policy = FullPolicy(denoiser, trainable, conditioning, **formats)
    elif earlier_lora is not None:
        load_lora(network, earlier_lora)
        policy = LoraPolicy(denoiser, network, reference_at="start", compiled=passes.compiled)
    else:
        add_lora(network, lora_rank, "attention" if trainable == "all" else "cross_attention", seed)
        policy = LoraPolicy(denoiser, network, compiled=passes.compiled)
    if passes.compiled:
        _compile_blocks(policy)
    if passes.sharded:
        for each in _networks(policy):
            shard(each, sharded_groups(each), model.device)
    return policy


def _compile_blocks(policy: Policy) -> None:
    """Policy and reference alike: a reference computed by other kernels would differ from the policy by rounding."""
    for network in _networks(policy):
        for block in repeated_blocks(network):
            # No graph for any size: whether one were met before or after the policy's would decide its rounding.
            block.compile(fullgraph=True, dynamic=False, recompile_limit=MOST_GRAPHS)


@contextmanager
def own_graphs(compiled: bool) -> Generator[None]:
    """Inside, a training that is compiled has torch's graphs to itself, and leaves none.

    They belong to the code of a block, not to a model: those of sampler and trainer would count against one limit,
    beyond which the sampler runs uncompiled in silence and the trainer not at all.
    """
    if compiled:
        torch.compiler.reset()
    try:
        yield
    finally:
        if compiled:
            torch.compiler.reset()


def _networks(policy: Policy) -> list[Any]:
    """That of the policy, and the reference's where it is another one."""
    with policy.reference() as reference:
        denoisers = {id(each): each for each in (policy.denoiser, reference)}.values()
    return [_network(denoiser) for denoiser in denoisers]


def _network(denoiser: object) -> Any:
    assert isinstance(denoiser, NetworkDenoiser)  # made by make_policy
    return denoiser.network


def whole_network(policy: Policy, *, keep: bool = True) -> Any:
    """The policy's network with whole weights: itself, or a copy in the host's memory where it is sharded.

    All processes of a sharded training must call it. keep: False in one that only takes part; it gets None.
    Raises: LostProcess.
    """
    network = _network(policy.denoiser)
    if not is_sharded(network.parameters()):
        return network
    weights = all_whole(network.state_dict(), keep=keep)
    if not keep:
        return None
    from torch.distributed.fsdp import FSDPModule  # late, as in `sharding`

    # Its class is one of FSDP2's before the network's own, whose name would be saved with it.
    kinds: tuple[Any, ...] = type(network).__mro__
    plain = next(kind for kind in kinds if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        copy = plain.from_config(network.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def save_weights(policy: Policy, folder: Path, *, lora: bool, network: Any = None) -> None:
    """Writes what was trained: `unet/` or `transformer/` as diffusers saves it, or `lora/` for `load_lora_weights`.

    network: of `whole_network`, where the policy is sharded.
    """
    denoiser = policy.denoiser
    assert isinstance(denoiser, NetworkDenoiser)  # made by make_policy
    part = folder / ("lora" if lora else denoiser.part)
    part.mkdir()
    if lora:
        save_lora(denoiser.network, part)
    else:
        (network or denoiser.network).save_pretrained(part, safe_serialization=True)
