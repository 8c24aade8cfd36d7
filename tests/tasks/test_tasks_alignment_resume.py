"""A round of training that is killed goes on from its checkpoint and ends with the same bytes."""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prefect.logging import disable_run_logger
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from flows.expansion import expansion
from popalign_core.alignment.trainer import StepRecord
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput, TrainingDiverged
from popalign_core.models import emoji
from popalign_core.presets import preset
from storage.artifacts import ArtifactRef, artifact_digest, committed_keys, read_manifest
from storage.checkpoints import latest_checkpoint
from storage.commit import staged_artifact
from storage.errors import ConflictingArtifact
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.tables import read_artifact, write_rows
from tasks import alignment
from tasks.alignment import align_round
from tasks.changed_settings import resumed_config
from tasks.run import BASE, reference, run_config
from tasks.training_processes import Report

RUN = "killed"
PIPELINE = Path(emoji.__file__).parent / "pipeline"
STEPS = 4


def configuration(**alignment_settings: object) -> RunConfig:
    settings = {"steps": STEPS, "pairs_per_step": 2, "checkpoint_steps": 2, "preserve_weight": 0, **alignment_settings}
    return with_settings(preset("emoji"), {f"alignment.{name}": str(value) for name, value in settings.items()})


def commit_preferences(root: Path, round_index: int = 1) -> ArtifactRef:
    """Four images of noise and two pairs."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    images = [{"sample_id": f"s{n}", "image": encode_image(p), "format": FORMAT} for n, p in enumerate(pictures)]
    if round_index == 1:
        with staged_artifact(reference(str(root), RUN, "samples", "base.round-1.00000")) as folder:
            write_rows(folder, "images", images)
    pairs = [
        {
            "run_id": RUN,
            "round": round_index,
            "pair_id": f"p/{n}",
            "population_id": "p",
            "prompt_id": "prompt",
            "caption": "a photo of a judge",
            "winner_sample_id": f"s{n}",
            "loser_sample_id": f"s{n + 2}",
            "weight": 1.0,
        }
        for n in range(2)
    ]
    ref = reference(str(root), RUN, "populations", f"round-{round_index}")
    with staged_artifact(ref) as folder:
        write_rows(folder, "preferences", pairs)
    return ref


def aligned(preferences: ArtifactRef, config: RunConfig, round_index: int = 1, parent: str = BASE) -> ArtifactRef:
    with disable_run_logger():
        return align_round.fn(preferences, config, parent, round_index)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return aligned(commit_preferences(tmp_path_factory.mktemp("undisturbed")), configuration())


def test_a_killed_round_goes_on_with_the_same_bytes(
    tmp_path: Path, undisturbed: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferences = commit_preferences(tmp_path)
    started_at: list[int] = []
    train = alignment.train

    def watched(*arguments: Any, die_after: int | None = None, **options: Any) -> Iterator[StepRecord]:
        started_at.append(options["state"].step)
        for record in train(*arguments, **options):
            yield record
            if record.step == die_after:
                raise KeyboardInterrupt

    monkeypatch.setattr(alignment, "train", partial(watched, die_after=3))
    with pytest.raises(KeyboardInterrupt):
        aligned(preferences, configuration())
    monkeypatch.setattr(alignment, "train", watched)
    resumed = aligned(preferences, configuration())
    assert started_at == [0, 2]
    assert artifact_digest(resumed) == artifact_digest(undisturbed)
    assert latest_checkpoint(Workspace(tmp_path), RUN, "round-1") is None


def test_a_loss_that_is_no_number_commits_nothing_and_keeps_no_state_of_its_making(tmp_path: Path) -> None:
    """The first update ruins the weights, and the checkpoint after it is of those."""
    preferences = commit_preferences(tmp_path)
    for checkpoint_steps in (1, 2):
        config = configuration(learning_rate=1e30, checkpoint_steps=checkpoint_steps)
        with pytest.raises(TrainingDiverged, match="at step 2; training stopped and committed nothing") as caught:
            aligned(preferences, config)
        assert "No checkpoint is left; the same run would begin anew" in str(caught.value)
        assert latest_checkpoint(Workspace(tmp_path), RUN, "round-1") is None
    assert committed_keys(Workspace(tmp_path), RUN, "models") == []
    assert committed_keys(Workspace(tmp_path), RUN, "timings") == []


@pytest.mark.parametrize(("ruined", "kept"), [(4, 3), (5, 3)])
def test_after_a_bad_update_the_last_good_checkpoint_is_kept(
    tmp_path: Path, ruined: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the state after it was saved or not; a run that goes on from there without it comes to its end."""
    preferences, train = commit_preferences(tmp_path), alignment.train
    config = configuration(steps=8, checkpoint_steps=3 if ruined == 5 else 1, learning_rate=1e-6)

    def ruin(*arguments: Any, **options: Any) -> Iterator[StepRecord]:
        for record in train(*arguments, **options):
            if record.step == ruined:
                with torch.no_grad():
                    next(options["state"].policy.denoiser.parameters()).fill_(math.nan)
            yield record

    monkeypatch.setattr(alignment, "train", ruin)
    for _ in range(2):
        with pytest.raises(TrainingDiverged, match=f"at step {ruined + 1}.*checkpoint of step {kept} is kept.*go on"):
            aligned(preferences, config)
        folder = latest_checkpoint(Workspace(tmp_path), RUN, "round-1")
        assert folder is not None
        assert [path.name for path in folder.parent.iterdir()] == [str(kept)]
    monkeypatch.setattr(alignment, "train", train)
    assert read_artifact(aligned(preferences, config), "training_steps")[-1]["step"] == 8


