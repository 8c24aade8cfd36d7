"""Compiled blocks of a training: one graph for policy and reference, and none that another model's passes leave."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import write_stable_diffusion
from torch import nn

from popalign_core.acceleration import Acceleration
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord, train
from popalign_core.models.loading import load_model
from popalign_core.models.sdxl import ModelSource
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.models.trainable import PassOptions, make_policy, own_graphs
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images

# Dynamo looks at tensors that warn of being looked at.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
PAIRS = 8
DRAWN = SamplingSettings("ddim", 2, 1.0, 0, 0, 2, "float32", "default", Acceleration(compile="regional"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stable_diffusion(tmp_path_factory.mktemp("tiny") / "pipeline", one_width=True)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Blocks are traced and no code is generated, which would take minutes. Gives the number of graphs so far."""
    compile_module: Any = nn.Module.compile  # pyright: ignore

    def trace(module: nn.Module, **options: Any) -> None:
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", trace)
    # Else what is one graph too many runs as it is, in silence.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # pyright: ignore
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()  # pyright: ignore
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]  # pyright: ignore
        torch.compiler.reset()


def loaded(tiny: Path) -> TextToImageModel:
    return load_model(ModelSource(str(tiny)), device="cpu", dtype="float32")


def data_of(model: TextToImageModel) -> AlignmentData:
    return AlignmentData(
        latent_means=torch.randn((2 * PAIRS, 4, 16, 16), generator=torch.Generator().manual_seed(0)),
        winner=torch.arange(PAIRS),
        loser=torch.arange(PAIRS, 2 * PAIRS),
        caption=torch.zeros(PAIRS, dtype=torch.int64),
        weight=torch.ones(PAIRS),
        population=torch.zeros(PAIRS, dtype=torch.int64),
        **model.encode_captions(["a photo of a judge"]),
    )


def trained(tiny: Path, rank: int, passes: PassOptions, **changes: Any) -> list[StepRecord]:
    model = loaded(tiny)
    values: dict[str, Any] = {"steps": 2, "pairs_per_step": PAIRS, "beta": 5000.0, **changes}
    settings = AlignmentSettings(**values, mixed_precision=passes.mixed_precision)
    with own_graphs(passes.compiled):
        policy = make_policy(model, lora_rank=rank, seed=0, passes=passes)
        return list(train(policy, data_of(model), settings))


def gradients(tiny: Path, rank: int, *, compiled: bool) -> torch.Tensor:
    model = loaded(tiny)
    passes = PassOptions(gradient_checkpointing=True, compiled=compiled)
    policy = make_policy(model, lora_rank=rank, seed=0, passes=passes)
    rows = model.encode_prompts(["a photo of a judge"])
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    predicted = policy.denoiser(noisy, torch.tensor([500]), rows.context.float(), rows.pooled.float())
    predicted.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in policy.denoiser.parameters() if p.grad is not None])


@pytest.mark.parametrize("rank", [0, 2])
def test_compiled_blocks_are_whole_graphs_with_the_same_gradient(
    tiny: Path, rank: int, traced: Callable[[], int]
) -> None:
    expected = gradients(tiny, rank, compiled=False)
    assert traced() == 0
    torch.testing.assert_close(gradients(tiny, rank, compiled=True), expected, rtol=1e-4, atol=1e-6)
    assert traced() > 0


@pytest.mark.parametrize("rank", [0, 16])
def test_policy_and_reference_are_one_graph_for_each_size_of_a_pass(
    tiny: Path, rank: int, traced: Callable[[], int]
) -> None:
    """Three, three and two pairs in all three passes. Of other graphs the rounding in bfloat16 would be another."""
    passes = PassOptions(mixed_precision=True, compiled=True)
    found = trained(tiny, rank, passes, micro_batch=3)
    # Under an adapter, what enters the first block needs no gradient.
    assert traced() == (4 if rank else 2)
    assert (found[0].winner_margin, found[0].loser_margin) == (0, 0)
    assert found[0].loss == pytest.approx(math.log(2), rel=1e-6)
    expected = trained(tiny, rank, PassOptions(mixed_precision=True), micro_batch=3)
    assert found[1].loss == pytest.approx(expected[1].loss, rel=1e-2)


def test_sampler_and_trainer_take_turns_in_one_process(tiny: Path, traced: Callable[[], int]) -> None:
    requests = [ImageRequest(f"p/{n}", "p", "a photo of a judge", n, n) for n in range(2)]
    for _ in range(2):
        before = traced()
        list(sample_images(loaded(tiny), requests, DRAWN))
        sampled = traced()
        trained(tiny, 16, PassOptions(compiled=True), micro_batch=3)
        assert before < sampled < traced(), "each round is compiled, in both of its stages"
