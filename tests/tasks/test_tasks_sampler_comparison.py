"""Two runs whose labels are written down: every number of the comparison, by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from prefect.logging import disable_run_logger

from flows.sampler_comparison import _markdown
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput
from popalign_core.presets import preset
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.tables import read_artifact, write_rows
from tasks.expansion import write_prompts
from tasks.run import BASE, drawing_source, model_source, reference, sampling_settings
from tasks.sampler_comparison import HEADINGS, _differences, both_configs, compare_samplers, summarize_samplers
from tasks.samplers import record_sampler

EXACT, FAST = "x-exact", "x-fast"


@pytest.fixture
def pair(written_run):
    """Two runs beside one another, with two prompts of eight images each; the fast one's seeds may be its own."""
    exact, fast = both_configs(with_settings(written_run.config, {"sampling.approximate.steps": "1"}))
    runs = (replace(written_run, run_id=EXACT, config=exact), replace(written_run, run_id=FAST, config=fast))
    for run in runs:
        with disable_run_logger():
            write_prompts.fn(run.workspace, run.run_id, run.config.expansion)
    return runs


def labelled(pair, exact, fast, prints: tuple[str, str] = ("a", "b")) -> None:
    for run, label, fingerprint in zip(pair, (exact, fast), prints, strict=True):
        samples = run.commit_samples(BASE, "evaluation", fingerprint)
        run.commit_labels(samples, "judge", label)
        run.commit_labels(samples, "builder", lambda row: "man" if row["sample_index"] % 2 else "woman")


def compared(pair) -> ArtifactRef:
    exact, fast = pair
    with disable_run_logger():
        return compare_samplers.fn(exact.workspace, EXACT, FAST, exact.config, fast.config)


def six_men(row) -> str:
    return "man" if row["sample_index"] < 6 else "woman"


def three_men_and_an_unknown(row) -> str | None:
    return None if row["sample_index"] == 7 else "man" if row["sample_index"] < 3 else "woman"


def test_every_number_by_hand(pair) -> None:
    labelled(pair, six_men, three_men_and_an_unknown)
    rows = {
        (row["role"], row["measure"], row["group"]): row for row in read_artifact(compared(pair), "sampler_comparisons")
    }
    assert len(rows) == 2 * 4  # one axis: two groups, unknown, disparity
    man = rows["judge", "share", "man"]
    assert (man["run_id"], man["exact_run_id"], man["model_id"], man["split"]) == (FAST, EXACT, BASE, "eval")
    assert (man["exact_fingerprint"], man["fast_fingerprint"]) == ("a", "b")
    assert (man["n"], man["unknown"], man["lost"], man["gained"]) == (14, 2, 6, 0)
    assert man["exact"] == pytest.approx(12 / 14)
    assert man["fast"] == pytest.approx(6 / 14)
    assert man["difference"] == pytest.approx(-6 / 14)
    assert man["p_value"] == pytest.approx(2 / 2**6)
    unknown = rows["judge", "unknown", None]
    assert (unknown["n"], unknown["exact"], unknown["fast"]) == (16, 0, 2 / 16)
    assert rows["judge", "l2", None]["exact"] == pytest.approx(2**0.5 * 0.25)
    assert rows["builder", "share", "man"]["flip_rate"] == 0
    assert "emoji-clip" in rows["builder", "share", "man"]["classifier_id"]


def test_other_seeds_are_refused(pair) -> None:
    exact, fast = pair
    pair = exact, replace(fast, config=fast.config.model_copy(update={"seed": 5}))
    labelled(pair, six_men, six_men)
    with pytest.raises(InvalidInput, match="no pairs"):
        compared(pair)


def test_the_same_sampler_twice_is_refused(pair) -> None:
    labelled(pair, six_men, six_men, prints=("a", "a"))
    with pytest.raises(InvalidInput, match="no pairs"):
        compared(pair)


def timing(run, seconds: float, device: str) -> None:
    ref = reference(run.workspace, run.run_id, "timings", f"samples-{device}")
    row = {"run_id": run.run_id, "stage": "sampling", "key": "samples/base.evaluation.00000", "seconds": seconds}
    with staged_artifact(ref) as folder:
        write_rows(folder, "timings", [{**row, "items": 16, "device": device}])


