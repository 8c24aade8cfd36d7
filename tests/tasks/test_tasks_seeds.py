"""Models that differ in their training seed alone, beside each other."""

from dataclasses import fields, replace

import pytest

from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.config import AlignmentConfig, with_settings
from popalign_core.presets import preset
from storage.tables import read_artifact
from tasks.run import BASE
from tasks.seeds import record_seeds
from tasks.training_order import RoundOrder, trained_model
from tasks.training_settings import alignment_settings

AXIS = "perceived_gender"


def label(women_of_ten: int):
    return lambda row: "woman" if row["sample_index"] % 10 < women_of_ten else "man"


def test_the_spread_over_seeds_is_told_with_each_of_them(written_run) -> None:
    settings = {"alignment.seeds": "3", "images.evaluation": "10"}
    run = replace(written_run, config=with_settings(written_run.config, settings))
    shares = {BASE: 0, "round-2": 5, "round-2-seed-1": 4, "round-2-seed-2": 3}
    for model_id, women in shares.items():
        run.commit_labels(run.commit_samples(model_id, "evaluation"), "judge", label(women))
    ref = record_seeds.fn(run.workspace, run.run_id, run.config, "round-2")
    rows = read_artifact(ref, "seeds")
    assert [(row["model_id"], row["seed_index"]) for row in rows] == [
        ("round-2", 0),
        ("round-2-seed-1", 1),
        ("round-2-seed-2", 2),
    ]
    # The distance of (w, 1 - w) from even shares is sqrt(2) |w - 1/2|.
    assert [row["value"] for row in rows] == pytest.approx([0, 2**0.5 * 0.1, 2**0.5 * 0.2], abs=1e-6)
    (summary,) = read_artifact(ref, "seed_summaries")
    assert (summary["axis"], summary["seeds"]) == (AXIS, 3)
    assert summary["before"] == pytest.approx(2**0.5 / 2)
    assert summary["mean"] == pytest.approx(2**0.5 * 0.1)
    assert summary["deviation"] == pytest.approx(2**0.5 * 0.1)
    assert (summary["best"], summary["worst"]) == pytest.approx((0, 2**0.5 * 0.2), abs=1e-6)


@pytest.mark.parametrize("redraw", ["true", "false"])
def test_another_seed_changes_the_seed_and_the_names_alone(written_run, redraw: str) -> None:
    config = with_settings(written_run.config, {"alignment.redraw": redraw})
    own, other = (alignment_settings(config, 2, index) for index in (0, 1))
    assert own.seed != other.seed
    assert replace(other, seed=own.seed) == own
    preferences = written_run.commit_samples(BASE, "validation")
    orders = [RoundOrder(preferences, config, BASE, 2, index) for index in (0, 1)]
    assert [order.ref.key for order in orders] == [trained_model(2), "round-2-seed-1"]
    assert orders[0].checkpoints[2] != orders[1].checkpoints[2]
    assert [RoundOrder.from_json(order.to_json()) for order in orders] == orders


def test_every_setting_of_a_training_can_be_configured() -> None:
    derived = {"seed", "schedule_steps", "reward"}
    assert {field.name for field in fields(AlignmentSettings)} - derived <= AlignmentConfig.model_fields.keys()
    given = {"warmup_steps": 3, "max_gradient_norm": 0.5, "weight_decay": 0.25, "timestep_sampling": "uniform"}
    config = with_settings(preset("emoji"), {f"alignment.{name}": str(value) for name, value in given.items()})
    found, usual = alignment_settings(config, 1), alignment_settings(preset("emoji"), 1)
    assert {name: getattr(found, name) for name in given} == given
    assert [getattr(usual, name) for name in given] == [0, 1.0, 0.01, "stratified"]


def test_the_preset_of_the_paper_warms_up_over_its_one_training_as_the_papers_code_does() -> None:
    settings = alignment_settings(preset("sdxl-paper"), 5)
    assert (settings.steps, settings.timestep_sampling) == (750, "uniform")
    rates = [settings.learning_rate_at(step) for step in (0, 99, 199, 200, 749)]
    assert rates == pytest.approx([5e-7 / 200, 2.5e-7, 5e-7, 5e-7, 5e-7])
