"""The emoji UNet as the trainer sees it."""

import torch

from popalign_core.alignment.adapters import trainable_parameters
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import make_policy


def gradients(gradient_checkpointing: bool) -> torch.Tensor:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    policy = make_policy(model, lora_rank=0, seed=0, gradient_checkpointing=gradient_checkpointing)
    embeddings = model.encode_prompts(["a photo of a judge"])
    noisy = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    predicted = policy.denoiser(noisy, torch.tensor([500]), embeddings.context.float(), embeddings.pooled.float())
    predicted.square().mean().backward()
    found = [parameter.grad.flatten() for parameter in policy.denoiser.parameters() if parameter.grad is not None]
    return torch.cat(found)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    torch.testing.assert_close(gradients(gradient_checkpointing=True), gradients(gradient_checkpointing=False))


def test_an_adapter_on_the_conditioning_is_on_cross_attention_alone() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    policy = make_policy(model, lora_rank=2, trainable="conditioning", seed=0)
    names = list(trainable_parameters(policy.denoiser))
    assert names
    assert all(".attn2." in name for name in names)
