"""What a plan says of a made-up workspace, whose timings are written down, is what they come to by hand."""

import shutil
from collections import namedtuple
from collections.abc import Callable
from math import ceil

import pytest
from diffusers import UNet2DConditionModel

from popalign_core.assessment.power import Detection
from popalign_core.attributes import AXES
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput
from popalign_core.models.checkpoints import EMBEDDED
from popalign_core.models.footprint import Footprint
from popalign_core.models.lora import add_lora
from popalign_core.presets import preset
from popalign_core.workload import KEPT, ImageSet, Workload, shard_sizes, workload
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.errors import RemovedArtifact
from storage.layout import Workspace
from storage.removal import remove
from storage.retention import Choice
from storage.tables import write_rows
from tasks.plan import RunPlan, planned_work
from tasks.power_plan import planned_detection
from tasks.sizes import checkpoint_bytes, model_size

SETTINGS = {
    "device": "cpu",
    "expansion.axes": "perceived_gender",
    "expansion.max_subjects": "2",
    "sampling.steps": "4",
    "sampling.batch_size": "8",
    "sampling.shard_size": "20",
    "images.train_neutral": "10",
    "images.validation": "8",
    "images.evaluation": "15",
    "images.trained": "0",
    "images.obedience": "3",
    "alignment.rounds": "2",
    "alignment.steps": "5",
    "alignment.pairs_per_step": "4",
}
CONFIG = with_settings(preset("emoji"), SETTINGS)
PLACE_SECONDS, PAIR_SECONDS, BUILDER_SECONDS, JUDGE_SECONDS = 0.5, 0.25, 0.01, 0.02
IMAGE_BYTES = 300
FLOP = {"sampling": 2e12, "training": 3e15}


def changed(**settings: object) -> RunConfig:
    return with_settings(CONFIG, {name.replace("__", "."): str(value) for name, value in settings.items()})


