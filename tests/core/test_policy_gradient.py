import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny_unet import UNetDenoiser, tiny_unet
from torch import Tensor, nn

from popalign_core.alignment.adapters import FullPolicy, copy_weights
from popalign_core.alignment.chain import Conditions, DenoisingChain, step_log_density
from popalign_core.alignment.checkpoint import begin, save_state
from popalign_core.alignment.denoiser import NoiseSchedule
from popalign_core.alignment.policy_gradient import RewardData, chosen_steps, train_on_reward
from popalign_core.alignment.reward import Cell, ParityTarget, RewardSettings, parity_rewards
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord
from popalign_core.assessment.disparity import unbiased_squared_l2
from popalign_core.attributes import AXES, Axis
from popalign_core.errors import InvalidInput, TrainingDiverged

TONE, GENDER = AXES["perceived_skin_tone"], AXES["perceived_gender"]
SHAPE = (1, 2, 2)
REWARD = RewardSettings(group_size=16, groups=2, chain_steps=8, guidance_scale=1.0, trained_steps=3)
SETTINGS = AlignmentSettings(objective="reward", steps=6, learning_rate=0.1, weight_decay=0.0, seed=4, reward=REWARD)


def one_axis(labels: Sequence[str | None]) -> list[Cell]:
    return [(label,) for label in labels]


# --- the reward ---


def test_advantages_estimate_the_gradient_of_the_parity_goal_without_bias() -> None:
    """All populations of 4 images over 3 groups, weighed by their probability: nothing is sampled.

    With p = softmax(logits), grad log p(k) = e_k - p, and the goal -1/2 |p - q|^2 has the gradient
    sum_k (q_k - p_k) p_k (e_k - p).
    """
    axis = Axis("three", ("a", "b", "c"))
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
    target = ParityTarget(axis, q)
    scores = np.eye(3) - p
    expected = ((q - p) * p) @ scores
    found = np.zeros(3)
    for groups in product(range(3), repeat=4):
        _, advantages = parity_rewards(one_axis([axis.groups[group] for group in groups]), [target])
        found += np.prod(p[list(groups)]) * (advantages @ scores[list(groups)]) / 4
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_mean_reward_is_less_the_unbiased_squared_distance_from_a_uniform_target() -> None:
    labels = ["light"] * 5 + ["dark"] * 2 + ["medium"]
    rewards, _ = parity_rewards(one_axis(labels), [ParityTarget(TONE, TONE.uniform())])
    counts = np.array([labels.count(group) for group in TONE.groups])
    assert rewards.mean() == pytest.approx(-unbiased_squared_l2(counts, TONE.uniform()), rel=1e-12)


def test_images_are_judged_by_the_whole_vocabulary_and_by_the_others() -> None:
    rewards, advantages = parity_rewards(one_axis(["man"] * 3 + ["woman"]), [ParityTarget(GENDER, GENDER.uniform())])
    # For a man the others are 2 men and 1 woman, for the woman 3 men.
    np.testing.assert_allclose(rewards, [0.5 - 2 / 3] * 3 + [0.5])
    np.testing.assert_allclose(advantages, [-1 / 6 - (2 * -1 / 6 + 1 / 6) / 3] * 3 + [0.5 + 0.5])
    tones, _ = parity_rewards(one_axis(["dark"] * 4), [ParityTarget(TONE, TONE.uniform())])
    np.testing.assert_allclose(tones, 0.2 - 1)


def test_a_prompt_that_shows_one_group_alone_teaches_nothing() -> None:
    for label in ("man", None):
        _, advantages = parity_rewards(one_axis([label] * 5), [ParityTarget(GENDER, GENDER.uniform())])
        np.testing.assert_array_equal(advantages, 0)


def test_what_cannot_be_read_is_worth_less_than_any_group_in_any_population() -> None:
    target = ParityTarget(TONE, np.array([0.4, 0.3, 0.1, 0.1, 0.1]))
    for counts in ([9, 0, 0, 0, 0], [0, 0, 0, 0, 9], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]):
        worth = target.rewards(np.array(counts))
        assert worth[-1] < worth[:-1].min()
    rewards, advantages = parity_rewards(one_axis(["light", "dark", None]), [target])
    assert rewards.argmin() == advantages.argmin() == 2