def test_a_training_that_does_not_begin_at_its_reference_says_so() -> None:
    said: list[str] = []
    alignment._tell_start(1e-4, Report(lambda _: None, said.append))  # pyright: ignore[reportPrivateUsage]
    assert said == []
    alignment._tell_start(0.5, Report(lambda _: None, said.append))  # pyright: ignore[reportPrivateUsage]
    assert "beta times g is up to 0.5 there, not 0" in said[0]


def test_training_computes_attention_by_the_kernel_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, flash = alignment.train, list[bool]()

    def watched(*arguments: Any, **options: Any) -> Iterator[StepRecord]:
        for record in train(*arguments, **options):
            flash.append(torch.backends.cuda.flash_sdp_enabled())
            yield record

    monkeypatch.setattr(alignment, "train", watched)
    preferences = commit_preferences(tmp_path)
    config = with_settings(configuration(steps=1), {"sampling.attention": "math"})
    assert read_manifest(aligned(preferences, config)).facts["attention"] == "math"
    assert flash == [False]
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_most_memory_of_a_training_is_recorded(undisturbed: ArtifactRef) -> None:
    timings = read_artifact(reference(undisturbed.workspace, RUN, "timings", "models-round-1"), "timings")
    # The UNet alone, its copy and its moments are more; no test machine has as much as the upper bound.
    assert 50e6 < timings[0]["peak_bytes"] < 100e9


def test_another_seed_is_another_training_of_the_same_round(tmp_path: Path, undisturbed: ArtifactRef) -> None:
    preferences = commit_preferences(tmp_path)
    with disable_run_logger():
        repeated = align_round.fn(preferences, configuration(), BASE, 1, seed_index=1)
    assert repeated.key == "round-1-seed-1"
    own, other = (read_artifact(ref, "training_steps") for ref in (undisturbed, repeated))
    assert [row["step"] for row in other] == [row["step"] for row in own]
    assert [row["gradient_norm"] for row in other] != [row["gradient_norm"] for row in own]
    (model,) = read_artifact(repeated, "models")
    assert (model["model_id"], model["round"], model["repeats_model_id"]) == ("round-1-seed-1", 1, "round-1")
    assert read_artifact(undisturbed, "models")[0]["repeats_model_id"] is None


