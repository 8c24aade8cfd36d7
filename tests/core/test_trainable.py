"""The emoji UNet as the trainer sees it."""

import torch

from popalign_core.alignment.adapters import trainable_parameters
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import SdxlDenoiser, make_policy


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


def test_an_adapter_trains_on_a_bfloat16_model_from_float32_batches() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="bfloat16")
    policy = make_policy(model, lora_rank=2, seed=0)
    embeddings = model.encode_prompts(["a photo of a judge"])
    noisy, timesteps = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    conditions = embeddings.context.float(), embeddings.pooled.float()
    with policy.reference() as reference, torch.no_grad():
        before = reference(noisy, timesteps, *conditions)
    predicted = policy.denoiser(noisy, timesteps, *conditions)
    assert torch.equal(predicted, before)
    predicted.float().square().mean().backward()
    gradients = [parameter.grad for parameter in trainable_parameters(policy.denoiser).values()]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_the_size_condition_is_that_of_the_images() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    sizes = [make_policy(model, lora_rank=0, seed=0, image_size=side).denoiser for side in (0, 48)]
    assert [module.get_buffer("time_ids").tolist() for module in sizes if isinstance(module, SdxlDenoiser)] == [
        [[64, 64, 0, 0, 64, 64]],
        [[48, 48, 0, 0, 48, 48]],
    ]