def test_axes_add_up() -> None:
    cells: list[Cell] = [("man", "light"), ("man", None), ("woman", "dark"), (None, "light")]
    targets = [ParityTarget(axis, axis.uniform()) for axis in (GENDER, TONE)]
    both = parity_rewards(cells, targets)
    alone = [parity_rewards(one_axis([cell[k] for cell in cells]), [targets[k]]) for k in (0, 1)]
    for found, first, second in zip(both, *alone, strict=True):
        np.testing.assert_allclose(found, first + second)


def test_a_group_of_one_and_cells_of_other_axes_are_refused() -> None:
    target = ParityTarget(GENDER, GENDER.uniform())
    with pytest.raises(InvalidInput, match="at least 2"):
        parity_rewards(one_axis(["man"]), [target])
    with pytest.raises(InvalidInput, match="for 2 axes"):
        parity_rewards(one_axis(["man", "woman"]), [target, target])
    with pytest.raises(InvalidInput, match=r"reward\.group_size"):
        RewardSettings(group_size=1)


# --- the chain ---


class TwoGroupDenoiser(nn.Module):
    """The optimal denoiser of N(-1, .3^2) and N(+1, .3^2) in every element, shares = softmax of its two parameters."""

    def __init__(self, second_share: float):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, math.log(second_share / (1 - second_share))]))
        self.schedule = NoiseSchedule(torch.sigmoid(torch.linspace(6, -6, 100)))

    def forward(self, noisy: Tensor, timesteps: Tensor, _prompts: Tensor, _pooled: Tensor) -> Tensor:
        signal = self.schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        variance = signal * 0.09 + 1 - signal
        evidence = (2 * signal.sqrt() * noisy / variance).sum(dim=(1, 2, 3), keepdim=True)
        mean = torch.tanh((self.logits[1] - self.logits[0] + evidence) / 2)
        clean = mean + signal.sqrt() * 0.09 / variance * (noisy - signal.sqrt() * mean)
        return (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()

    def second_share(self) -> float:
        return self.logits.detach().softmax(0)[1].item()


class GuidedProbe(nn.Module):
    """Predicts the caption's pooled value everywhere."""

    def forward(self, noisy: Tensor, _timesteps: Tensor, _prompts: Tensor, pooled: Tensor) -> Tensor:
        return pooled[:, :1, None, None].expand_as(noisy)


def conditions_of(count: int) -> Conditions:
    return Conditions(torch.zeros(count, 2, 3), torch.full((count, 3), 2.0), torch.zeros(2, 3), torch.ones(3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_steps_are_those_of_ddim_with_eta_one(prediction_type: str) -> None:
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(10)
    chain = DenoisingChain(NoiseSchedule(scheduler.alphas_cumprod, prediction_type), 10, 1.0)  # pyright: ignore
    assert chain.timesteps.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    states, predictions, noise = torch.randn((3, 10, *SHAPE), generator=generator)
    means, deviations = chain.step(predictions, states, torch.arange(10))
    for place, timestep in enumerate(scheduler.timesteps):
        one = slice(place, place + 1)
        options = {"eta": 1.0, "variance_noise": noise[one], "return_dict": False}
        wanted = scheduler.step(predictions[one], int(timestep), states[one], **options)[0]
        # float32 there, float64 here until the end; 1 / sqrt(a) amplifies rounding up to 15 times.
        torch.testing.assert_close((means + deviations * noise)[one], wanted, rtol=1e-4, atol=1e-4)
    assert deviations[-1] == 0
    assert float(deviations[:-1].min()) > 0


def test_guidance_is_part_of_the_policy() -> None:
    chain = DenoisingChain(NoiseSchedule(torch.sigmoid(torch.linspace(6, -6, 100))), 4, 3.0)
    predicted = chain.predict(GuidedProbe(), torch.zeros(2, *SHAPE), torch.tensor([0, 1]), conditions_of(2))  # pyright: ignore
    assert predicted.unique().tolist() == [1 + 3 * (2 - 1)]


def test_the_chain_samples_the_denoisers_groups_and_an_image_has_no_neighbours() -> None:
    denoiser = TwoGroupDenoiser(0.8)
    chain = DenoisingChain(denoiser.schedule, 20, 1.0)
    states = chain.roll_out(denoiser, conditions_of(400), range(400), SHAPE)
    share = (states[-1].mean(dim=(1, 2, 3)) > 0).float().mean().item()
    # Standard error .02, and the coarse chain is off by about as much.
    assert share == pytest.approx(0.8, abs=0.08)
    alone = chain.roll_out(denoiser, conditions_of(1), [17], SHAPE)
    torch.testing.assert_close(alone[:, 0], states[:, 17], rtol=1e-5, atol=1e-5)


def test_log_density_is_that_of_a_normal_distribution_an_element() -> None:
    following, mean = torch.randn((2, 3, *SHAPE), generator=torch.Generator().manual_seed(1))
    deviation = torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1)
    full = torch.distributions.Normal(mean, deviation).log_prob(following).flatten(1).mean(dim=1)
    constant = -math.log(math.sqrt(2 * math.pi)) - deviation.log().flatten()
    torch.testing.assert_close(step_log_density(following, mean, deviation), full - constant)


# --- training ---


def data_of(label_of: dict[bool, str | None] | None = None) -> RewardData:
    names = label_of or {False: "man", True: "woman"}

    def label(latents: Tensor) -> list[Cell]:
        return [(names[bool(image.mean() > 0)],) for image in latents]

    return RewardData(
        ("one", "two", "three"), conditions_of(3), (ParityTarget(GENDER, GENDER.uniform()),), label, SHAPE
    )


def test_training_brings_the_true_shares_to_the_target_and_leaves_them_there() -> None:
    denoiser = TwoGroupDenoiser(0.9)
    records = list(train_on_reward(FullPolicy(denoiser), data_of(), replace(SETTINGS, steps=40)))
    assert denoiser.second_share() == pytest.approx(0.5, abs=0.12)
    assert {record.drawn for record in records} == {32}
    assert {(record.pairs, record.unknown, record.implicit_accuracy) for record in records} == {(0, 0, None)}
    first, last = (sum(record.reward or 0 for record in part) for part in (records[:5], records[-5:]))
    assert last > first


def test_what_cannot_be_read_is_drawn_less() -> None:
    denoiser = TwoGroupDenoiser(0.5)
    list(train_on_reward(FullPolicy(denoiser), data_of({False: "man", True: None}), SETTINGS))
    assert denoiser.second_share() < 0.45


def test_divergence_from_the_reference_holds_the_policy_back() -> None:
    shares = []
    for weight in (0.0, 100.0):
        denoiser = TwoGroupDenoiser(0.9)
        settings = replace(SETTINGS, steps=10, reward=replace(REWARD, kl_weight=weight))
        list(train_on_reward(FullPolicy(denoiser), data_of(), settings))
        shares.append(denoiser.second_share())
    assert shares[0] < shares[1] - 0.05 < 0.9


@pytest.mark.parametrize("kl_weight", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 5, 1000])
def test_micro_batches_have_the_gradient_of_the_whole_group(kl_weight: float, micro_batch: int) -> None:
    found: list[tuple[StepRecord, Tensor]] = []
    passed: list[int] = []
    for size in (None, micro_batch):
        denoiser = TwoGroupDenoiser(0.8)
        denoiser.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
        reward = replace(REWARD, kl_weight=kl_weight, guidance_scale=2.0)
        settings = replace(SETTINGS, steps=2, micro_batch=size, reward=reward)
        # The second update is at other weights than the reference's.
        records = list(train_on_reward(FullPolicy(denoiser), data_of(), settings))
        found.append((replace(records[-1], seconds=0), denoiser.logits.detach()))
        assert max(passed) <= 2 * (size or 16 * 3)  # guided: two rows each
        passed.clear()
    (whole, weights), (parts, others) = found
    assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-3, abs=1e-6)
    assert (parts.reward, parts.unknown) == (whole.reward, whole.unknown)
    torch.testing.assert_close(others, weights, rtol=1e-5, atol=1e-6)


