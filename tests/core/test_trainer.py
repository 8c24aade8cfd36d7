import math
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from two_groups import EMA_SETTINGS, SETTINGS, SHAPE, TwoGroupDenoiser, data_of, without_time

from popalign_core.alignment.adapters import FullPolicy, copy_weights, restore_weights, substituted_weights
from popalign_core.alignment.cache import Share, draw_batch, draw_timesteps, order_pairs
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.denoiser import PredictionType
from popalign_core.alignment.passes import measure_errors
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.stopping import HeldOutPoint, StopRule
from popalign_core.alignment.trainer import train
from popalign_core.errors import InvalidInput, TrainingDiverged, UnknownName

# --- batches ---


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    data = data_of()
    first, again = draw_batch(data, SETTINGS, 5, 100), draw_batch(data, SETTINGS, 5, 100)
    other_step, other_seed = draw_batch(data, SETTINGS, 6, 100), draw_batch(data, replace(SETTINGS, seed=4), 5, 100)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps)
    assert torch.equal(first.pairs, again.pairs)
    for other in (other_step, other_seed):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.timesteps, other.timesteps)


def test_every_pair_is_visited_once_before_any_is_visited_again() -> None:
    data = data_of(pairs=20)
    visited = torch.cat([order_pairs(data, SETTINGS, step)[0] for step in range(10)])
    for epoch in visited.reshape(4, 20):
        assert sorted(epoch.tolist()) == list(range(20))
    assert visited[:20].tolist() != visited[20:40].tolist()
    many = order_pairs(data, replace(SETTINGS, pairs_per_step=50), 0)[0]
    assert torch.bincount(many).tolist().count(2) + torch.bincount(many).tolist().count(3) == 20


def test_processes_share_a_step_without_changing_it() -> None:
    data, whole = data_of(), draw_batch(data_of(), SETTINGS, 2, 100)
    parts = [draw_batch(data, SETTINGS, 2, 100, share=Share(rank, 3)) for rank in range(3)]
    order = torch.cat([torch.arange(8)[rank::3] for rank in range(3)])
    for name in ("noise", "timesteps", "winner_latents", "loser_latents", "prompt_embeddings", "pairs"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)[order])
    assert [part.global_pairs for part in parts] == [8, 8, 8]
    with pytest.raises(InvalidInput, match="pairs_per_step"):
        draw_batch(data, SETTINGS, 2, 100, share=Share(8, 9))


def test_exact_objective_draws_whole_populations() -> None:
    populations = np.repeat([7, 3, 9], [5, 4, 3])
    data = data_of(pairs=12, population=populations)
    settings = replace(SETTINGS, objective="popalign_exact", pairs_per_step=11)
    for step in range(6):
        pairs, units = order_pairs(data, settings, step)
        drawn = data.population[pairs].tolist()
        assert len(set(units.tolist())) == 2
        # Where one order of the populations ends and the next begins, the same one may come twice, as two units.
        for unit in set(units.tolist()):
            members = [population for population, of in zip(drawn, units.tolist(), strict=True) if of == unit]
            assert len(set(members)) == 1
            assert len(members) == populations.tolist().count(members[0])
    assert len(set(order_pairs(data, replace(settings, pairs_per_step=1), 0)[1].tolist())) == 1


