"""A trained model becomes the one in use, the next run starts from it, and plain diffusers opens its export."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict  # pyright: ignore[reportUnknownVariableType]
from prefect.logging import disable_run_logger
from typer.testing import CliRunner

from flows import registry_cli
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models import export
from popalign_core.models.checkpoints import EMBEDDED, folder_digest
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, sample_images
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.errors import CorruptArtifact, FolderInUse, NotCommitted, RunInUse
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.locks import run_lock
from storage.registry import current_model, read_registry
from storage.tables import read_artifact, read_rows, write_rows
from tasks.alignment import align_round
from tasks.inputs import check_inputs
from tasks.registry import (
    NotPromotable,
    export_model,
    listed_models,
    promote_model,
    rollback_model,
    starting_config,
)
from tasks.run import BASE, model_source, record_run, reference, sampling_settings

AXIS = "perceived_gender"
MODEL = "round-1"
SETTINGS = {
    "device": "cpu",
    "expansion.axes": AXIS,
    "alignment.steps": "2",
    "alignment.pairs_per_step": "2",
    "alignment.preserve_weight": "0",
    # So far from the base that nobody could take the one for the other.
    "alignment.learning_rate": "0.02",
}


def commit_preferences(place: Workspace, run_id: str) -> ArtifactRef:
    """Four images of noise and two pairs."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    images = [{"sample_id": f"s{n}", "image": encode_image(p), "format": FORMAT} for n, p in enumerate(pictures)]
    with staged_artifact(reference(str(place.root), run_id, "samples", "base.round-1.00000")) as folder:
        write_rows(folder, "images", images)
    pair = {"run_id": run_id, "round": 1, "population_id": "p", "prompt_id": "x", "caption": "a photo of a judge"}
    pairs = [
        pair | {"pair_id": f"p/{n}", "winner_sample_id": f"s{n}", "loser_sample_id": f"s{n + 2}", "weight": 1.0}
        for n in range(2)
    ]
    ref = reference(str(place.root), run_id, "populations", "round-1")
    with staged_artifact(ref) as folder:
        write_rows(folder, "preferences", pairs)
    return ref


def trained(place: Workspace, run_id: str, config: RunConfig) -> ArtifactRef:
    record_run(str(place.root), run_id, "emoji", config)
    with disable_run_logger():
        return align_round.fn(commit_preferences(place, run_id), config, BASE, 1)


