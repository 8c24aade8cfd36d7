"""Rounds of the policy gradient: no populations, a validation after each, trained from the run's prompts."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from flows import alignment, training
from flows.alignment import _rounds
from popalign_core.config import with_settings
from popalign_core.execution import Execution
from popalign_core.presets import preset


def test_rounds_draw_validation_alone_and_stop_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, str]] = []
    trained: list[tuple[str, int, int]] = []

    def refused(*_: Any) -> None:
        pytest.fail("a policy gradient has no populations")

    def trains(*arguments: Any) -> str:
        trained.append(arguments[-1])
        return f"round-{arguments[-1][1]}"

    def verdict(_workspace: str, _run: str, _config: Any, models: list[str]) -> SimpleNamespace:
        return SimpleNamespace(reason="turned" if len(models) == 3 else None)

    monkeypatch.setattr(alignment, "draw_and_classify", lambda _run, *what: measured.append(what[:2]))
    monkeypatch.setattr(alignment, "populations", refused)
    monkeypatch.setattr(alignment, "write_counterfactuals", refused)
    monkeypatch.setattr(alignment, "validation_verdict", verdict)
    monkeypatch.setattr(alignment, "record_validations", lambda *_: "kept")
    monkeypatch.setattr(alignment, "_train", trains)
    config = with_settings(preset("emoji"), {"alignment.objective": "reward"})
    with disable_run_logger():
        assert _rounds("run", "", config, Execution()) == "kept"
    assert trained == [("base", 1, 1), ("round-1", 2, 2)]
    assert measured == [("base", "validation"), ("round-1", "validation"), ("round-2", "validation")]


def test_training_starts_from_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    config = with_settings(preset("emoji"), {"alignment.objective": "reward"})
    monkeypatch.setattr(training, "run_config", lambda *_: config)
    monkeypatch.setattr(training, "reference", lambda *parts: parts)
    monkeypatch.setattr(training, "missing_models", lambda *_: ["it"])
    monkeypatch.setattr(training, "claim_each", lambda missing: missing)
    monkeypatch.setattr(training, "expect", lambda *_: None)
    monkeypatch.setattr(training, "align_round", lambda preferences, *_: given.append(preferences))
    monkeypatch.setattr(training, "holding", lambda *_: nullcontext())
    monkeypatch.setattr(training, "resolved", lambda execution: execution)
    training.training.fn("run", "base", 1, 1, "")
    assert given == [("", "run", "prompts", "all")]