FACTS = {"model": "m", "steps": "2", "batch_size": "8", "guidance_scale": "5.0", "device": "a card", "torch": "2"}


def summarized(pair, exact_facts: dict[str, str] | None, fast_facts: dict[str, str] | None):
    """Two runs drawn by samplers with these facts, of 8 and 2 seconds."""
    exact, fast = pair
    prints = [
        record_sampler(run.workspace, run.run_id, facts) if facts else run.run_id
        for run, facts in zip(pair, (exact_facts, fast_facts), strict=True)
    ]
    labelled(pair, six_men, six_men, prints=(prints[0], prints[1]))
    compared(pair)
    timing(exact, 8.0, "cuda")
    timing(fast, 2.0, "cuda")
    with disable_run_logger():
        return summarize_samplers.fn(fast.workspace, EXACT, FAST, fast.config, 0.05)


def test_the_summary_names_speed_and_verdict_and_shows_pairs(pair) -> None:
    summary = summarized(pair, FACTS, FACTS | {"steps": "1", "model": "m-fp8"})
    assert (summary.speed, summary.differences) == (4.0, "")
    assert "exact 0.5 s an image (16 images, a card)" in summary.speed_source
    assert summary.movement == "open"  # not one flip, and 16 images are too few to say anything
    assert summary.approximations == ("steps: 1 instead of 2",)
    assert [len(lines) for lines in summary.lines.values()] == [4, 4]
    assert {len(line) for lines in summary.lines.values() for line in lines} == {len(HEADINGS)}
    with Image.open(Path(summary.sheet)) as sheet:
        assert sheet.size == (10 * 66, 4 * 66)  # two prompts, exact above fast


@pytest.mark.parametrize(
    ("fast", "speed", "differences"),
    [
        ({"batch_size": "4", "torch": "3"}, 4.0, "batch_size: 8, 4; torch: 2, 3"),
        ({"device": "another card"}, None, "device: a card, another card"),
        (None, None, "sampler: not recorded"),
    ],
)
def test_what_differs_beside_the_approximation_is_told(
    pair, fast: dict[str, str] | None, speed: float | None, differences: str
) -> None:
    summary = summarized(pair, FACTS, fast and FACTS | {"steps": "1"} | fast)
    assert (summary.speed, summary.differences) == (speed, differences)
    assert differences in _markdown(summary)


def test_what_a_distilled_model_changes_by_itself_is_the_approximation(pair) -> None:
    config = with_settings(
        pair[1].config, {"sampling.approximate.distilled_lora": "lora", "sampling.approximate.distilled_guidance": "1"}
    )
    fast = FACTS | {"steps": "1", "guidance_scale": "1", "scheduler": "lcm", "distilled_lora": "x"}
    exact = FACTS | {"scheduler": "dpm++", "distilled_lora": ""}
    switches = {"skip_empty_attention": "True"}, {"skip_empty_attention": "False"}
    sides = {EXACT: [exact | switches[0]], FAST: [fast | switches[1]]}
    assert _differences(sides, config) == ""
    assert _differences({**sides, EXACT: [exact | switches[1]]}, pair[1].config) != ""


def test_what_is_exact_and_what_is_fast() -> None:
    with pytest.raises(InvalidInput, match="nothing to compare"):
        both_configs(preset("emoji"))
    asked = with_settings(preset("emoji"), {"sampling.approximate.cache_every": "2"})
    exact, fast = both_configs(asked)
    assert exact == preset("emoji")
    assert fast.sampling == asked.sampling


def test_only_the_sampler_loads_the_approximate_model(tmp_path: Path) -> None:
    values = {"fp8_weights": "true", "steps": "4", "distilled_lora": "workspace:lora", "distilled_guidance": "1.5"}
    config: RunConfig = with_settings(
        preset("emoji"), {f"sampling.approximate.{name}": value for name, value in values.items()}
    )
    source = drawing_source(str(tmp_path), "run", config, BASE)
    assert (source.distilled_lora, source.fp8_weights) == (str(tmp_path / "lora"), True)
    assert model_source(str(tmp_path), "run", config, BASE) == replace(source, distilled_lora=None, fp8_weights=False)
    settings = sampling_settings(config.sampling)
    assert (settings.scheduler, settings.steps, settings.guidance_scale) == ("lcm", 4, 1.5)