def test_stratified_timesteps_cover_the_range_evenly() -> None:
    settings = replace(SETTINGS, timestep_sampling="stratified", first_timestep=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        steps = draw_timesteps(32, settings, 84, generator)
        assert sorted(((steps - 20) // 2).tolist()) == list(range(32))
    uniform = draw_timesteps(4000, replace(SETTINGS, first_timestep=20), 84, generator)
    assert (int(uniform.min()), int(uniform.max())) == (20, 83)
    # Standard deviation of the mean: 64 / sqrt(12 * 4000) = 0.29; four of them, false alarm 6e-5.
    assert uniform.float().mean().item() == pytest.approx(51.5, abs=1.2)
    with pytest.raises(InvalidInput, match="first_timestep"):
        draw_timesteps(4, replace(SETTINGS, first_timestep=100), 100, generator)


def test_dropped_captions_are_the_empty_one() -> None:
    settings = replace(SETTINGS, pairs_per_step=1000, caption_dropout=0.3)
    batch = draw_batch(data_of(), settings, 0, 100)
    share = (batch.pooled.sum(dim=1) == 0).float().mean().item()
    # Standard deviation sqrt(.3 * .7 / 1000) = 0.0145; four of them.
    assert share == pytest.approx(0.3, abs=0.058)
    assert torch.equal(batch.pooled[:, 0], batch.prompt_embeddings[:, 1, 2])
    for dropout, expected in ((0.0, 1.0), (1.0, 0.0)):
        assert (
            draw_batch(data_of(), replace(settings, caption_dropout=dropout), 0, 100).pooled.mean().item() == expected
        )


def test_mixed_captions_lie_between_their_own_and_another_one() -> None:
    """Nothing else in the batch changes, and without mixing nothing is drawn for it."""
    data = data_of()
    data = replace(
        data,
        prompt_embeddings=data.prompt_embeddings[:1].repeat(3, 1, 1),
        pooled=torch.randn(3, data.pooled.shape[1], generator=torch.Generator().manual_seed(0)),
        caption=torch.arange(len(data.winner)) % 3,
    )
    settings = replace(SETTINGS, pairs_per_step=200, caption_dropout=0.0)
    plain = draw_batch(data, settings, 0, 100)
    mixed = draw_batch(data, replace(settings, caption_mixing=0.6), 0, 100)
    for name in ("winner_latents", "loser_latents", "noise", "timesteps"):
        assert torch.equal(getattr(plain, name), getattr(mixed, name))
    assert not torch.equal(plain.pooled, mixed.pooled)
    known = data.pooled[torch.unique(data.caption)].float()
    furthest = torch.cdist(known, known).max()
    moved = (mixed.pooled - plain.pooled).norm(dim=1)
    assert 0.2 * furthest < moved.max() <= 0.6 * furthest + 1e-5
    assert bool((mixed.pooled >= known.min(dim=0).values - 1e-5).all())
    assert bool((mixed.pooled <= known.max(dim=0).values + 1e-5).all())


def test_latents_are_drawn_from_the_encoders_posterior() -> None:
    data = data_of(
        latent_means=np.zeros((80, *SHAPE), np.float32), latent_deviations=np.full((80, *SHAPE), 0.5, np.float32)
    )
    batch = draw_batch(data, replace(SETTINGS, pairs_per_step=1000), 0, 100)
    # 4000 draws: the standard deviation is known to 0.5 / sqrt(8000) = 0.0056; four of them.
    assert batch.winner_latents.std().item() == pytest.approx(0.5, abs=0.023)
    assert not torch.equal(batch.winner_latents, batch.loser_latents)
    assert (
        abs(float(torch.corrcoef(torch.stack([batch.winner_latents.flatten(), batch.noise.flatten()]))[0, 1])) < 0.064
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": np.zeros(0, np.int64)}, "no preference pairs"),
        ({"loser": np.zeros(3, np.int64)}, "loser has 3 entries for 40 pairs"),
        ({"winner": np.full(40, 80)}, r"outside 0\.\.79"),
        ({"caption": np.full(40, -1)}, r"outside 0\.\.0"),
        ({"winner_caption": np.full(40, 1)}, r"winner_caption names a row outside 0\.\.0"),
        ({"weight": np.zeros(40, np.float32)}, "weight above 0"),
        ({"weight": np.full(40, np.nan, np.float32)}, "weight above 0"),
    ],
)
def test_impossible_data_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        data_of(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"pairs_per_step": 0},
        {"learning_rate": math.nan},
        {"beta": -1.0},
        {"caption_dropout": 1.5},
        {"caption_mixing": 1.5},
        {"ema_decay": 2.0},
        {"max_gradient_norm": 0.0},
        {"warmup_steps": -1},
        {"anchor_weight": math.inf},
        {"preserve_weight": -1.0},
        {"schedule_steps": 0},
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=f"alignment.{next(iter(change))}"):
        replace(SETTINGS, **change)  # pyright: ignore


def test_unknown_objective_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="popalign_exact, dpo, sft"):
        replace(SETTINGS, objective="ppo")  # pyright: ignore