class MadeUp:
    """A workspace of runs that took what is written down: by default the constants above, whatever the piece."""

    def __init__(self, root: str):
        self.place = Workspace.open(root)

    def commit(
        self, run_id: str, table: str, key: str, rows: dict[str, list[dict]], files: dict[str, bytes] | None = None
    ):
        ref = ArtifactRef(str(self.place.root), run_id, table, key)
        with staged_artifact(ref) as folder:
            for name, values in rows.items():
                write_rows(folder, name, [{"run_id": run_id} | value for value in values])
            for name, content in (files or {}).items():
                (folder / name).write_bytes(content)
        return ref

    def start(self, run_id: str, config: RunConfig, at: str = "2026-01-01T00:00:00+00:00") -> None:
        row = {"preset": "emoji", "config_json": config.model_dump_json()}
        self.commit(run_id, "runs", "config", {"runs": [row]})
        self.commit(run_id, "starts", "first", {"starts": [{"started_at": at, "versions_json": "{}"}]})

    def timing(self, run_id: str, stage: str, key: str, seconds: float, items: int, device: str = "cpu") -> None:
        row = {"stage": stage, "key": key, "seconds": seconds, "items": items, "device": device}
        self.commit(run_id, "timings", key.replace("/", "-"), {"timings": [row]})

    def draw(
        self,
        run_id: str,
        wanted: ImageSet,
        shard: int,
        images: int,
        batch: int = 8,
        pace: float = 1.0,
        device: str = "cpu",
    ) -> None:
        """A shard of images and their classification."""
        key = f"{wanted.model_id}.{wanted.purpose}.{shard:05d}"
        self.commit(run_id, "samples", key, {"samples": []}, {"images.parquet": bytes(images * IMAGE_BYTES)})
        seconds = pace * PLACE_SECONDS * ceil(images / batch) * batch
        self.timing(run_id, "sampling", f"samples/{key}", seconds, images, device)
        for role in {wanted.role, "builder"} if wanted.seconded else {wanted.role}:
            self.commit(run_id, "attributes", f"{key}.{role}", {"attributes": []})
            seconds = images * JUDGE_SECONDS
            if role == "builder":
                self.timing(run_id, "embedding", f"embeddings/{key}", images * BUILDER_SECONDS, images, device)
                seconds = 1e-9  # labels follow from the vectors
            self.timing(run_id, "classification", f"attributes/{key}.{role}", seconds, images, "auto")

    def train(self, run_id: str, model_id: str, steps: int = 5, pairs: int = 4) -> None:
        self.commit(run_id, "models", model_id, {"models": []})
        self.timing(run_id, "alignment", f"models/{model_id}", steps * pairs * PAIR_SECONDS, steps)

    def whole(self, run_id: str, config: RunConfig, at: str = "2026-01-01T00:00:00+00:00") -> Workload:
        """A run with every shard and training of its workload, without a decision."""
        work = workload(config)
        self.start(run_id, config, at)
        for wanted in work.image_sets:
            for shard, images in enumerate(shard_sizes(wanted.images, config.sampling.shard_size)):
                self.draw(run_id, wanted, shard, images)
        for training in work.trainings:
            self.train(run_id, training.model_id)
        return work


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an image and a pair take is counted in `popalign_core.models.footprint`."""
    monkeypatch.setattr("tasks.plan.stage_footprint", lambda _, stage: Footprint((), FLOP[stage]))


@pytest.fixture
def made_up(tmp_path) -> MadeUp:
    return MadeUp(str(tmp_path / "workspace"))


def seconds_of(plan: RunPlan, stage: str, kind: Callable[[str], bool] = lambda _: True) -> float:
    return sum(row.seconds for row in plan.rows if row.stage == stage and kind(row.work))


def rates_of(plan: RunPlan, stage: str) -> set[str]:
    return {row.rate for row in plan.rows if row.stage == stage}


def test_before_embedding_was_timed_by_itself_the_builders_labels_were(made_up):
    made_up.start("night-1", CONFIG)
    made_up.timing("night-1", "classification", "attributes/base.round-1.0.builder", 20 * BUILDER_SECONDS, 20, "auto")
    plan = planned_work(CONFIG, str(made_up.place.root))
    (row,) = (row for row in plan.rows if row.work.endswith("images, builder"))
    assert row.rate.startswith("measured")


def test_a_run_like_the_last_one_takes_as_long_as_its_timings_say(made_up):
    made_up.whole("night-1", CONFIG)
    plan = planned_work(changed(seed=7), str(made_up.place.root))
    # By hand, with two subjects a split and two groups: own images 2 x 20, counterfactuals 2 x 20,
    # validation 3 models x 16: shards of 20, batches of 8, so 24 or 16 places each. Held out 2 x 30 and 2 x 12.
    places = 2 * 24 + 2 * 24 + 3 * 16 + 2 * (24 + 16) + 2 * 16
    assert seconds_of(plan, "sampling") == pytest.approx(places * PLACE_SECONDS)
    images = 40 + 40 + 48
    labelled = images + 60  # and those held out, to compare it with the judge
    builder = seconds_of(plan, "classification", lambda work: work == f"{labelled} images, builder")
    assert builder == pytest.approx(labelled * BUILDER_SECONDS)
    alone = planned_work(changed(classification__agreement=False), str(made_up.place.root))
    assert any(row.work == f"{images} images, builder" for row in alone.rows)
    judge = seconds_of(plan, "classification", lambda work: work == "84 images, judge")
    assert judge == pytest.approx(84 * JUDGE_SECONDS)
    assert seconds_of(plan, "alignment") == pytest.approx(2 * 5 * 4 * PAIR_SECONDS)
    assert plan.total.seconds == pytest.approx(sum(row.seconds for row in plan.rows))
    assert plan.total.flop == places * FLOP["sampling"] + 2 * 5 * 4 * FLOP["training"]
    assert plan.total.cells()[3] == "121 PFLOP"
    assert rates_of(plan, "sampling") == {"measured: 2 images/s, run night-1, cpu, 13 pieces"}
    assert rates_of(plan, "alignment") == {"measured: 4 pairs/s, run night-1, cpu, 2 pieces"}
    assert sum(row.bytes for row in plan.rows if row.stage == "sampling") == (images + 84) * IMAGE_BYTES
    assert next(row.work for row in plan.rows if row.stage == "expansion") == "train: 2 neutral and 4 specific prompts"


def test_the_range_is_that_of_the_quicker_and_the_slower_tenth(made_up):
    made_up.start("night-1", CONFIG)
    wanted = workload(CONFIG).image_sets[0]
    # Eleven pieces of the same size, at 1.0, 1.1, ... 2.0 times the pace: deciles are pieces.
    for shard in range(11):
        made_up.draw("night-1", wanted, shard, 8, pace=1 + shard / 10)
    (row,) = (row for row in planned_work(CONFIG, str(made_up.place.root)).rows if row.work.endswith("held-out prompts")
              and "identity" not in row.work)  # fmt: skip
    places = 2 * (24 + 16)
    expected = [places * PLACE_SECONDS * pace for pace in (1.5, 1.1, 1.9)]
    assert [row.seconds, row.low, row.high] == pytest.approx(expected)
    assert row.cells()[4] == "60 s (44 s to 76 s)"


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({"sampling__steps": 8}, 2.0), ({"sampling__guidance_scale": 1}, 0.5), ({"sampling__guidance_scale": 9}, None)],
)
def test_steps_and_guidance_scale_the_time_of_an_image(made_up, settings, factor):
    made_up.whole("night-1", CONFIG)
    before = seconds_of(planned_work(CONFIG, str(made_up.place.root)), "sampling")
    plan = planned_work(changed(**settings), str(made_up.place.root))
    assert seconds_of(plan, "sampling") == pytest.approx(before * (factor or 1))
    (rate,) = rates_of(plan, "sampling")
    assert rate.startswith("scaled from 8 UNet calls an image: " if factor else "measured: ")


@pytest.mark.parametrize(
    "settings", [{"sampling__dtype": "bfloat16"}, {"sampling__image_size": 32}, {"device": "cuda"}, {"model": "a/b"}]
)
def test_other_models_sizes_formats_and_devices_are_stated_and_not_measured(made_up, settings):
    made_up.whole("night-1", CONFIG)
    plan = planned_work(changed(**settings), str(made_up.place.root))
    for stage in ("sampling", "alignment"):
        (rate,) = rates_of(plan, stage)
        assert rate.startswith("stated default: ")


def test_more_pairs_a_step_scale_the_time_of_a_step(made_up):
    made_up.whole("night-1", CONFIG)
    plan = planned_work(changed(alignment__pairs_per_step=12), str(made_up.place.root))
    assert seconds_of(plan, "alignment") == pytest.approx(2 * 5 * 12 * PAIR_SECONDS)
    assert rates_of(plan, "alignment") == {"scaled from 4 pairs a step: 4 pairs/s, run night-1, cpu, 2 pieces"}


def test_the_last_run_that_fits_counts_and_one_with_the_same_settings_before_a_scaled_one(made_up):
    wanted = workload(CONFIG).image_sets[0]
    for run_id, config, day, pace in (
        ("z-old", CONFIG, 1, 1.0),
        ("a-new", CONFIG, 2, 3.0),
        ("other", changed(sampling__steps=8), 3, 9.0),
    ):
        made_up.start(run_id, config, f"2026-01-0{day}T00:00:00+00:00")
        made_up.draw(run_id, wanted, 0, 8, pace=pace)
    (rate,) = rates_of(planned_work(CONFIG, str(made_up.place.root)), "sampling")
    assert rate == f"measured: {1 / (3 * PLACE_SECONDS):.3g} images/s, run a-new, cpu, 1 piece"


def test_a_configuration_of_another_version_still_gives_rates(made_up):
    """What it did not know has today's default; what is unknown today is left aside."""
    text = CONFIG.model_dump_json().replace('"model_lora":"",', "").replace('{"model"', '{"gone":1,"model"', 1)
    made_up.commit("old", "runs", "config", {"runs": [{"preset": "emoji", "config_json": text}]})
    start = {"started_at": "2025-01-01T00:00:00+00:00", "versions_json": "{}"}
    made_up.commit("old", "starts", "first", {"starts": [start]})
    made_up.draw("old", workload(CONFIG).image_sets[0], 0, 8)
    (rate,) = rates_of(planned_work(CONFIG, str(made_up.place.root)), "sampling")
    assert rate.startswith("measured: 2 images/s, run old")