def test_a_resumed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = (FullPolicy(TwoGroupDenoiser(0.9)) for _ in range(2))
    records = list(train_on_reward(whole, data_of(), SETTINGS))
    state = begin(parts, SETTINGS)
    steps = train_on_reward(parts, data_of(), SETTINGS, state=state)
    first = [next(steps) for _ in range(2)]
    save_state(state, tmp_path)
    again = FullPolicy(TwoGroupDenoiser(0.9))
    rest = list(train_on_reward(again, data_of(), SETTINGS, resume_from=tmp_path))
    assert [replace(r, seconds=0) for r in first + rest] == [replace(r, seconds=0) for r in records]
    torch.testing.assert_close(copy_weights(again.denoiser), copy_weights(whole.denoiser), rtol=0, atol=0)
    other = replace(SETTINGS, reward=replace(REWARD, trained_steps=2))
    with pytest.raises(InvalidInput, match="reward"):
        list(train_on_reward(again, data_of(), other, resume_from=tmp_path))


def test_steps_to_train_on_are_distinct_and_where_the_settings_want_them() -> None:
    chain = DenoisingChain(NoiseSchedule(torch.sigmoid(torch.linspace(6, -6, 100))), 10, 1.0)
    settings = replace(SETTINGS, first_timestep=35, reward=replace(REWARD, trained_steps=4))
    images, places = chosen_steps(chain, settings, seed=1)
    assert images.tolist() == [image for image in range(16) for _ in range(4)]
    assert all(len(row.unique()) == 4 for row in places.reshape(16, 4))
    # Timesteps 99, 89 ... 39 begin at 35 or later.
    assert torch.equal(places.unique(), torch.arange(7))
    with pytest.raises(InvalidInput, match="fewer than the 4"):
        chosen_steps(chain, replace(settings, first_timestep=80), seed=1)


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    denoiser = TwoGroupDenoiser(0.9)
    policy = FullPolicy(denoiser)
    before = copy_weights(denoiser)

    def spoil(gradient: Tensor) -> Tensor:
        return gradient * math.nan

    denoiser.logits.register_hook(spoil)
    with pytest.raises(TrainingDiverged):
        list(train_on_reward(policy, data_of(), SETTINGS))
    torch.testing.assert_close(copy_weights(denoiser), before, rtol=0, atol=0)