def test_learning_rate_warms_up_and_decays() -> None:
    settings = replace(SETTINGS, steps=14, warmup_steps=4, learning_rate=1.0, learning_rate_schedule="cosine")
    rates = [settings.learning_rate_at(step) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == pytest.approx(0)
    assert replace(settings, steps=9, schedule_steps=14).learning_rate_at(9) == pytest.approx(0.5)
    assert replace(settings, learning_rate_schedule="constant").learning_rate_at(13) == 1.0


# --- steps ---


@pytest.mark.parametrize("objective", ["popalign", "popalign_exact", "dpo"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_first_step_starts_at_the_reference(objective: str, prediction_type: PredictionType) -> None:
    settings = replace(SETTINGS, objective=objective)  # pyright: ignore
    record = next(train(FullPolicy(TwoGroupDenoiser(0.9, prediction_type)), data_of(), settings))
    assert record.loss == pytest.approx(math.log(2), rel=1e-6)
    assert (record.step, record.pairs if objective != "popalign_exact" else 8) == (1, 8)
    assert (record.implicit_accuracy, record.winner_margin, record.loser_margin) == (0.5, 0.0, 0.0)
    assert record.gradient_norm > 0
    assert 0 < record.seconds < 60


def test_both_prediction_types_measure_the_same_up_to_the_signal() -> None:
    data = data_of()
    batch = draw_batch(data, SETTINGS, 0, 100)
    noise_errors, velocity_errors = (
        measure_errors(FullPolicy(TwoGroupDenoiser(0.9, kind)), batch)[0] for kind in ("epsilon", "v_prediction")
    )
    signal = TwoGroupDenoiser(0.9).schedule.alphas_cumprod[batch.timesteps]
    torch.testing.assert_close(noise_errors.policy_winner, velocity_errors.policy_winner * signal, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["popalign", "popalign_exact", "dpo", "sft"])
def test_every_objective_reduces_the_true_disparity(objective: str) -> None:
    denoiser = TwoGroupDenoiser(0.9)
    settings = replace(SETTINGS, objective=objective, steps=25, pairs_per_step=40, learning_rate=0.08)  # pyright: ignore
    before = denoiser.disparity()
    records = list(train(FullPolicy(denoiser), data_of(), settings))
    assert len(records) == 25
    assert denoiser.disparity() < 0.75 * before
    assert records[-1].winner_margin > records[0].winner_margin


def test_training_runs_past_the_target_and_the_rule_keeps_the_best() -> None:
    denoiser = TwoGroupDenoiser(0.9)
    policy, rule = FullPolicy(denoiser), StopRule(patience=2)
    history, kept = [HeldOutPoint(0, {"group": denoiser.disparity()})], [copy_weights(denoiser)]
    reason = None
    for record in train(policy, data_of(), replace(SETTINGS, steps=200, pairs_per_step=40, learning_rate=0.1)):
        if record.step % 5 == 0:
            history.append(HeldOutPoint(record.step, {"group": denoiser.disparity()}))
            kept.append(copy_weights(denoiser))
            verdict = rule.judge(history)
            reason = verdict.reason
            if reason is not None:
                break
    assert reason == "turned"
    assert history[-1].step < 200
    past, best = denoiser.disparity(), rule.judge(history).best
    restore_weights(denoiser, kept[best])
    assert denoiser.disparity() < 0.25 * history[0].disparities["group"]
    assert denoiser.disparity() < past
    assert 0 < best < len(history) - 1


def test_anchor_and_safeguard_change_the_path() -> None:
    shares: list[float] = []
    for change in ({}, {"anchor_weight": 100.0}, {"winner_preserving": True}):
        denoiser = TwoGroupDenoiser(0.9)
        records = list(train(FullPolicy(denoiser), data_of(), replace(SETTINGS, **change)))  # pyright: ignore
        assert all(math.isfinite(record.loss) for record in records)
        shares.append(denoiser.disparity())
    assert len(set(shares)) == 3


def test_named_captions_are_preserved_only_where_they_are_known() -> None:
    settings = replace(SETTINGS, preserve_weight=10.0)
    with pytest.raises(InvalidInput, match=r"alignment\.preserve_weight needs"):
        next(train(FullPolicy(TwoGroupDenoiser(0.9)), data_of(), settings))
    data = data_of(winner_caption=np.zeros(40, np.int64))
    plain, preserved = (
        list(train(FullPolicy(TwoGroupDenoiser(0.9)), data, replace(settings, preserve_weight=weight)))
        for weight in (0.0, 10.0)
    )
    # Nothing has moved before the first update, so there is nothing to preserve yet.
    assert preserved[0].loss == pytest.approx(plain[0].loss, rel=1e-6)
    assert preserved[-1].loss != plain[-1].loss


def test_the_conditioning_alone_needs_such_layers() -> None:
    with pytest.raises(InvalidInput, match="conditioning"):
        FullPolicy(TwoGroupDenoiser(0.9), trainable="conditioning")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_divergence_stops_before_the_update(value: float) -> None:
    data, denoiser = data_of(pairs=16), TwoGroupDenoiser(0.9)
    policy = FullPolicy(denoiser)
    state = begin(policy, SETTINGS)
    steps = train(policy, data, SETTINGS, state=state)
    list(islice(steps, 2))
    sound = copy_weights(denoiser)
    data.latent_means.fill_(value)
    with pytest.raises(TrainingDiverged, match="at step 3") as caught:
        next(steps)
    assert torch.equal(denoiser.logits, sound["logits"])
    assert state.step == 2
    assert pickle.loads(pickle.dumps(caught.value)).facts["step"] == 3


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    denoiser = TwoGroupDenoiser(0.9)
    denoiser.logits.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingDiverged, match="at step 1"):
        next(train(FullPolicy(denoiser), data_of(), SETTINGS))
    assert bool(torch.isfinite(denoiser.logits).all())


def test_gradients_are_clipped_to_the_limit() -> None:
    # Plain AdamW is blind to the gradient's scale, so look at what the optimizer was given.
    denoiser = TwoGroupDenoiser(0.9)
    policy, settings = FullPolicy(denoiser), replace(SETTINGS, max_gradient_norm=1e-4)
    record = next(train(policy, data_of(), settings))
    assert denoiser.logits.grad is not None
    assert denoiser.logits.grad.norm().item() == pytest.approx(1e-4, rel=1e-2)
    assert record.gradient_norm > 5e-4
    unclipped = TwoGroupDenoiser(0.9)
    free = next(train(FullPolicy(unclipped), data_of(), replace(SETTINGS, max_gradient_norm=None)))
    assert unclipped.logits.grad is not None
    assert unclipped.logits.grad.norm().item() == pytest.approx(free.gradient_norm, rel=1e-5)


def test_accelerate_with_one_process_changes_nothing() -> None:
    plain, prepared = TwoGroupDenoiser(0.9), TwoGroupDenoiser(0.9)
    expected = list(train(FullPolicy(plain), data_of(), SETTINGS))
    got = list(train(FullPolicy(prepared), data_of(), SETTINGS, accelerator=Accelerator(cpu=True)))
    assert without_time(got) == without_time(expected)
    assert torch.equal(plain.logits, prepared.logits)


# --- checkpoints ---


@pytest.mark.parametrize("settings", [SETTINGS, EMA_SETTINGS], ids=["plain", "ema"])
@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, settings: AlignmentSettings, stop_after: int
) -> None:
    data, whole = data_of(), TwoGroupDenoiser(0.9)
    whole_state = begin(FullPolicy(whole), settings)
    expected = list(train(whole_state.policy, data, settings, state=whole_state))

    policy = FullPolicy(TwoGroupDenoiser(0.9))
    state = begin(policy, settings)
    first = list(islice(train(policy, data, settings, state=state), stop_after))
    save_state(state, tmp_path)

    resumed_policy = FullPolicy(TwoGroupDenoiser(0.9))
    resumed = load_state(resumed_policy, settings, tmp_path)
    rest = list(train(resumed_policy, data, settings, state=resumed))
    assert without_time(first + rest) == without_time(expected)
    assert torch.equal(copy_weights(resumed_policy.denoiser)["logits"], whole.logits)
    if settings.ema_decay is not None:
        assert resumed.average is not None
        assert whole_state.average is not None
        assert torch.equal(resumed.average["logits"], whole_state.average["logits"])
        assert not torch.equal(resumed.average["logits"], whole.logits)
    by_folder = FullPolicy(TwoGroupDenoiser(0.9))
    assert len(list(train(by_folder, data, settings, resume_from=tmp_path))) == 6 - stop_after
    assert torch.equal(copy_weights(by_folder.denoiser)["logits"], whole.logits)


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    contents: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        policy = FullPolicy(TwoGroupDenoiser(0.9))
        state = begin(policy, EMA_SETTINGS)
        list(islice(train(policy, data_of(), EMA_SETTINGS, state=state), 2))
        save_state(state, folder)
        contents.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    state = begin(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS)
    save_state(state, tmp_path)
    if damage == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:7])
    with pytest.raises(InvalidInput, match="cannot be read"):
        load_state(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS, tmp_path)


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(tmp_path: Path) -> None:
    save_state(begin(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS), tmp_path)
    with pytest.raises(InvalidInput, match=r"beta = 4\.0, now it is 5\.0"):
        load_state(FullPolicy(TwoGroupDenoiser(0.9)), replace(SETTINGS, beta=5.0), tmp_path)
    with pytest.raises(InvalidInput, match="another model"):
        restore_weights(TwoGroupDenoiser(0.9), {"weight": torch.zeros(2)})
    with pytest.raises(InvalidInput, match="shape"):
        restore_weights(TwoGroupDenoiser(0.9), {"logits": torch.zeros(3)})


def test_substituted_weights_are_taken_back_even_after_an_error() -> None:
    denoiser = TwoGroupDenoiser(0.9)
    own, even = denoiser.logits.detach().clone(), {"logits": torch.zeros(2)}
    with substituted_weights(denoiser, even):
        assert denoiser.disparity() == 0
    assert torch.equal(denoiser.logits, own)
    with pytest.raises(RuntimeError, match="inside"), substituted_weights(denoiser, even):
        raise RuntimeError("inside")
    assert torch.equal(denoiser.logits, own)