def test_counterfactuals_are_expected_as_an_earlier_run_drew_them(made_up):
    made_up.whole("night-1", CONFIG)
    counterfactual = {
        "prompt_id": "p",
        "own_sample_id": "o",
        "sample_id": "s",
        "target_prompt_id": "t",
        "sample_index": 0,
    }
    rows = [counterfactual | {"round": 1}] * 7
    made_up.commit("night-1", "counterfactuals", "round-1", {"counterfactuals": rows})
    plan = planned_work(changed(seed=7), str(made_up.place.root))
    (row,) = (row for row in plan.rows if "counterfactuals" in row.work and row.stage == "sampling")
    # Of the second round nothing is known but the first; each is one batch. The slow end has all 40 images.
    assert row.work == "14 images expected, at most 40, counterfactuals"
    assert (row.seconds, row.low) == pytest.approx((16 * PLACE_SECONDS,) * 2)
    assert row.high == pytest.approx((16 + 32) * PLACE_SECONDS)
    assert "Counterfactuals: as many as run night-1 drew." in plan.notes
    first = planned_work(changed(expansion__max_subjects=1), str(made_up.place.root))
    assert any(row.work == "at most 20 images, counterfactuals" for row in first.rows)
    # Of the run itself what it has planned is known.
    made_up.commit("night-1", "counterfactuals", "round-2", {"counterfactuals": [counterfactual | {"round": 2}] * 3})
    own = planned_work(CONFIG, str(made_up.place.root), "night-1")
    assert [row for row in own.rows if row.stage == "sampling"] == []


