"""Several processes train as one does. The processes here are real, with gloo; the denoiser is small, so that they
start and end within seconds."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from two_ranks import (
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    SETTINGS,
    VARIANTS,
    CaptionDenoiser,
    data_of,
    join_ranks,
    policy_of,
    run_two,
)

from popalign_core.alignment.adapters import FullPolicy, copy_weights
from popalign_core.alignment.cache import PairBatch, Share, draw_batch
from popalign_core.alignment.checkpoint import begin
from popalign_core.alignment.objective import batch_baseline, popalign_loss
from popalign_core.alignment.passes import measure_errors
from popalign_core.alignment.processes import TEXT_BYTES, Processes, require_shares
from popalign_core.alignment.trainer import StepRecord, train
from popalign_core.errors import InvalidInput, LostProcess


def trained(variant: str, accelerator: Any = None) -> tuple[list[StepRecord], dict[str, Tensor]]:
    """Records, and the weights that would be kept."""
    settings, policy = VARIANTS[variant], policy_of(variant)
    state = begin(policy, settings)
    records = list(train(policy, data_of(), settings, state=state, accelerator=accelerator))
    return records, state.average or copy_weights(policy.denoiser)


def run_rank(rank: int, world: int, folder: str) -> None:
    """One of the processes: trains every variant, then tries what cannot work."""
    accelerator = join_ranks(rank, world, folder)
    found: dict[str, Any] = {}
    for name in VARIANTS:
        records, weights = trained(name, accelerator)
        found[name] = {
            "records": [asdict(record) for record in records],
            "weights": {key: value.tolist() for key, value in weights.items()},
        }
    processes = Processes(accelerator)
    found["texts"] = processes.gather_texts(f"of rank {rank}: ü")
    found["longest"] = [len(text) for text in processes.gather_texts("x" * (TEXT_BYTES + 5) if rank else "")]
    try:
        next(
            train(
                FullPolicy(CaptionDenoiser()), data_of(), replace(SETTINGS, pairs_per_step=1), accelerator=accelerator
            )
        )
    except InvalidInput as error:
        found["refused"] = str(error)
    if rank == 1:
        (Path(folder) / "rank1.json").write_text(json.dumps(found))
        os._exit(0)
    try:
        while True:
            processes.gather_texts("still there?")
    except LostProcess as error:
        found["lost"] = str(error)
    (Path(folder) / "rank0.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two(run_rank, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_take_the_steps_of_one(two_processes: list[dict[str, Any]], name: str) -> None:
    expected, weights = trained(name)
    start = copy_weights(policy_of(name).denoiser)
    for found in two_processes:
        got = [StepRecord(**record) for record in found[name]["records"]]
        assert [record.step for record in got] == list(range(1, VARIANTS[name].steps + 1))
        for one, two in zip(expected, got, strict=True):
            assert two.loss == pytest.approx(one.loss, abs=LOSS_TOLERANCE)
            assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=NORM_TOLERANCE)
            assert two.implicit_accuracy == pytest.approx(one.implicit_accuracy, abs=1e-6)
            assert two.winner_margin == pytest.approx(one.winner_margin, abs=LOSS_TOLERANCE / 20)
            assert (two.pairs, two.learning_rate) == (one.pairs, one.learning_rate)
        for key, value in weights.items():
            moved = (value - start[key]).norm()
            assert moved > 0
            assert (torch.tensor(found[name]["weights"][key]) - value).norm() < 1e-3 * moved
    # Both took the same steps to the last bit: nothing would bring them together again.
    assert two_processes[0][name]["weights"] == two_processes[1][name]["weights"]


def test_the_baseline_is_that_of_all_processes(two_processes: list[dict[str, Any]]) -> None:
    """Of each process's own baseline, the loss would be another one by far more than rounding."""
    state = begin(FullPolicy(CaptionDenoiser()), SETTINGS)
    own: list[float] = []
    for _ in range(SETTINGS.steps):
        parts: list[PairBatch] = [
            draw_batch(data_of(), SETTINGS, state.step, 100, share=Share(rank, 2)) for rank in range(2)
        ]
        with torch.no_grad():
            measured = [measure_errors(state.policy, part)[0] for part in parts]
        losses = [
            popalign_loss(errors, SETTINGS.beta, part.labels.weights, batch_baseline(errors)).item() * len(part.pairs)
            for errors, part in zip(measured, parts, strict=True)
        ]
        own.append(sum(losses) / parts[0].global_pairs)
        next(train(state.policy, data_of(), SETTINGS, state=state))
    got = [record["loss"] for record in two_processes[0]["popalign"]["records"]]
    assert abs(own[0] - got[0]) < LOSS_TOLERANCE, "at the reference every baseline is 0"
    assert max(abs(wrong - right) for wrong, right in zip(own, got, strict=True)) > 100 * LOSS_TOLERANCE


def test_processes_hear_each_other_and_of_one_that_is_gone(two_processes: list[dict[str, Any]]) -> None:
    first, second = two_processes
    assert first["texts"] == second["texts"] == ["of rank 0: ü", "of rank 1: ü"]
    assert first["longest"] == [0, TEXT_BYTES]
    assert "a step has 1 pairs for 2 processes" in first["refused"]
    assert first["refused"] == second["refused"]
    assert "another training process does not answer" in first["lost"]
    assert issubclass(LostProcess, OSError)


def test_one_process_hears_itself() -> None:
    assert Processes().gather_texts("alone") == ["alone"]
    assert Processes().is_first


@pytest.mark.parametrize("processes", [2, 3])
def test_whatever_is_drawn_is_drawn_for_the_whole_step(processes: int) -> None:
    """Noise, timesteps, dropped and mixed captions, posteriors, named images: the parts make up the whole."""
    settings = VARIANTS["all"]
    for step in range(5):
        whole = draw_batch(data_of(), settings, step, 100)
        parts = [draw_batch(data_of(), settings, step, 100, share=Share(rank, processes)) for rank in range(processes)]
        order = torch.cat([torch.arange(7)[rank::processes] for rank in range(processes)])
        for name in "winner_latents loser_latents noise timesteps prompt_embeddings pooled pairs".split():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)[order])
        assert torch.equal(torch.cat([part.labels.weights for part in parts]), whole.labels.weights[order])
        for name in ("latents", "prompt_embeddings", "pooled"):
            named = torch.cat([getattr(part.named, name) for part in parts])
            assert torch.equal(named, getattr(whole.named, name)[order])


def test_a_population_that_processes_would_divide_is_refused() -> None:
    exact = VARIANTS["exact"]
    require_shares(data_of(), exact, 0, Share(0, 2))
    # Four of six populations: the second step has the end of one order and the beginning of the next.
    uneven = replace(exact, pairs_per_step=24)
    require_shares(data_of(), uneven, 0, Share())
    for rank in range(2):
        with pytest.raises(InvalidInput, match=r"a step's 4 populations must be a divisor of all 6.*one process"):
            require_shares(data_of(), replace(uneven, steps=50), 0, Share(rank, 2))
    with pytest.raises(InvalidInput, match="a step has 1 populations for 2 processes"):
        require_shares(data_of(), replace(exact, pairs_per_step=1), 0, Share(1, 2))