def test_other_objectives_are_refused() -> None:
    with pytest.raises(InvalidInput, match="objective"):
        next(train_on_reward(FullPolicy(TwoGroupDenoiser(0.9)), data_of(), replace(SETTINGS, objective="dpo")))


def test_mixed_precision_is_that_of_every_pass() -> None:
    """Full fine-tuning keeps its reference in bfloat16 then, which only passes under autocast can use."""
    generator = torch.Generator().manual_seed(2)
    data = RewardData(
        ("a", "b"),
        Conditions(
            torch.randn(2, 5, 6, generator=generator),
            torch.randn(2, 4, generator=generator),
            torch.zeros(5, 6),
            torch.zeros(4),
        ),
        (ParityTarget(GENDER, GENDER.uniform()),),
        lambda latents: one_axis([GENDER.groups[int(latent.mean() > 0)] for latent in latents]),
        (2, 4, 4),
    )
    policy = FullPolicy(UNetDenoiser(tiny_unet()), mixed_precision=True)
    seen: list[torch.dtype] = []
    policy.denoiser.unet.conv_out.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    reward = replace(REWARD, group_size=4, groups=1, chain_steps=4, trained_steps=2, kl_weight=0.1, guidance_scale=2.0)
    settings = replace(SETTINGS, steps=2, learning_rate=1e-4, reward=reward, mixed_precision=True)
    records = list(train_on_reward(policy, data, settings))
    assert [record.step for record in records] == [1, 2]
    assert all(math.isfinite(record.loss) for record in records)
    assert set(seen) == {torch.bfloat16}