def test_without_redraw_rounds_are_parts_of_one_training(tmp_path: Path, undisturbed: ArtifactRef) -> None:
    preferences = commit_preferences(tmp_path)
    config = configuration(redraw="false", steps=STEPS // 2, rounds=2)
    parts = [aligned(preferences, config, round_index) for round_index in (1, 2)]
    steps = [[row["step"] for row in read_artifact(part, "training_steps")] for part in parts]
    assert steps == [[1, 2], [3, 4]]
    weights = [(ref.folder / "unet" / "diffusion_pytorch_model.safetensors") for ref in (parts[1], undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def weights_of(ref: ArtifactRef) -> dict[str, Tensor]:
    return load_file(ref.folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_what_is_kept_of_a_round_is_the_average_where_one_is_kept(tmp_path: Path, undisturbed: ArtifactRef) -> None:
    averaged = aligned(commit_preferences(tmp_path), configuration(ema_decay=0.9))
    assert read_artifact(averaged, "training_steps") == read_artifact(undisturbed, "training_steps")
    base = load_file(PIPELINE / "unet" / "diffusion_pytorch_model.safetensors")
    last, mean = weights_of(undisturbed), weights_of(averaged)
    moved = [name for name in last if not torch.equal(last[name], base[name].float())]
    assert moved
    distance = {name: (last[name] - base[name].float()).norm() for name in moved}
    assert all((mean[name] - base[name].float()).norm() < distance[name] for name in moved)


def adapter_of(ref: ArtifactRef) -> dict[str, Tensor]:
    return load_file(ref.folder / "lora" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("trainable", ["all", "conditioning"])
def test_an_adapter_of_a_later_round_goes_on_from_the_one_before(tmp_path: Path, trainable: str) -> None:
    rounds = [commit_preferences(tmp_path, 1), commit_preferences(tmp_path, 2)]
    config = configuration(lora_rank=2, learning_rate=1e-2, trainable=trainable)
    first = aligned(rounds[0], config)
    second = aligned(rounds[1], with_settings(config, {"alignment.learning_rate": "1e-6"}), 2, parent="round-1")
    before, after = adapter_of(first), adapter_of(second)
    assert before.keys() == after.keys()
    assert all(("attn2" in name) or trainable == "all" for name in before)
    assert max(factor.abs().max() for name, factor in before.items() if "lora_B" in name or "lora.up" in name) > 1e-3
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    losses = [row["loss"] for row in read_artifact(second, "training_steps")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "the reference is the adapter of the round before"


# --- a run that goes on with other settings, because memory did not suffice ---


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], None]:
    """The first stage of a run, without its prompts."""
    monkeypatch.setattr("flows.expansion.write_prompts", lambda *_: None)

    def started(config: RunConfig) -> None:
        with disable_run_logger():
            expansion.fn(RUN, "emoji", str(tmp_path), config)

    return started


def test_a_run_goes_on_with_settings_that_save_memory_and_its_model_says_so(
    tmp_path: Path, start: Callable[[RunConfig], None]
) -> None:
    first, later = configuration(), configuration(micro_batch=1, gradient_checkpointing="true")
    start(first)
    preferences = commit_preferences(tmp_path)
    start(later)
    assert run_config(str(tmp_path), RUN) == first, "recorded as it was first given"
    trained = aligned(preferences, later)
    now = {"alignment.gradient_checkpointing": True, "alignment.micro_batch": 1}
    assert read_manifest(trained).facts["changed_settings"] == now
    (row,) = read_artifact(trained, "models")
    assert row["config_digest"] == hashlib.sha256(first.model_dump_json().encode()).hexdigest()[:16]
    with pytest.raises(ConflictingArtifact):
        start(configuration(micro_batch=1, learning_rate=1e-3))


def test_a_training_checkpoint_goes_on_with_its_own_micro_batch_alone(
    tmp_path: Path, undisturbed: ArtifactRef, monkeypatch: pytest.MonkeyPatch, start: Callable[[RunConfig], None]
) -> None:
    start(configuration())
    preferences = commit_preferences(tmp_path)
    train = alignment.train

    def dying(*arguments: Any, **options: Any) -> Iterator[StepRecord]:
        for record in train(*arguments, **options):
            yield record
            if record.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(alignment, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        aligned(preferences, configuration())
    monkeypatch.setattr(alignment, "train", train)
    with pytest.raises(InvalidInput, match=r"made with micro_batch = None, now it is 1\. Go on with the old"):
        aligned(preferences, configuration(micro_batch=1))
    trained = aligned(preferences, configuration(gradient_checkpointing="true"))
    for name, weight in weights_of(undisturbed).items():
        assert torch.equal(weights_of(trained)[name], weight), "twice the same numbers: exact"


def test_a_resume_takes_what_saves_memory_and_nothing_else() -> None:
    config = configuration()
    assert resumed_config(config, []) == config
    assert resumed_config(config, ["alignment.micro_batch=1"]) == configuration(micro_batch=1)
    with pytest.raises(InvalidInput, match=r"--resume goes on .* got alignment.steps: only --set execution"):
        resumed_config(config, ["alignment.micro_batch=1", "alignment.steps=3"])
