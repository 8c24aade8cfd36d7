"""The start of a run, and its model in memory."""

import weakref

import pytest
import torch

from popalign_core.models.sdxl import ModelSource, load_sdxl
from tasks import run
from tasks.run import OneModel, record_run, reference


def test_a_start_removes_what_a_crash_left(written_run) -> None:
    """Also the timing of work that is committed, which nobody writes again."""
    half = reference(written_run.workspace, written_run.run_id, "timings", "attributes-shard")
    half.folder.mkdir(parents=True)
    (half.folder / "timings.parquet").write_bytes(b"half")
    for _ in range(2):
        record_run(written_run.workspace, written_run.run_id, "emoji", written_run.config)
        assert not half.folder.exists()


def test_the_model_before_leaves_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Circular:
        def __init__(self) -> None:
            self.itself = self

    known: list[weakref.ref[Circular]] = []

    def load(*_: object, **__: object) -> Circular:
        assert [seen() for seen in known] == [None] * len(known)
        model = Circular()
        known.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "load_model", load)
    loaded = OneModel()
    sources = [ModelSource("a"), ModelSource("a"), ModelSource("b"), ModelSource("a")]
    for source in sources:
        loaded(source, "cpu", "float32")
    assert len(known) == 3
    loaded.cache_clear()
    assert known[-1]() is None


def test_what_the_model_takes_is_counted_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, model = OneModel(), load_sdxl(ModelSource("emoji"), device="cpu")
    assert loaded.bytes_on(torch.device("cpu")) == 0
    monkeypatch.setattr(run, "load_model", lambda *_, **__: model)
    loaded(ModelSource("emoji"), "cpu", "float32")
    parts = [getattr(model.pipeline, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
    assert loaded.bytes_on(torch.device("cpu")) == 4 * sum(p.numel() for part in parts for p in part.parameters())
    assert loaded.bytes_on(torch.device("meta")) == 0
