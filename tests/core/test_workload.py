"""What a plan counts is what a run draws."""

from math import ceil, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popalign_core.attributes import AXES
from popalign_core.config import RunConfig, with_settings
from popalign_core.expansion import prompts_of
from popalign_core.models.checkpoints import EMBEDDED
from popalign_core.presets import PRESETS, preset
from popalign_core.sample_sets import image_requests, slices
from popalign_core.stated_costs import (
    classification_cost,
    measurement_cost,
    native_side,
    place_of,
    sampling_cost,
    training_cost,
)
from popalign_core.workload import (
    BASE,
    KEPT,
    Training,
    drawn_places,
    passes_per_image,
    shard_sizes,
    workload,
)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    winners = draw(st.sampled_from(["drawn", "counterfactual"]))
    chosen = {
        "expansion.max_subjects": draw(st.integers(0, 3)),
        "expansion.axes": draw(st.sampled_from(["perceived_gender", "perceived_gender,perceived_skin_tone"])),
        "images.train_neutral": draw(st.integers(1, 9)),
        "images.train_specific": draw(st.integers(1, 3)) if winners == "drawn" else 0,
        "images.validation": draw(st.integers(1, 5)),
        "images.evaluation": draw(st.integers(1, 5)),
        "images.trained": draw(st.integers(0, 3)),
        "images.obedience": draw(st.integers(1, 3)),
        "populations.winners": winners,
        "alignment.rounds": draw(st.integers(1, 4)),
        "alignment.redraw": draw(st.booleans()),
        "classification.agreement": draw(st.booleans()),
    }
    return with_settings(preset("emoji"), {name: str(value) for name, value in chosen.items()})


@settings(max_examples=40, deadline=None)
@given(configs())
def test_every_set_has_the_images_that_are_drawn_for_it(config: RunConfig):
    prompts = prompts_of(config.expansion)
    cells = prod(len(AXES[axis].groups) for axis in config.expansion.axes)
    work = workload(config)
    for split in work.neutral:
        for kind, counted in (("neutral", work.neutral), ("specific", work.specific)):
            assert counted[split] == sum((prompt.split, prompt.kind) == (split, kind) for prompt in prompts)
    for wanted in work.image_sets:
        name, _, number = wanted.purpose.partition("-")
        if name == "counterfactual":
            most = config.images.train_neutral * work.neutral["train"]
            assert (wanted.images, wanted.at_most) == (most, True)
            continue
        parts = slices(name, config.images, int(number or 1))
        drawn = image_requests(prompts, parts, model_id=BASE, run_seed=0, cells=cells)
        assert (wanted.images, wanted.at_most) == (len(drawn), False)
    assert work.images == sum(wanted.images for wanted in work.image_sets)


@settings(max_examples=40, deadline=None)
@given(configs())
def test_the_sets_are_those_that_the_flows_ask_for(config: RunConfig):
    """The order of flows/alignment.py and flows/assessment.py, where no round stops early."""
    expected: list[tuple[str, str, str]] = [(BASE, "validation", "builder")]
    models = [BASE]
    for number in range(1, config.alignment.rounds + 1):
        parent, drawn = (models[-1], number) if config.alignment.redraw else (BASE, 1)
        names = [f"round-{drawn}"]
        names += [f"counterfactual-{drawn}"] if config.populations.winners == "counterfactual" else []
        expected += [(parent, name, "builder") for name in names]
        models.append(f"round-{number}")
        expected.append((models[-1], "validation", "builder"))
    expected += [
        (model, purpose, "judge")
        for model in (BASE, KEPT)
        for purpose in ("evaluation", "trained", "obedience")
        if purpose != "trained" or config.images.trained
    ]
    sets = workload(config).image_sets
    found = [(wanted.model_id, wanted.purpose, wanted.role) for wanted in sets]
    assert found == list(dict.fromkeys(expected))
    seconded = {(wanted.model_id, wanted.purpose) for wanted in sets if wanted.seconded}
    assert seconded == ({(BASE, "evaluation"), (KEPT, "evaluation")} if config.classification.agreement else set())


def test_the_trainings_of_a_preset():
    trainings = workload(preset("sdxl")).trainings
    assert trainings == tuple(Training(f"round-{number}", 250, 8) for number in (1, 2, 3))
    assert sum(training.pairs for training in trainings) == 6000


@given(st.integers(0, 5000), st.integers(1, 600), st.integers(1, 64))
def test_shards_hold_every_image_and_batches_are_full(images: int, shard_size: int, batch_size: int):
    shards = shard_sizes(images, shard_size)
    assert sum(shards) == images
    assert len(shards) == ceil(images / shard_size)
    assert all(shard == shard_size for shard in shards[:-1])
    for shard in shards:
        places = drawn_places(shard, batch_size)
        assert places % batch_size == 0
        assert shard <= places < shard + batch_size


@pytest.mark.parametrize(("guidance", "calls"), [(1.0, 30), (1.01, 60), (5.0, 60)])
def test_guidance_doubles_the_calls_of_the_unet(guidance: float, calls: int):
    assert passes_per_image(30, guidance) == calls


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:1"])
def test_every_preset_has_a_stated_cost_that_says_where_from(name: str, device: str):
    config = preset(name)
    place = place_of(config.model, device)
    side, dtype = native_side(config.model), config.sampling.dtype
    costs = [
        sampling_cost(config.model, place, side, dtype, 60),
        training_cost(config.model, place, side, dtype, config.alignment),
        classification_cost(config.model, place),
        measurement_cost(config.model, place),
    ]
    assert all(cost.seconds > 0 and cost.source.startswith("stated default: ") for cost in costs)
    assert place == ("cpu" if device == "cpu" or (device == "auto" and config.model in EMBEDDED) else "gpu")


def test_a_stated_cost_grows_with_calls_pixels_and_number_format():
    model = preset("sdxl").model

    def seconds(side: int, dtype: str, calls: int) -> float:
        return sampling_cost(model, "gpu", side, dtype, calls).seconds

    assert seconds(1024, "bfloat16", 100) == pytest.approx(1.6)  # README: 1.4 to 1.8 s for 50 steps with guidance
    assert seconds(1024, "bfloat16", 50) == pytest.approx(0.8)
    assert seconds(512, "bfloat16", 100) == pytest.approx(0.4)
    assert seconds(1024, "float32", 100) > seconds(1024, "bfloat16", 100)
