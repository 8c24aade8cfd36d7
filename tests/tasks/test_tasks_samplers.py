"""What is kept beside images: how they were drawn, prompts' embeddings, latents, the batch that fits."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from popalign_core import sampling
from popalign_core.acceleration import Acceleration
from popalign_core.config import with_settings
from popalign_core.models.prompt_embeddings import PromptEncoder
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.sampler_facts import fingerprint
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images
from popalign_core.tensor_arrays import from_bytes
from storage.artifacts import ArtifactRef, read_manifest
from storage.commit import staged_artifact
from storage.images import decode_image
from storage.layout import Workspace
from storage.tables import read_artifact, read_rows, write_rows
from tasks.alignment_data import alignment_data, data_kind
from tasks.batch_sizes import fitting, keeping_batch_size
from tasks.embeddings import provide_embeddings
from tasks.run import BASE, loaded_model, reference
from tasks.samplers import record_sampler, report_differences, samplers_of
from tasks.sampling import plan_shards, sample_shard

FACTS = {"model": "m", "steps": "10", "batch_size": "8"}


@pytest.fixture(autouse=True)
def _fresh_models() -> Iterator[None]:
    loaded_model.cache_clear()
    yield
    loaded_model.cache_clear()


def shards_of(run, **settings: str) -> tuple:
    config = with_settings(run.config, {name.replace("__", "."): value for name, value in settings.items()})
    return config, plan_shards(run.workspace, run.run_id, config, BASE, "evaluation")


def test_every_fingerprint_stands_for_facts(written_run) -> None:
    config, (ref,) = shards_of(written_run)
    sample_shard.fn(ref, config)
    (name,) = {row["sampler_fingerprint"] for row in read_artifact(ref, "samples")}
    facts = samplers_of([ref])[name]
    assert fingerprint(facts) == name
    assert (facts["steps"], facts["batch_size"], facts["scheduler"]) == ("2", "8", "dpm++")


def test_prompts_are_encoded_once_a_workspace(written_run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shards = shards_of(written_run, sampling__shard_size="8")
    sample_shard.fn(shards[0], config)
    first = {row["sample_id"]: row["image"] for row in read_artifact(shards[0], "images")}
    provide_embeddings(written_run.workspace, load_sdxl(ModelSource("emoji"), device="cpu"), ["a photo of a cook"])
    loaded_model.cache_clear()
    other = reference(written_run.workspace, "another", "samples", shards[0].key)
    prompts = reference(written_run.workspace, written_run.run_id, "prompts", "prompts")
    rows = read_rows(Workspace.open(written_run.workspace), written_run.run_id, "prompts")
    with staged_artifact(replace(prompts, run_id="another")) as folder:
        write_rows(folder, "prompts", [{**row, "run_id": "another"} for row in rows])
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    monkeypatch.setattr(model.pipeline, "encode_prompt", lambda **_: pytest.fail("encoded again"))
    monkeypatch.setattr("tasks.sampling.loaded_model", lambda *_: model)
    sample_shard.fn(other, config)
    assert {row["sample_id"]: row["image"] for row in read_artifact(other, "images")} == first


def test_other_encoders_have_embeddings_of_their_own() -> None:
    models = [load_sdxl(ModelSource("emoji"), device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16")]
    changed = load_sdxl(ModelSource("emoji"), device="cpu")
    with torch.no_grad():
        next(changed.pipeline.text_encoder_2.parameters()).add_(1e-3)
    digests = {model.prompts.digest for model in (*models, changed)}
    again = PromptEncoder(models[0].pipeline, models[0].device, models[0].prompts._surroundings)
    assert len(digests) == 3
    assert again.digest in digests
    assert PromptEncoder(models[0].pipeline, models[0].device, {"torch": "0"}).digest not in digests


def test_kept_latents_are_what_the_images_were_decoded_from(written_run) -> None:
    config, (ref,) = shards_of(written_run, sampling__keep_latents="true")
    sample_shard.fn(ref, config)
    assert "latents.parquet" in read_manifest(ref).files
    rows = read_artifact(ref, "latents")
    latents = torch.stack([from_bytes(row["latents"], row["shape"], row["dtype"]) for row in rows])
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    with torch.inference_mode():
        images = model.pipeline.vae.decode(latents / model.pipeline.vae.config.scaling_factor).sample
    pixels = ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    stored = {row["sample_id"]: row["image"] for row in read_artifact(ref, "images")}
    for row, decoded in zip(rows, pixels, strict=True):
        assert np.abs(decode_image(stored[row["sample_id"]]) - decoded).max() <= 1  # another batch size


def preferences_over(run, ref: ArtifactRef) -> ArtifactRef:
    names = [row["sample_id"] for row in read_artifact(ref, "samples")]
    sides = {"winner_sample_id": names[0], "loser_sample_id": names[9]}
    pair = {"run_id": run.run_id, "round": 1, "pair_id": "p/0", "population_id": "p", "prompt_id": "prompt"}
    found = reference(run.workspace, run.run_id, "populations", "round-1")
    with staged_artifact(found) as folder:
        write_rows(folder, "preferences", [{**pair, **sides, "caption": "a photo of a judge", "weight": 1.0}])
    return found


def test_training_takes_kept_latents_and_says_so(written_run) -> None:
    config, (ref,) = shards_of(written_run, sampling__keep_latents="true")
    sample_shard.fn(ref, config)
    preferences = preferences_over(written_run, ref)
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    encoded = alignment_data(preferences, model, named=False)
    model.encode_images = lambda _: pytest.fail("encoded an image")
    kept = alignment_data(preferences, model, named=False, kept_latents=True)
    assert (data_kind(encoded), data_kind(kept)) == ("encoded from stored images", "kept from sampling")
    by_name = {row["sample_id"]: row for row in read_artifact(ref, "latents")}
    pair = read_artifact(preferences, "preferences")[0]
    for side, place in (("winner", kept.winner), ("loser", kept.loser)):
        row = by_name[pair[f"{side}_sample_id"]]
        assert torch.equal(kept.latent_means[place[0]], from_bytes(row["latents"], row["shape"], row["dtype"]))
    # The encoder gives back about what was decoded.
    assert (encoded.latent_means - kept.latent_means).abs().mean() < 0.5 * kept.latent_means.abs().mean()


def test_without_all_latents_training_encodes_images(written_run) -> None:
    config, (ref,) = shards_of(written_run)
    sample_shard.fn(ref, config)
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    data = alignment_data(preferences_over(written_run, ref), model, named=False, kept_latents=True)
    assert data_kind(data) == "encoded from stored images"


def limited(monkeypatch: pytest.MonkeyPatch, work: str, fits: int) -> list[int]:
    """Lets a part of the sampler fail for more images at once than fit. Returns: how many were tried, in order."""
    really, sizes = getattr(sampling, work), []

    def limited_work(denoising: object, rows: object, given: object, settings: object) -> object:
        sizes.append(given if isinstance(given, int) else len(given))
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("made up")
        return really(denoising, rows, given, settings)

    monkeypatch.setattr(sampling, work, limited_work)
    return sizes


def test_the_batch_that_fits_is_what_the_next_shard_starts_with(written_run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shards = shards_of(written_run, sampling__shard_size="8")
    sizes = limited(monkeypatch, "_denoised", 4)
    for shard in shards:
        sample_shard.fn(shard, config)
    assert sizes == [8, 4, 4, 4, 4]
    assert {(facts["batch_size"], facts["vae_batch"]) for facts in samplers_of(shards).values()} == {("4", "4")}


def test_what_the_vae_has_room_for_is_what_the_next_shard_decodes(written_run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shards = shards_of(written_run, sampling__shard_size="8")
    sizes, decoded = limited(monkeypatch, "_denoised", 8), limited(monkeypatch, "_decoded", 2)
    for shard in shards:
        sample_shard.fn(shard, config)
    assert (sizes, decoded) == ([8, 8], [8, 4, 2, 2])
    assert {(facts["batch_size"], facts["vae_batch"]) for facts in samplers_of(shards).values()} == {("8", "2")}


def test_a_batch_is_remembered_for_what_takes_as_much_memory_alone(
    written_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    settings = SamplingSettings("ddim", 2, 3.0, 0, 0, 7, "float32", "default")
    limited(monkeypatch, "_denoised", 3)
    requests = [ImageRequest("base/p/0", "p", "a photo of a judge", 0, 1)]
    list(keeping_batch_size(written_run.workspace, model, settings, sample_images(model, requests, settings)))

    def begins_with(**changed: object) -> int:
        return fitting(written_run.workspace, model, replace(settings, **changed)).batch_size

    # What failed is 7; 6 was never tried.
    assert [begins_with(batch_size=size) for size in (9, 7, 6, 3)] == [3, 3, 6, 3]
    same = ({"scheduler": "dpm++", "steps": 9, "guidance_scale": 7.0}, {"acceleration": Acceleration(vae_batch=1)})
    assert [begins_with(**changed) for changed in same] == [3, 3]
    other = [
        {"guidance_scale": 1.0},
        {"attention": "math"},
        {"fp8_weights": True},
        {"cache_every": 2},
        {"height": 128},
        {"dtype": "bfloat16"},
        *(
            {"acceleration": Acceleration(**switch)}
            for switch in (
                {"vae_dtype": "bfloat16"},
                {"cuda_graphs": True},
                {"fused_projections": True},
                {"compile": "full"},
                {"channels_last": "on"},
                {"skip_empty_attention": False},
            )
        ),
    ]
    assert [begins_with(**changed) for changed in other] == [7] * len(other)


def commit_shard(run, key: str, facts: dict[str, str] | None) -> ArtifactRef:
    name = record_sampler(run.workspace, run.run_id, facts) if facts else "from before"
    ref = reference(run.workspace, run.run_id, "samples", key)
    row = {"run_id": run.run_id, "model_id": BASE, "prompt_id": "p", "sample_index": 0, "sample_id": f"{key}/0"}
    row |= {"seed": 1, "width": 64, "height": 64, "image_sha256": "", "sampler_fingerprint": name}
    with staged_artifact(ref) as folder:
        write_rows(folder, "samples", [row])
    return ref


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listening = logging.Logger("listening")
    listening.addHandler(Listening())
    monkeypatch.setattr("tasks.samplers.logger", lambda: listening)
    return said


def differences(run) -> dict[str, list[str]]:
    rows = read_rows(Workspace.open(run.workspace), run.run_id, "sampler_differences")
    return {row["fact"]: row["values"] for row in rows}


def test_another_model_alone_is_no_difference(written_run, warnings: list[str]) -> None:
    shards = [commit_shard(written_run, f"base.evaluation.{n}", FACTS | {"model": str(n)}) for n in range(2)]
    report_differences("assessment of round-1", "assessment.round-1", shards)
    assert (differences(written_run), warnings) == ({}, [])


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (FACTS | {"batch_size": "4"}, {"batch_size": ["8", "4"]}),
        (None, {name: [value, "not recorded"] for name, value in FACTS.items() if name != "model"}),
    ],
)
def test_images_that_were_drawn_differently_are_told(
    written_run, warnings: list[str], other: dict[str, str] | None, expected: dict[str, list[str]]
) -> None:
    shards = [commit_shard(written_run, f"base.evaluation.{n}", facts) for n, facts in enumerate((FACTS, other))]
    for _ in range(2):  # a resumed run tells it again
        report_differences("assessment of round-1", "assessment.round-1", shards)
    found = differences(written_run)
    assert found.pop("sampler", ["not recorded"]) == ["not recorded"]
    assert found == expected
    assert len(warnings) == 2
    assert "assessment of round-1: images were drawn differently" in warnings[0]
