from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_unet import UNetDenoiser, tiny_unet
from torch import Tensor, nn

from popalign_core.alignment.adapters import (
    FullPolicy,
    LoraPolicy,
    copy_weights,
    reference_mode,
    select_trainable,
    trainable_parameters,
)
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import train
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.lora import FILE_NAME, TARGET_MODULES, LoraTargets, add_lora, load_lora, merge_lora, save_lora

SETTINGS = AlignmentSettings(steps=4, pairs_per_step=4, learning_rate=1e-2, beta=50.0, seed=1)
RANK = 2


@pytest.fixture
def data() -> AlignmentData:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    arrays = {
        "latent_means": normal(16, 2, 4, 4),
        "prompt_embeddings": normal(3, 5, 6),
        "pooled": normal(3, 4),
        "empty_prompt_embedding": normal(5, 6),
        "empty_pooled": normal(4),
        "winner": np.arange(8),
        "loser": np.arange(8, 16),
        "caption": np.arange(8) % 3,
        "weight": np.ones(8, np.float32),
        "population": np.arange(8) % 3,
    }
    return AlignmentData.from_arrays(arrays)


@torch.no_grad()
def predict(denoiser: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    noisy, prompts, pooled = (torch.randn(shape, generator=generator) for shape in ((3, 2, 4, 4), (3, 5, 6), (3, 4)))
    return denoiser(noisy, torch.tensor([3, 20, 40]), prompts, pooled)


def lora_policy(seed: int = 5, targets: LoraTargets = "attention") -> tuple[LoraPolicy, UNetDenoiser]:
    denoiser = UNetDenoiser(tiny_unet())
    add_lora(denoiser.unet, RANK, targets, seed)
    return LoraPolicy(denoiser, denoiser.unet), denoiser


def full_policy() -> tuple[FullPolicy, UNetDenoiser]:
    denoiser = UNetDenoiser(tiny_unet())
    return FullPolicy(denoiser), denoiser


def attention_policy() -> tuple[FullPolicy, UNetDenoiser]:
    denoiser = UNetDenoiser(tiny_unet())
    return FullPolicy(denoiser, trainable="conditioning"), denoiser


POLICIES: list[Callable[[], tuple[LoraPolicy | FullPolicy, UNetDenoiser]]] = [
    lora_policy,
    full_policy,
    attention_policy,
]


@pytest.mark.parametrize("targets", list(TARGET_MODULES))
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(targets: LoraTargets) -> None:
    base = UNetDenoiser(tiny_unet()).requires_grad_(False)
    _, denoiser = lora_policy(targets=targets)
    assert torch.equal(predict(denoiser), predict(base))
    names = trainable_parameters(denoiser)
    assert names
    assert all(".lora_" in name for name in names)
    adapted = {name.split(".lora_")[0] for name in names}
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    ends = tuple(f".attn2.{end}" for end in attention) if targets == "cross_attention" else TARGET_MODULES[targets]
    assert adapted == {name for name, _ in base.named_modules() if name.endswith(tuple(ends))}


def test_adapters_are_drawn_from_the_seed_and_leave_the_global_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    weights = [copy_weights(lora_policy(seed)[1]) for seed in (5, 5, 6)]
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_adapter_size_is_reported_and_its_factors_are_float32() -> None:
    unet = tiny_unet().to(torch.bfloat16)
    elements = add_lora(unet, RANK, "attention", 0)
    factors = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert elements == sum(factor.numel() for factor in factors)
    assert {factor.dtype for factor in factors} == {torch.float32}
    with pytest.raises(InvalidInput, match="rank"):
        add_lora(tiny_unet(), 0, "attention", 0)


@pytest.mark.parametrize("make", POLICIES)
def test_training_moves_the_policy_and_not_the_reference(
    make: Callable[[], tuple[LoraPolicy | FullPolicy, UNetDenoiser]], data: AlignmentData
) -> None:
    policy, denoiser = make()
    before = predict(denoiser)
    frozen = {name: value.clone() for name, value in denoiser.named_parameters() if not value.requires_grad}
    records = list(train(policy, data, SETTINGS))
    # The reference pass and the policy pass must be the same arithmetic: g is exactly 0 at first.
    assert (records[0].winner_margin, records[0].loser_margin) == (0.0, 0.0)
    assert all(record.winner_margin != 0 and record.loser_margin != 0 for record in records[1:])
    assert not torch.equal(predict(denoiser), before)
    with policy.reference() as reference:
        assert isinstance(reference, nn.Module)
        assert torch.equal(predict(reference), before)
    assert not torch.equal(predict(denoiser), before)
    now = dict(denoiser.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert trainable_parameters(denoiser)


def test_adapters_come_back_on_after_an_error(data: AlignmentData) -> None:
    policy, denoiser = lora_policy()
    list(islice(train(policy, data, SETTINGS), 1))
    adapted, names = predict(denoiser), list(trainable_parameters(denoiser))
    with pytest.raises(RuntimeError, match="inside"), reference_mode(denoiser.unet):
        raise RuntimeError("inside")
    assert torch.equal(predict(denoiser), adapted)
    assert list(trainable_parameters(denoiser)) == names


def test_a_further_round_compares_with_its_own_start(data: AlignmentData, tmp_path: Path) -> None:
    policy, denoiser = lora_policy()
    list(train(policy, data, SETTINGS))
    after_one_round = predict(denoiser)
    save_lora(denoiser.unet, tmp_path)

    base = UNetDenoiser(tiny_unet())
    elements = load_lora(base.unet, tmp_path)
    assert elements == sum(parameter.numel() for parameter in trainable_parameters(base).values())
    assert all(".lora_" in name for name in trainable_parameters(base))
    further = LoraPolicy(base, base.unet, reference_at="start")
    records = list(train(further, data, SETTINGS))
    assert (records[0].winner_margin, records[0].loser_margin) == (0.0, 0.0)
    with further.reference():
        assert torch.equal(predict(base), after_one_round)
    assert not torch.equal(predict(base), after_one_round)
    with LoraPolicy(base, base.unet).reference():
        assert torch.equal(predict(base), predict(UNetDenoiser(tiny_unet()).requires_grad_(False)))


def test_parts_of_a_unet_are_selected_by_their_role() -> None:
    denoiser = UNetDenoiser(tiny_unet())
    attention = select_trainable(denoiser, "conditioning")
    names = list(trainable_parameters(denoiser))
    assert names
    assert all(".attn2." in name or ".add_embedding." in name for name in names)
    assert any(".attn2." in name for name in names)
    everything = select_trainable(denoiser, "all")
    assert everything == sum(parameter.numel() for parameter in denoiser.parameters())
    assert 0 < attention < everything / 2


def test_preserving_holds_predictions_under_named_captions(data: AlignmentData) -> None:
    data = replace(data, caption=torch.zeros(8, dtype=torch.int64), winner_caption=torch.full((8,), 2))
    named = data.latent_means[:8], torch.full((8,), 25), data.prompt_embeddings[[2] * 8], data.pooled[[2] * 8]
    moved: list[float] = []
    for weight in (0.0, 1000.0):
        policy, denoiser = full_policy()
        list(train(policy, data, replace(SETTINGS, steps=20, preserve_weight=weight)))
        with torch.no_grad(), policy.reference() as reference:
            moved.append((denoiser(*named) - reference(*named)).square().mean().item())
    assert 0 < moved[1] < moved[0] / 3


@pytest.mark.parametrize("targets", list(TARGET_MODULES))
def test_a_saved_adapter_loads_here_and_in_the_pipeline(
    targets: LoraTargets, data: AlignmentData, tmp_path: Path
) -> None:
    policy, denoiser = lora_policy(targets=targets)
    list(train(policy, data, SETTINGS))
    trained = predict(denoiser)
    save_lora(denoiser.unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]

    other = UNetDenoiser(tiny_unet())
    load_lora(other.unet, tmp_path)
    torch.testing.assert_close(predict(other), trained, rtol=0, atol=0)
    # What load_lora_weights of the pipeline does, without the other parts of a pipeline.
    third = UNetDenoiser(tiny_unet())
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(tmp_path), unet_config=third.unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, third.unet)
    torch.testing.assert_close(predict(third), trained, rtol=0, atol=0)


def test_a_merged_adapter_leaves_a_plain_unet(data: AlignmentData) -> None:
    policy, denoiser = lora_policy()
    base = predict(UNetDenoiser(tiny_unet()))
    list(train(policy, data, SETTINGS))
    trained = predict(denoiser)
    merge_lora(denoiser.unet)
    torch.testing.assert_close(predict(denoiser), trained, rtol=1e-4, atol=1e-5)
    assert float((trained - base).abs().max()) > 1e-2
    assert {name for name, _ in denoiser.unet.named_parameters()} == {
        name for name, _ in tiny_unet().named_parameters()
    }


def test_equal_adapters_have_equal_bytes(tmp_path: Path) -> None:
    contents: list[bytes] = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_lora(lora_policy()[1].unet, tmp_path / name)
        contents.append((tmp_path / name / FILE_NAME).read_bytes())
    assert contents[0] == contents[1]


def test_a_missing_or_damaged_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotUsable, match="cannot be read"):
        load_lora(tiny_unet(), tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"not safetensors")
    with pytest.raises(ModelNotUsable, match="cannot be read"):
        load_lora(tiny_unet(), tmp_path)


@pytest.mark.parametrize("make", POLICIES)
def test_resuming_is_exact_for_every_policy(
    make: Callable[[], tuple[LoraPolicy | FullPolicy, UNetDenoiser]], data: AlignmentData, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, ema_decay=0.9, winner_preserving=True, anchor_weight=1.0)
    policy, denoiser = make()
    expected = list(train(policy, data, settings))
    halted, _ = make()
    state = begin(halted, settings)
    list(islice(train(halted, data, settings, state=state), 2))
    save_state(state, tmp_path)
    resumed, again = make()
    rest = list(train(resumed, data, settings, state=load_state(resumed, settings, tmp_path)))
    assert [record.loss for record in rest] == [record.loss for record in expected[2:]]
    weights, others = copy_weights(denoiser), copy_weights(again)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