def assessed(place: Workspace, run_id: str, verdict: str = "promote") -> None:
    """What an assessment would have written, with numbers that are known."""
    named = {"run_id": run_id, "judge_id": "judge@1", "split": "eval"}
    common = {"prompt_id": None, "level": "mean", "axis": AXIS, "measure": "l2", "target": "uniform", "floor": 0.144}
    numbers = {"n": 96, "unknown": 3}
    disparities = [
        named | common | numbers | {"model_id": model, "value": value, "low": value - 0.1, "high": value + 0.1}
        for model, value in ((BASE, 0.512), (MODEL, 0.187))
    ]
    compared = {"axis": AXIS, "measure": "l2", "base_model_id": BASE, "model_id": MODEL, "before": 0.512}
    compared |= {"after": 0.187, "difference": -0.325, "difference_low": -0.4, "difference_high": -0.2}
    scores = [
        named
        | {"model_id": model, "kind": kind, "measure": measure, "unit": "share", "n": 96}
        | {"value": value, "low": value - 0.01, "high": value + 0.01, "judge_id": judge}
        for model, moved in ((BASE, 0.0), (MODEL, -0.05))
        for kind, measure, judge, value in (
            ("specific", f"obedience:{AXIS}", "judge@1", 0.93 + moved),
            ("neutral", "clip_score", "builder@1", 0.31 + moved),
        )
    ]
    ratio = {"ratio": 0.365, "ratio_low": 0.3, "ratio_high": 0.45}
    comparisons = [
        named | compared | ratio,
        named | compared | ratio | {"measure": "clip_score", "judge_id": "builder@1"},
    ]
    with staged_artifact(reference(str(place.root), run_id, "disparities", MODEL)) as folder:
        write_rows(folder, "disparities", disparities)
        write_rows(folder, "scores", scores)
        write_rows(folder, "comparisons", comparisons)
    row = {"run_id": run_id, "base_model_id": BASE, "model_id": MODEL, "verdict": verdict, "reason": f"{verdict}: why."}
    check = {"name": f"{AXIS}_reduction", "passed": True, "value": 0.635, "low": 0.55, "high": 0.7, "threshold": 0.5}
    with staged_artifact(reference(str(place.root), run_id, "decisions", MODEL)) as folder:
        write_rows(folder, "decisions", [row | {"checks": [check]}])


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return with_settings(preset("emoji"), SETTINGS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Workspace:
    """Two trained models, an adapter and a whole UNet; the one is to be promoted, the other held."""
    place = Workspace.open(tmp_path_factory.mktemp("workspace"))
    trained(place, "adapter", with_settings(config, {"alignment.lora_rank": "2"}))
    trained(place, "whole", config)
    assessed(place, "adapter")
    assessed(place, "whole", "hold")
    trained(place, "undecided", with_settings(config, {"alignment.steps": "1"}))
    return place


@pytest.fixture(autouse=True)
def _nothing_promoted(place: Workspace) -> Iterator[None]:
    yield
    (place.root / "registry.json").unlink(missing_ok=True)


def source_of(place: Workspace, run_id: str, model_id: str = MODEL) -> ModelSource:
    config = RunConfig.model_validate_json(read_rows(place, run_id, "runs")[0]["config_json"])
    return model_source(str(place.root), run_id, config, model_id)


@torch.no_grad()
def predicted(pipeline: Any) -> torch.Tensor:
    """The noise that a pipeline's UNet sees in fixed noise, under its own embedding of a prompt."""
    context, _, pooled, _ = pipeline.encode_prompt(
        "a photo of a judge", device="cpu", do_classifier_free_guidance=False
    )
    noisy = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return pipeline.unet(noisy, 500, context, added_cond_kwargs=conditions).sample


def ours(source: ModelSource) -> torch.Tensor:
    return predicted(load_sdxl(source, device="cpu").pipeline)


def drawn(source: ModelSource) -> np.ndarray:
    """One image, in levels of 0 to 255."""
    settings = sampling_settings(preset("emoji").sampling.model_copy(update={"steps": 2, "batch_size": 1}))
    request = ImageRequest("s", "p", "a photo of a judge", 0, 1)
    ((found,),) = sample_images(load_sdxl(source, device="cpu"), [request], settings)
    return found.pixels.astype(int)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within rounding, and not because every model says the same."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, ours(ModelSource("emoji")), atol=1e-2)


def test_the_models_table_says_what_a_model_was_made_from(place: Workspace) -> None:
    (row,) = read_artifact(reference(str(place.root), "whole", "models", MODEL), "models")
    recorded = read_rows(place, "whole", "runs")[0]["config_json"]
    assert row["base_model"] == "emoji"
    assert row["base_digest"] == folder_digest(EMBEDDED["emoji"])
    assert row["config_digest"] == hashlib.sha256(recorded.encode()).hexdigest()[:16]
    assert row["data_run_id"] == "whole"


def test_a_decided_model_is_promoted_once(place: Workspace) -> None:
    move = promote_model(str(place.root), "adapter", reason="nightly run")
    assert move is not None
    assert (move.before, move.after, move.forced) == (None, current_model(place), False)
    assert promote_model(str(place.root), "adapter", MODEL) is None
    assert len(read_registry(place).history) == 1
    listed = {row["run_id"]: row for row in listed_models(str(place.root))}
    assert {name: row["promoted"] for name, row in listed.items()} == {
        "adapter": True,
        "undecided": False,
        "whole": False,
    }
    assert listed["adapter"]["disparities"][0]["ratio"] == 0.365
    assert rollback_model(str(place.root)).after is None  # pyright: ignore[reportOptionalMemberAccess]


def test_what_is_not_promoted(place: Workspace) -> None:
    root = str(place.root)
    with pytest.raises(NotPromotable, match="'undecided' has no decision yet"):
        promote_model(root, "undecided", force=True, reason="hope")
    with pytest.raises(NotPromotable, match=r"no decision on round-7; it decided on round-1"):
        promote_model(root, "adapter", "round-7")
    with pytest.raises(NotCommitted, match="there is no run 'nothing'"):
        promote_model(root, "nothing")
    with pytest.raises(NotPromotable, match=r"is held: hold: why\. To promote it all the same, give --force"):
        promote_model(root, "whole")
    with pytest.raises(InvalidInput, match="--force needs --reason"):
        promote_model(root, "whole", force=True, reason=" ")
    with run_lock(place, "adapter"), pytest.raises(RunInUse, match="'adapter'"):
        promote_model(root, "adapter")
    assert current_model(place) is None
    move = promote_model(root, "whole", force=True, reason="reviewed by hand")
    assert move is not None
    assert (move.forced, move.reason) == (True, "reviewed by hand")


def test_weights_that_are_damaged_or_gone_are_refused(place: Workspace) -> None:
    weights = next((reference(str(place.root), "adapter", "models", MODEL).folder / "lora").iterdir())
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for attempt in (promote_model, export_model):
            with pytest.raises(CorruptArtifact, match="its manifest says"):
                attempt(str(place.root), "adapter")
        weights.unlink()
        with pytest.raises(CorruptArtifact, match="round-1 of run 'adapter' are missing"):
            promote_model(str(place.root), "adapter")
    finally:
        weights.write_bytes(content)
    assert current_model(place) is None


def test_nothing_promoted_changes_no_configuration(place: Workspace, config: RunConfig) -> None:
    assert starting_config(str(place.root), config) is config


@pytest.mark.parametrize(("run_id", "names"), [("adapter", "model_lora"), ("whole", "model_unet")])
def test_the_next_run_starts_from_the_promoted_model(
    place: Workspace, config: RunConfig, run_id: str, names: str
) -> None:
    root = str(place.root)
    promote_model(root, run_id, force=True, reason="test")
    started = starting_config(root, config)
    assert {name for name, value in started if value != getattr(config, name)} == {names}
    assert getattr(started, names).startswith(f"workspace:runs/{run_id}/")
    check_inputs(started)
    assert_same(ours(model_source(root, "next", started, BASE)), ours(source_of(place, run_id)))
    image = drawn(model_source(root, "next", started, BASE))
    assert np.abs(image - drawn(source_of(place, run_id))).max() <= 1
    assert np.abs(image - drawn(ModelSource("emoji"))).max() > 10
    with pytest.raises(InvalidInput, match="belongs to 'emoji', and the configuration names 'other'"):
        starting_config(root, config.model_copy(update={"model": "other"}))


@pytest.mark.parametrize("base", ["adapter", "whole"])
def test_an_adapter_on_a_promoted_model_is_merged_once_and_exported_whole(
    place: Workspace, config: RunConfig, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(place.root)
    promote_model(root, base, force=True, reason="test")
    second = f"on-{base}"
    own = with_settings(starting_config(root, config), {"alignment.lora_rank": "2", "seed": "1"})
    ref = trained(place, second, own)
    assert read_artifact(ref, "models")[0]["base_model"].startswith(f"emoji + workspace:runs/{base}/models/round-1/")
    assessed(place, second)
    promote_model(root, second)
    started = starting_config(root, config)
    assert started.model_lora == ""
    assert started.model_unet.startswith(f"workspace:registry/{second}.round-1.")
    expected = ours(source_of(place, second))
    assert_same(ours(model_source(root, "next", started, BASE)), expected)
    assert not torch.allclose(expected, ours(source_of(place, base)), atol=1e-2)
    assert [path.name for path in (place.root / "registry").iterdir() if path.name.startswith(".")] == []

    monkeypatch.setattr("tasks.registry.save_merged_denoiser", None)
    assert starting_config(root, config) == started, "merged once"
    assert_same(predicted(opened(export_model(root, second, folder=tmp_path / "export"))), expected)


def opened(folder: Path) -> Any:
    """Runs the lines of the card, and nothing else, in the folder."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) <= 3
    found: dict[str, Any] = {}
    with working_in(folder):
        exec(code, found)
    return found["pipe"]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


@pytest.mark.parametrize(("run_id", "files"), [("adapter", {"pytorch_lora_weights.safetensors"}), ("whole", {"unet"})])
def test_three_lines_of_the_card_open_an_export_in_plain_diffusers(
    place: Workspace, tmp_path: Path, run_id: str, files: set[str]
) -> None:
    folder = export_model(str(place.root), run_id, folder=tmp_path / "new" / "export")
    assert {path.name for path in folder.iterdir()} == {"README.md", *files}
    kept = {".safetensors", ".json", ".md"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= kept
    assert_same(predicted(opened(folder)), ours(source_of(place, run_id)))


def test_the_card_carries_the_disparities_and_the_lineage(place: Workspace, tmp_path: Path) -> None:
    with working_in(tmp_path):
        folder = export_model(str(place.root), "whole")
    assert folder == tmp_path / "whole.round-1"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "emoji"
    assert card.data.library_name == "diffusers"
    (line,) = [line for line in card.text.splitlines() if line.startswith("| Perceived gender | 0.512")]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "Perceived gender",
        "0.512 [0.412, 0.612]",
        "0.187 [0.087, 0.287]",
        "0.36 [0.30, 0.45]",
        "0.144",
        "0",
        "96, 96",
        "3, 3",
    ]
    (row,) = read_artifact(reference(str(place.root), "whole", "models", MODEL), "models")
    versions = json.loads(read_rows(place, "whole", "starts")[-1]["versions_json"])
    for said in ("**Hold.** hold: why.", "`judge@1`", "88.0%", row["config_digest"], f"torch {versions['torch']}"):
        assert said in card.text


def test_a_folder_that_is_taken_is_refused(place: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(FolderInUse, match=str(tmp_path)):
        export_model(str(place.root), "whole", folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(NotPromotable, match="no decision yet"):
        export_model(str(place.root), "undecided")
    card = (export_model(str(place.root), "undecided", MODEL, tmp_path / "new") / "README.md").read_text()
    assert "This model was not assessed: its disparity is not known." in card


def test_a_lora_that_adapts_the_text_encoders_is_exported_with_them(tmp_path: Path) -> None:
    pipeline = load_sdxl(ModelSource("emoji"), device="cpu").pipeline
    layers: dict[str, Any] = {}
    for part, modules, name in (("unet", ["to_q"], "unet"), ("text_encoder", ["q_proj"], "text_encoder")):
        adapted = getattr(pipeline, part)
        adapted.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False), adapter_name="x")
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(adapted, adapter_name="x")
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "both", **layers)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path / "unet", unet_lora_layers=layers["unet_lora_layers"])
    assert export.adapts_text_encoders(str(tmp_path / "both"))
    assert export.adapts_text_encoders("owner/name")
    assert not export.adapts_text_encoders(str(tmp_path / "unet"))

    source = ModelSource("emoji", fused_lora=str(tmp_path / "both"), lora=str(tmp_path / "unet"))
    (tmp_path / "export").mkdir()
    assert export.export_weights(source, tmp_path / "export") == "pipeline"
    found = StableDiffusionXLPipeline.from_pretrained(tmp_path / "export", use_safetensors=True)
    assert_same(predicted(found), ours(source))


def test_a_unet_is_checked_at_the_edge(config: RunConfig, tmp_path: Path) -> None:
    for unet, said in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "holds no safetensors")):
        with pytest.raises(ModelNotUsable, match=said):
            check_inputs(config.model_copy(update={"model_unet": str(unet)}))
    embedded = EMBEDDED["emoji"] / "unet"
    check_inputs(config.model_copy(update={"model_unet": str(embedded)}))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    settings = json.loads((embedded / "config.json").read_text())
    for changed, said in (
        ({"addition_embed_type": None}, "addition_embed_type is None"),
        ({"in_channels": 4}, "in_channels is 4"),
        ({"_class_name": "UNet2DModel"}, "expected SD3Transformer2DModel or UNet2DConditionModel"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(ModelNotUsable, match=said):
            check_inputs(config.model_copy(update={"model_unet": str(tmp_path)}))


def test_the_commands(place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_cli.console, "width", 300)
    app = typer.Typer()
    for command in (registry_cli.models, registry_cli.promote, registry_cli.rollback, registry_cli.export):
        app.command()(command)

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "-w", str(place.root)], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert "adapter/round-1 (before: the base as configured)" in said("promote", "adapter")
    assert "run adapter is the current model already; nothing was changed." in said("promote", "adapter")
    assert "whole/round-1 (before: adapter/round-1)" in said("promote", "whole", "--force", "--reason", "by hand")
    (line,) = [line for line in said("models").splitlines() if "*" in line and "whole" in line]
    assert "perceived_gender 0.512, 0.187, 0.36 [0.30, 0.45]" in line
    assert "hold" in line
    assert "the base as configured (before: whole/round-1)" in said("rollback", "--to", "base")
    assert str(tmp_path / "export") in said("export", "adapter", "--to", str(tmp_path / "export"))
    assert [move.reason for move in read_registry(place).history] == ["promote: why.", "by hand", ""]


def test_the_commands_load_no_torch_before_they_run() -> None:
    code = "import sys, flows.registry_cli; sys.exit(bool({'torch', 'prefect', 'duckdb'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
