"""The emoji UNet as the trainer sees it."""

import math
from pathlib import Path

import pytest
import torch
from emoji_pairs import emoji_pairs

from popalign_core.alignment.adapters import copy_weights, trainable_parameters
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import train
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import PassOptions, SdxlDenoiser, make_policy, noise_schedule, save_weights


def gradients(gradient_checkpointing: bool) -> torch.Tensor:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    policy = make_policy(model, lora_rank=0, seed=0, passes=PassOptions(gradient_checkpointing=gradient_checkpointing))
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


def test_a_lora_of_the_base_model_is_in_its_weights_and_in_those_that_replace_them(tmp_path: Path) -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    policy = make_policy(model, lora_rank=2, seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(policy.denoiser).values():
            parameter.add_(0.05)
    (tmp_path / "base").mkdir()
    save_weights(policy, tmp_path / "base", lora=True)
    lora, adapter = str(tmp_path / "base" / "lora"), model.pipeline.unet

    fused = load_sdxl(ModelSource("emoji", fused_lora=lora), device="cpu", dtype="float32")
    assert not any("lora" in name for name in fused.pipeline.unet.state_dict())
    embeddings = fused.encode_prompts(["a photo of a judge"])
    inputs = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    predicted = [
        SdxlDenoiser(unet, noise_schedule(fused), fused.time_ids(64, 64))(
            *inputs, embeddings.context.float(), embeddings.pooled.float()
        )
        for unet in (fused.pipeline.unet, adapter, load_sdxl(ModelSource("emoji"), device="cpu").pipeline.unet)
    ]
    torch.testing.assert_close(predicted[0], predicted[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(predicted[0], predicted[2], atol=1e-2)

    # What a round saved already holds the LoRA; it must not be added again.
    (tmp_path / "round").mkdir()
    save_weights(make_policy(fused, lora_rank=0, seed=0), tmp_path / "round", lora=False)
    again = load_sdxl(ModelSource("emoji", unet=str(tmp_path / "round" / "unet"), fused_lora=lora), device="cpu")
    for name, weight in again.pipeline.unet.state_dict().items():
        assert torch.equal(weight, fused.pipeline.unet.state_dict()[name])


def test_the_size_condition_is_that_of_the_images() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    sizes = [make_policy(model, lora_rank=0, seed=0, image_size=side).denoiser for side in (0, 48)]
    assert [module.get_buffer("time_ids").tolist() for module in sizes if isinstance(module, SdxlDenoiser)] == [
        [[64, 64, 0, 0, 64, 64]],
        [[48, 48, 0, 0, 48, 48]],
    ]


def test_a_bfloat16_reference_is_the_same_function_as_the_policy_in_mixed_precision() -> None:
    """To the last bit, at half the memory; without autocast's rounding on the other side it would not be."""
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    policy = make_policy(model, lora_rank=0, seed=0, passes=PassOptions(mixed_precision=True))
    embeddings = model.encode_prompts(["a photo of a judge"])
    inputs = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    conditions = embeddings.context.float(), embeddings.pooled.float()
    with policy.reference() as reference, torch.no_grad():
        sizes = [sum(p.numel() * p.element_size() for p in each.parameters()) for each in (reference, policy.denoiser)]
        with torch.autocast("cpu", torch.bfloat16):
            expected = reference(*inputs, *conditions)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = policy.denoiser(*inputs, *conditions)
        plain = policy.denoiser(*inputs, *conditions)
    assert sizes[0] < 0.51 * sizes[1]
    assert torch.equal(predicted.float(), expected.float())
    assert not torch.equal(plain, expected.float())


def test_mixed_precision_trains_float32_weights_from_the_reference() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    data = emoji_pairs(model)
    settings = AlignmentSettings(steps=2, pairs_per_step=2, mixed_precision=True)
    for rank in (0, 2):
        policy = make_policy(model, lora_rank=rank, seed=0, passes=PassOptions(mixed_precision=True))
        before = copy_weights(policy.denoiser)
        first, second = train(policy, data, settings)
        assert (first.winner_margin, first.loser_margin) == (0, 0)
        assert first.loss == pytest.approx(math.log(2), rel=1e-6)
        assert second.loss != first.loss
        assert {weight.dtype for weight in before.values()} == {torch.float32}
        assert any(not torch.equal(weight, before[name]) for name, weight in copy_weights(policy.denoiser).items())
