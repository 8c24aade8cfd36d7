"""Attention of a UNet: which kernel computes it, query, key and value in one product, and none over an empty prompt."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own abbreviation
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from popalign_core.errors import InvalidInput

AttentionName = Literal["default", "cudnn", "flash", "efficient", "math"]
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
SELF, CROSS = "attn1", "attn2"
# What kernels are asked about: places of an image (how many does not matter to torch's choice), tokens of a caption.
POSITIONS, TOKENS = 64, 77


@dataclass(frozen=True)
class UnetAttention:
    """Processor for attention without masks and norms of its own, as all of SDXL's is.

    Fewer rows of context than of hidden states: the rows before have an all-zero context. With values that are products
    without a bias, attention over it is zero and the output is that of zeros, which is computed once for all.
    The rest is, operation by operation, diffusers' AttnProcessor2_0. fused: use what `fuse_projections` made.
    """

    fused: bool

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (rows, positions, width). encoder_hidden_states: (rows or fewer, tokens, width)."""
        del attention_mask, temb  # of attention that `is_plain` refuses
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        empty = len(hidden_states) - len(context)
        query, key, value = self._projected(attn, hidden_states[empty:], encoder_hidden_states)
        query, key, value = (_heads(part, attn.heads) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        output = attn.to_out[0](attended)
        if empty:
            nothing = attn.to_out[0](attended.new_zeros(1, 1, attended.shape[-1]))
            output = torch.cat([nothing.expand(empty, output.shape[1], -1), output])
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor

    def _projected(self, attn: Any, hidden: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if not self.fused:
            source = hidden if context is None else context
            return attn.to_q(hidden), attn.to_k(source), attn.to_v(source)
        if context is None:
            return attn.to_qkv(hidden).chunk(3, dim=-1)
        return (attn.to_q(hidden), *attn.to_kv(context).chunk(2, dim=-1))


def _heads(projected: Tensor, count: int) -> Tensor:
    """(rows, positions, width) as (rows, heads, positions, width of a head)."""
    rows, positions, width = projected.shape
    return projected.view(rows, positions, count, width // count).transpose(1, 2)


def attentions(unet: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every attention of a UNet's transformer blocks, as (attn1 or attn2, module)."""
    for name, module in cast("Iterator[tuple[str, Any]]", unet.named_modules()):
        last = name.rpartition(".")[2]
        if last in (SELF, CROSS):
            yield last, module


def is_plain(unet: nn.Module) -> bool:
    """Whether `UnetAttention` computes all of a UNet's attention."""
    found = [module for _, module in attentions(unet)]
    nothing = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    others = any(type(module).__name__ == "Attention" for module in unet.modules()) and not found
    return not others and all(
        not any(getattr(module, name, None) for name in nothing) and not module.residual_connection for module in found
    )


def ignores_empty_context(unet: nn.Module) -> bool:
    """Whether cross-attention over zeros is zero: the values have no bias, an adapter's included."""
    values = [module.to_v for name, module in attentions(unet) if name == CROSS]
    return is_plain(unet) and all(
        parameter is None or not bool(parameter.any())
        for value in values
        for parameter in (getattr(part, "bias", None) for part in value.modules())
    )


def fuse_projections(unet: nn.Module) -> None:
    """Adds the fused products beside the single ones. Raises: InvalidInput where an adapter would be left out."""
    if not is_plain(unet):
        raise InvalidInput("this UNet's attention has parts of its own: turn acceleration.fused_projections off.")
    for kind, module in attentions(unet):
        if hasattr(module.to_q, "base_layer"):
            raise InvalidInput(
                "acceleration.fused_projections leaves no place for a LoRA beside the weights: turn it off, or train "
                "with alignment.lora_rank 0."
            )
        if not hasattr(module, "to_qkv" if kind == SELF else "to_kv"):
            module.fuse_projections()


def attention_backend(name: AttentionName) -> AbstractContextManager[object]:
    """The attention kernel to use; "default" leaves the choice to torch.

    It holds for every call of torch's attention inside. diffusers' `set_attention_backend` does not: the processors of
    this UNet do not read it. Attention that the kernel cannot compute (the VAE's wide heads) falls to the next one.
    """
    if name == "default":
        return nullcontext()
    others = () if name == "math" else (other for other in KERNELS if other != name)
    order = [KERNELS[kernel] for kernel in (name, *others)]
    return cast("AbstractContextManager[object]", sdpa_kernel(order, set_priority=True))


def used_kernel(unet: nn.Module, name: AttentionName) -> str:
    """The kernels that really compute the UNet's attention, one as a rule, joined by "+".

    Asked for every width of head, over an image's own positions and over a caption's tokens.
    Raises: InvalidInput where another one was asked for.
    """
    network = cast("Any", unet)
    modules = [module for module in network.modules() if type(module).__name__ == "Attention"]
    shapes = {(m.heads, m.inner_dim // m.heads, TOKENS if m.is_cross_attention else POSITIONS) for m in modules}
    # The network's own answer, not a weight's number format: weights in 8 bits are cast for each call.
    settings: dict[str, Any] = {"device": network.device, "dtype": network.dtype}
    with torch.inference_mode(), attention_backend(name):
        found = "+".join(sorted({_chosen(*shape, settings) for shape in shapes})) or "none"
    if modules and name not in ("default", found):
        raise InvalidInput(
            f"sampling.attention is {name}, which torch cannot use for this model on {network.device.type} in "
            f"{str(network.dtype).removeprefix('torch.')}: it would take {found}. Choose "
            f"{f'{found} or default' if found in KERNELS else 'default'}."
        )
    return found


def _chosen(heads: int, width: int, tokens: int, settings: dict[str, Any]) -> str:
    query = torch.zeros(2, heads, POSITIONS, width, **settings)
    key = torch.zeros(2, heads, tokens, width, **settings)
    choose: Any = getattr(torch, "_fused_sdp_choice")  # noqa: B009 - there is no public name
    choice = SDPBackend(choose(query, key, key))
    return next((known for known, kernel in KERNELS.items() if kernel == choice), "none")