def test_what_is_committed_is_not_counted_again(made_up):
    made_up.start("night-1", CONFIG)
    sets = {f"{wanted.model_id}.{wanted.purpose}": wanted for wanted in workload(CONFIG).image_sets}
    made_up.draw("night-1", sets["base.validation"], 0, 16)
    made_up.draw("night-1", sets["base.round-1"], 0, 20)
    made_up.draw("night-1", sets["base.evaluation"], 1, 10)
    made_up.train("night-1", "round-1")
    made_up.commit("night-1", "prompts", "all", {"prompts": []})
    whole = planned_work(CONFIG, str(made_up.place.root))
    left = planned_work(CONFIG, str(made_up.place.root), "night-1")
    done = (16 + 24 + 16) * PLACE_SECONDS
    assert seconds_of(left, "sampling") == pytest.approx(seconds_of(whole, "sampling") - done)
    done = (16 + 20 + 10) * BUILDER_SECONDS + 10 * JUDGE_SECONDS
    assert seconds_of(left, "classification") == pytest.approx(seconds_of(whole, "classification") - done)
    assert seconds_of(left, "alignment") == pytest.approx(5 * 4 * PAIR_SECONDS)
    assert not any(row.stage == "expansion" for row in left.rows)
    assert left.notes[0] == "Run night-1 goes on: 3 of at most 13 shards of images are committed and not counted."
    assert planned_work(CONFIG, str(made_up.place.root), "night-2").total.seconds == pytest.approx(whole.total.seconds)


def test_after_validation_has_chosen_no_round_is_left_and_the_kept_model_is_known(made_up):
    made_up.start("night-1", CONFIG)
    kept = next(wanted for wanted in workload(CONFIG).image_sets if wanted.model_id == KEPT)
    validation = {"model_id": "round-1", "round": 1, "axis": "a", "disparity": 0.0, "floor": 0.0, "selected": True}
    made_up.commit("night-1", "validations", "all", {"validations": [validation]})
    made_up.draw("night-1", ImageSet("round-1", kept.purpose, kept.images, "judge"), 0, 20)
    left = planned_work(CONFIG, str(made_up.place.root), "night-1")
    assert seconds_of(left, "alignment") == 0
    places = (24 + 16) + 16 + 2 * 16  # the base's shards, the second of the kept model's, and obedience of both
    assert seconds_of(left, "sampling") == pytest.approx(places * PLACE_SECONDS)
    decision = {"base_model_id": "base", "model_id": "round-1", "verdict": "hold", "reason": "", "checks": []}
    made_up.commit("night-1", "decisions", "round-1", {"decisions": [decision]})
    done = planned_work(CONFIG, str(made_up.place.root), "night-1")
    assert done.rows == ()
    assert done.notes[0] == "Run night-1 has its decision: nothing is left."


def test_seeds_that_are_not_trained_yet_are_left_after_validation_has_chosen(made_up):
    config = changed(alignment__seeds=3)
    made_up.start("night-1", config)
    validation = {"model_id": "round-1", "round": 1, "axis": "a", "disparity": 0.0, "floor": 0.0, "selected": True}
    made_up.commit("night-1", "validations", "all", {"validations": [validation]})
    made_up.train("night-1", "round-1-seed-1")
    left = planned_work(config, str(made_up.place.root), "night-1")
    assert [row.work for row in left.rows if row.stage == "alignment"] == ["1 round, 5 steps of 4 pairs"]
    kept = next(wanted for wanted in workload(config).image_sets if wanted.model_id == f"{KEPT}-seed-1")
    seconds: list[float] = []
    for number, images in enumerate((20, 10)):
        made_up.draw("night-1", ImageSet("round-1-seed-1", kept.purpose, kept.images, "judge"), number, images)
        seconds.append(seconds_of(planned_work(config, str(made_up.place.root), "night-1"), "sampling"))
    assert seconds[0] - seconds[1] == pytest.approx(16 * PLACE_SECONDS)


def test_what_can_be_detected_is_asked_of_the_shares_that_a_run_measured(made_up, monkeypatch):
    asked = []

    def detection(shares, target, change, images, **_):
        asked.append((shares.tolist(), target.tolist(), change, images))
        return Detection(len(shares), images, 0.5, change, 0.79, None)

    monkeypatch.setattr("tasks.power_plan.detection", detection)
    root = str(made_up.place.root)
    rows, notes = planned_detection(CONFIG, root, 0.05)
    assert rows == [("gender", "2", "0.500", "15", "79%, too few", "more prompts (over 4,096 images)")]
    assert "stated default" in notes[0]
    made_up.start("night-1", CONFIG)
    row = {"model_id": "base", "judge_id": "j", "split": "eval", "axis": "perceived_gender", "low": 0.0, "high": 1.0}
    counted = {"x": (9, 0), "y": (4, 5), None: (13, 5)}
    shares = [
        row | {"prompt_id": prompt, "group": group, "count": count, "n": sum(counts), "share": 0.0}
        for prompt, counts in counted.items()
        for group, count in zip(AXES["perceived_gender"].groups, counts, strict=True)
    ]
    shares += [own | {"model_id": "round-1", "count": 1} for own in shares]
    made_up.commit("night-1", "disparities", "round-1", {"disparities": [], "group_shares": shares})
    assert "as run night-1 measured them" in planned_detection(CONFIG, root, 0.05)[1][0]
    other = with_settings(CONFIG, {"classification.judge": "perceived_gender=another/judge"})
    assert "stated default" in planned_detection(other, root, 0.05)[1][0]
    stated, measured, _ = asked
    assert stated[0] == [pytest.approx([0.8, 0.2]), pytest.approx([0.2, 0.8])]
    assert measured == ([[0.95, pytest.approx(0.05)], [0.45, 0.55]], [0.5, 0.5], 0.05, 15)


def test_latents_that_are_kept_take_disk(made_up):
    def of(config: RunConfig) -> list[float]:
        return [row.bytes for row in planned_work(config, str(made_up.place.root)).rows if row.work == "latents"]

    assert of(CONFIG) == []
    images = workload(CONFIG).images
    half = changed(sampling__keep_latents="true", sampling__dtype="bfloat16")
    assert of(half) == [images * 2 * 8 * 16 * 16]  # 8 channels of 16 x 16
    assert of(changed(sampling__keep_latents="true")) == [2 * size for size in of(half)]


def test_a_run_of_another_configuration_is_refused_and_one_that_lost_files(made_up):
    made_up.start("night-1", CONFIG)
    made_up.draw("night-1", workload(CONFIG).image_sets[0], 0, 16)
    with pytest.raises(InvalidInput, match="run 'night-1' was started with seed = 0, and 7 is planned"):
        planned_work(changed(seed=7), str(made_up.place.root), "night-1")
    remove(made_up.place, Choice(0, frozenset({"none"}), frozenset({"images"})), frozenset, now=2e10)
    with pytest.raises(RemovedArtifact, match="cannot go on"):
        planned_work(CONFIG, str(made_up.place.root), "night-1")
    # What its images took is still known.
    plan = planned_work(CONFIG, str(made_up.place.root))
    assert any(row.rate == f"measured: {IMAGE_BYTES} B an image, run night-1" for row in plan.rows)


def test_without_a_workspace_costs_are_stated_and_none_is_made(tmp_path, monkeypatch):
    plan = planned_work(CONFIG, str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []
    assert {row.rate.partition(":")[0] for row in plan.rows if row.seconds} == {"stated default"}
    assert plan.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert plan.warning == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10**6))
    assert "are needed and 1.0 MB are free" in planned_work(CONFIG, str(tmp_path / "none")).warning


@pytest.mark.parametrize("trainable", ["all", "conditioning"])
def test_weights_take_what_the_models_files_say(trainable):
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED["emoji"] / "unet")
    full = model_size(changed(alignment__trainable=trainable))
    named = dict(unet.named_parameters())
    chosen = [p for n, p in named.items() if trainable == "all" or ".attn2." in n or "add_embedding." in n]
    assert full.bytes == 4 * sum(parameter.numel() for parameter in named.values())
    assert full.trained == sum(parameter.numel() for parameter in chosen)
    lora = model_size(changed(alignment__lora_rank=3, alignment__trainable=trainable))
    elements = add_lora(unet, 3, "attention" if trainable == "all" else "cross_attention", seed=0)
    assert (lora.saved, lora.trained) == (elements, elements)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({"alignment__checkpoint_steps": 6}, 0),
        ({"alignment__checkpoint_steps": 5}, 3),
        ({"alignment__checkpoint_steps": 2}, 2 * 3),
        ({"alignment__checkpoint_steps": 2, "alignment__ema_decay": 0.9}, 2 * 4),
        ({"alignment__checkpoint_steps": 50, "alignment__redraw": False}, 2 * 3),
    ],
)
def test_checkpoints_are_weights_and_moments_of_what_is_trained(settings, copies):
    config = changed(**settings)
    size = model_size(config)
    assert checkpoint_bytes(config, size) == copies * 4 * size.trained
