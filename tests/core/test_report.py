"""The page: its structure, its numbers against the rows, hostile text, and every state that a run can be in."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import report_rows as made_up
from report_page import Page

from popalign_core.config import with_settings
from popalign_core.errors import InvalidInput
from popalign_core.presets import preset
from popalign_core.reporting.contact_sheet import contact_sheet
from popalign_core.reporting.course import StageCost, all_gpu_hours, training_curves
from popalign_core.reporting.formatting import as_text, axis_label
from popalign_core.reporting.report import render_report
from popalign_core.reporting.report_data import ContactSheet, matching

SECTIONS = [
    "headline",
    "samples",
    "prompts",
    "shares",
    "classifiers",
    "scores",
    "groups",
    "training",
    "populations",
    "decision",
    "reading",
    "cost",
    "configuration",
    "queries",
]
STYLES = ("plain", "share", "count", "seconds", "ratio", "significant")
STATES = {
    "good": made_up.good_run,
    "held": made_up.held_run,
    "half": made_up.half_run,
    "failed": made_up.failed_run,
    "empty group": made_up.empty_group_run,
    "bare": made_up.bare_run,
}


@pytest.fixture(scope="module")
def good():
    data = made_up.good_run()
    return data, Page(render_report(data))


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_one_whole_page(state):
    page = Page(render_report(STATES[state]()))
    assert [name for name in page.sections if name != "unfinished"] == SECTIONS
    assert len(page.tags("h1")) == 1
    ids = page.attribute("id")
    assert len(ids) == len(set(ids))
    targets = [href.removeprefix("#") for href in page.attribute("href") if href.startswith("#")]
    assert set(targets) <= set(ids)
    assert set(SECTIONS) <= set(targets)
    assert page.text.count("not a number") == 0


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_fetched_and_nothing_runs(state):
    page = Page(render_report(STATES[state]()))
    assert page.tags("script", "iframe", "object", "embed", "base", "form") == []
    fetched = [
        value for name in ("src", "href", "srcset", "data", "poster", "action") for value in page.attribute(name)
    ]
    assert [value for value in fetched if not value.startswith(("#", "data:"))] == []
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    html = render_report(STATES[state]())
    assert re.findall(r"@import|url\(|https?://", html) == []


@pytest.mark.parametrize("state", STATES)
def test_what_is_shown_is_the_exact_value_rounded(state):
    page = Page(render_report(STATES[state]()))
    assert (len(page.values) > 300) == (state != "bare")
    for exact, shown in page.values:
        assert shown in {as_text(exact, style) for style in STYLES}, (exact, shown)


def test_the_page_promises_nothing():
    text = Page(render_report(made_up.good_run())).text.lower()
    assert re.findall(r"\b(unbiased|debias\w*|fair\w*|bias)\b", text) == []


def test_the_same_rows_give_the_same_page():
    assert render_report(made_up.good_run()) == render_report(made_up.good_run())


def test_headline_numbers_are_those_of_the_rows(good):
    data, page = good
    rows = {row[0].text: row for row in page.sections["headline"].rows}
    means = matching(data.disparities, split="eval", level="mean", measure="l2")
    assert len(means) == 6
    for row in means:
        cells = rows[axis_label(row["axis"])]
        cell = cells[1] if row["model_id"] == data.base_model_id else cells[2]
        assert [value for value, _ in cell.values] == [row["value"], row["low"], row["high"]]
        assert cells[4].values[0][0] == row["floor"]
        assert [value for value, _ in cells[5].values] == [384, 8]
        assert [value for value, _ in cells[6].values] == [16 / 384, 16 / 384]
    for pair in matching(data.comparisons, split="eval"):
        cell = rows[axis_label(pair["axis"])][3]
        assert [value for value, _ in cell.values] == [pair["ratio"], pair["ratio_low"], pair["ratio_high"]]
    assert [shown for _, shown in rows["Perceived gender"][7].values] == ["99.1%", "98.4%"]


def test_without_a_given_ratio_the_plain_quotient_stands_without_an_interval(good):
    data, _ = good
    page = Page(render_report(replace(data, comparisons=[])))
    for row in page.sections["headline"].rows[1:4]:
        before, after, ratio = (row[place].values for place in (1, 2, 3))
        assert [value for value, _ in ratio] == [after[0][0] / before[0][0]]


def test_prompt_numbers_are_those_of_the_rows(good):
    data, page = good
    texts = {row["prompt_id"]: row["text"] for row in data.prompts}
    shown = [row for row in page.sections["prompts"].rows if len(row) == 4 and row[2].values]
    expected = {
        (texts[row["prompt_id"]], row["model_id"], row["value"], row["low"], row["high"])
        for row in matching(data.disparities, level="prompt")
    }
    found = set()
    for row in shown:
        for place, model in ((2, data.base_model_id), (3, data.model_id)):
            found.add((row[0].text.strip(), model, *(value for value, _ in row[place].values)))
    assert found == expected


def test_group_shares_and_counts_are_those_of_the_rows(good):
    data, page = good
    text = re.sub(r"\s+", " ", page.sections["shares"].text)
    values = [value for row in page.sections["shares"].rows for cell in row for value, _ in cell.values]
    pooled = matching(data.group_shares, prompt_id=None, split="eval")
    assert len(pooled) == 2 * (2 + 5 + 10)
    for row in pooled:
        assert row["share"] in values
        if "&" not in row["axis"]:
            assert f"{row['count']} of {row['n']}" in text
            assert {row["low"], row["high"]} <= set(values)


def test_scores_models_checks_and_costs_are_those_of_the_rows(good):
    data, page = good
    scores = [value for row in page.sections["scores"].rows for cell in row for value, _ in cell.values]
    assert {row[name] for row in data.scores for name in ("value", "low", "high")} <= set(scores)
    training = [value for row in page.sections["training"].rows for cell in row for value, _ in cell.values]
    assert {row["natural_beta"] for row in data.models} <= set(training)
    ends = {row["loss"] for row in data.training_steps if row["step"] in (1, 25)}
    assert ends <= set(training)
    assert [row[8].text for row in page.sections["training"].rows[1:]] == ["no", "no", "kept"]
    checks = page.sections["decision"].rows[1:]
    assert [row[2].values[0][0] for row in checks] == [check["value"] for check in data.decision["checks"]]
    assert [row[3].values[0][0] for row in checks] == [check["threshold"] for check in data.decision["checks"]]
    cost = {row[0].text: [value for cell in row for value, _ in cell.values] for row in page.sections["cost"].rows}
    assert cost["Sampling"] == [81.75, 512, 512 / 81.75]
    assert cost["All"] == [41.25 + 40.5 + 6.125 + 69.75 + 11.5]
    assert [row[-1].text.strip() for row in page.sections["cost"].rows[1:]] == ["\u2013"] * 5


def test_agreement_and_reasons_of_unknowns_are_those_of_the_rows(good):
    data, page = good
    rows = page.sections["classifiers"].rows
    shown = [value for row in rows for cell in row for value, _ in cell.values]
    assert {row[name] for row in data.agreements for name in ("value", "low", "high")} <= set(shown)
    reasons = {row["share"] for row in data.status_counts if row["status"] not in ("ok", "no_face")}
    assert reasons <= set(shown)
    names = [row[0].text for row in rows]
    assert any("low confidence" in name for name in names)
    assert not any("no face" in name for name in names)  # that happened in no image


def test_populations_are_counted_once(good):
    data, page = good
    rows = {row[0].text.split(" 6 prompts")[0]: row[1] for row in page.sections["populations"].rows if len(row) == 2}
    tones = [
        row
        for row in matching(data.populations, round=1, side="dispreferred", axis=made_up.TONE)
        if row["group"] == "light"
    ]
    # The last table is that of skin tone.
    counts = [value for value, _ in rows["Round 1, dispreferred"].values]
    assert counts[0] == sum(row["count"] for row in tones)
    assert sum(counts[:-1]) == 6 * 20
    assert counts[-1] == 6


HOSTILE = "\"'><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>{{ 7*7 }}{% raw %}\u202e&amp;"


def test_hostile_text_stays_text():
    good = made_up.good_run()
    said = [[HOSTILE] * 8] * 6
    hostile_sheet = replace(
        good.sheets[0], title=HOSTILE, row_labels=[HOSTILE] * 6, before_perceived=said, after_perceived=said
    )
    data = replace(
        good,
        run_id=HOSTILE,
        created=HOSTILE,
        builder_id=HOSTILE,
        config=good.config | {HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        prompts=[row | {"text": HOSTILE} for row in good.prompts],
        refusals=[row | {"reason": HOSTILE, "detail": HOSTILE} for row in good.refusals],
        timings=[row | {"stage": HOSTILE, "device": HOSTILE} for row in good.timings],
        yields=[row | {"group": HOSTILE} for row in good.yields],
        decision=made_up.decision() | {"reason": HOSTILE, "verdict": HOSTILE},
        sheets=[hostile_sheet],
    )
    html = render_report(data)
    page = Page(html)
    ordinary = Page(render_report(good))
    assert [tag for tag, _ in page.elements].count("script") == 0
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in ordinary.elements}
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert all(image["src"].startswith("data:image/webp;base64,") for image in page.tags("img"))
    assert page.text.count(HOSTILE) > 40
    assert sum(HOSTILE in title for title in page.attribute("title")) == 96


def test_what_is_missing_is_named():
    page = Page(render_report(made_up.half_run()))
    missing = page.sections["unfinished"].text
    assert "round-3 has not been measured" in missing
    assert "base has not been measured" not in missing
    assert "no training step" in missing
    assert "Not finished" in page.text
    assert "not sampled yet" in page.sections["samples"].text
    assert "Not finished" in page.sections["decision"].text
    assert "unfinished" not in Page(render_report(made_up.good_run())).sections


def test_every_part_of_an_empty_run_says_so():
    page = Page(render_report(made_up.bare_run()))
    finished = {"reading", "configuration", "queries", "unfinished"}
    assert {name for name, section in page.sections.items() if "Not finished" in section.text} == set(
        SECTIONS
    ) - finished


def test_a_failure_comes_first():
    page = Page(render_report(made_up.failed_run()))
    assert (
        page.text.index("Failed") < page.text.index("the loss became nan at step 12") < page.text.index("Still missing")
    )


def test_a_held_model_shows_why():
    data = made_up.held_run()
    page = Page(render_report(data))
    assert page.text.index("Hold") < page.text.index(data.decision["reason"]) < page.text.index("Held-out")
    results = {row[0].text: row[1].text for row in page.sections["decision"].rows[1:]}
    assert results["Obedience drop"] == "not passed"
    assert results["CLIP score drop"] == "passed"


def test_an_empty_group_is_shown_as_zero_and_named():
    page = Page(render_report(made_up.empty_group_run()))
    assert "No image was perceived as dark before." in page.sections["shares"].text
    rows = {row[0].text.split("\n")[0]: row for row in page.sections["shares"].rows}
    row = next(row for label, row in rows.items() if label.startswith("5. dark"))
    assert row[2].values[0] == (0.0, "0.0%")


def test_ten_thousand_prompts_show_the_thirty_largest_changes():
    data = made_up.many_prompts_run()
    html = render_report(data)
    page = Page(html)
    assert "The 30 prompts with the largest change of 10,000 are shown." in page.sections["prompts"].text
    shown = [row for row in page.sections["prompts"].rows if row[2].values]
    assert len(shown) == 30
    by_model = {
        model: {row["prompt_id"]: row["value"] for row in matching(data.disparities, model_id=model)}
        for model in (made_up.BASE, made_up.MODEL)
    }
    moves = sorted(
        (by_model[made_up.MODEL][prompt] - before for prompt, before in by_model[made_up.BASE].items()), key=abs
    )
    assert [row[3].values[0][0] - row[2].values[0][0] for row in shown] == sorted(moves[-30:])
    fell = sum(move < 0 for move in moves)
    assert f"fell for {fell:,} of 10,000 prompts" in page.sections["prompts"].text
    assert len(html) < 200_000


def test_the_page_stays_under_five_megabytes():
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    sheet = contact_sheet([list(noise)])
    sheets = [ContactSheet(f"sheet {place}", sheet, sheet, ["a photo"]) for place in range(40)]
    html = render_report(replace(made_up.good_run(), sheets=sheets))
    assert 4_400_000 < len(html.encode()) < 5_000_000
    assert "Left out to keep this page small: 1 more." in html


@pytest.mark.parametrize(
    ("device", "hours"),
    [("cpu", None), ("2 x cpu", None), ("cuda", 0.5), ("4 x cuda", 2.0), ("mps", 0.5), ("16 x cuda", 8.0)],
)
def test_gpu_hours_count_every_process_of_a_training_and_no_cpu(device, hours):
    cost = StageCost("alignment", device, seconds=1800.0, items=1)
    assert cost.gpu_hours == hours
    assert all_gpu_hours([cost, StageCost("assessment", "cpu", 3600.0, 1)]) == hours


def test_gpu_hours_stand_in_the_table(good):
    data, _ = good
    devices = {"sampling": "cuda", "alignment": "2 x cuda"}
    timings = [row | {"device": devices.get(row["stage"], "cpu")} for row in data.timings]
    rows = Page(render_report(replace(data, timings=timings))).sections["cost"].rows
    found = {row[0].text: [value for value, _ in row[-1].values] for row in rows[1:]}
    sampling, alignment = 81.75 / 3600, 2 * 69.75 / 3600
    assert found == {
        "Sampling": [sampling],
        "Classification": [],
        "Alignment": [alignment],
        "Assessment": [],
        "All": [sampling + alignment],
    }


def test_every_picture_says_what_is_perceived_in_it(good):
    data, page = good
    (sheet,) = data.sheets
    spans = [span for span in page.tags("span") if span.get("role") == "img"]
    expected = [
        f"{side}, picture {number}: {text}"
        for before, after in zip(sheet.before_perceived, sheet.after_perceived, strict=True)
        for side, row in ((f"Before ({made_up.BASE})", before), (f"After ({made_up.MODEL})", after))
        for number, text in enumerate(row, 1)
    ]
    assert [span["title"] for span in spans] == [span["aria-label"] for span in spans] == expected
    assert all(text in page.sections["samples"].text for row in sheet.after_perceived for text in row)
    half = Page(render_report(made_up.half_run()))
    assert not any((title or "").startswith("After (") for title in half.attribute("title"))


def test_rows_of_other_judges_and_models_are_passed_over(good):
    data, _ = good
    others = [
        row | changed | {"value": 0.123456}
        for row in data.disparities
        if row["split"] == "eval"
        for changed in ({"judge_id": "another"}, {"model_id": "another"})
    ]
    assert render_report(replace(data, disparities=[*data.disparities, *others])) == render_report(data)


def test_suites_and_kinds_are_told_apart_where_there_are_such_columns(good):
    data, _ = good
    rows = matching(data.disparities, split="eval")
    activities = [row | {"suite": "activities", "kind": "neutral", "value": 0.25} for row in rows]
    occupations = [row | {"suite": "occupations", "kind": "neutral"} for row in rows]
    specific = [row | {"suite": "occupations", "kind": "specific", "value": 0.123456} for row in rows]
    page = Page(render_report(replace(data, disparities=[*occupations, *activities, *specific])))
    assert 0.123456 not in [value for value, _ in page.values]
    labels = [row[0].text for row in page.sections["headline"].rows]
    assert "Perceived gender, occupations" in labels
    assert "Perceived gender, activities" in labels


def test_the_emoji_model_is_explained_only_when_it_is_used(good):
    data, page = good
    assert "skew on purpose" in page.sections["reading"].text
    other = Page(render_report(replace(data, config=data.config | {"model": "some/checkpoint"})))
    assert "skew on purpose" not in other.sections["reading"].text


def test_what_is_no_number_counts_as_not_measured(good):
    data, _ = good
    nothing = {"value": math.nan, "low": None, "high": math.nan, "threshold": math.nan}
    decision = made_up.decision()
    decision["checks"] = [check | nothing for check in decision["checks"]]
    scores = [row | {"value": math.nan, "low": math.nan, "high": math.nan} for row in data.scores]
    page = Page(render_report(replace(data, decision=decision, scores=scores)))
    assert [cell.text for row in page.sections["decision"].rows[1:] for cell in row[2:]] == ["not measured"] * 8
    assert [cell.text for row in page.sections["scores"].rows[1:4] for cell in row[2:]] == ["not measured"] * 6
    assert "nan" not in [shown for _, shown in page.values]


def test_a_model_is_not_compared_with_itself(good):
    data, _ = good
    with pytest.raises(InvalidInput, match="same model"):
        replace(data, model_id=data.base_model_id)


def test_the_spread_over_training_seeds_is_told_and_repeated_trainings_draw_no_curve():
    data = made_up.good_run()
    repeated = {**data.models[-1], "model_id": "round-3-seed-1", "repeats_model_id": "round-3"}
    steps = [{**row, "model_id": "round-3-seed-1", "loss": 77.0} for row in data.training_steps[-3:]]
    seeds = [
        {"run_id": data.run_id, "model_id": model, "judge_id": data.judge_id, "seed_index": index, "value": value}
        | {"axis": "perceived_gender", "n": 600, "unknown": 0}
        for index, (model, value) in enumerate((("round-3", 0.1875), ("round-3-seed-1", 0.2625)))
    ]
    summary = {"run_id": data.run_id, "judge_id": data.judge_id, "axis": "perceived_gender", "seeds": 2}
    summary |= {"before": 0.5125, "mean": 0.225, "deviation": 0.053, "low": -0.25, "high": 0.7, "best": 0.1875}
    between = {"between": 0.0475, "between_low": 0.0, "between_high": 1.6875}
    more = {"models": [*data.models, repeated], "training_steps": [*data.training_steps, *steps]}
    with_seeds = replace(data, **more, seeds=seeds, seed_summaries=[{**summary, **between, "worst": 0.2625}])
    plain, page = Page(render_report(data)), Page(render_report(with_seeds))
    shown = page.attribute("value")
    assert all(repr(value) in shown for value in (0.1875, 0.2625, 0.5125, 0.053, 0.0475, 1.6875))
    assert "other seeds" in page.text
    assert "other seeds" not in plain.text
    assert "77" not in "".join(page.attribute("points"))
    assert f"{len(data.training_steps):,} steps" in page.text


def test_a_policy_gradient_shows_rewards_in_the_place_of_margins():
    data = made_up.good_run()
    none = {"implicit_accuracy": None, "winner_margin": None, "loser_margin": None, "pairs": 0}
    steps = [row | none | {"reward": -0.8 + row["step"] / 50, "drawn": 72, "unknown": 1} for row in data.training_steps]
    curves = training_curves(replace(data, training_steps=steps))
    assert [curve.title for curve in curves] == ["Loss", "Reward"]
    assert Page(render_report(replace(data, training_steps=steps)))


def test_an_approximate_sampler_is_named_at_the_top(good):
    data, page = good
    assert "Approximate sampler" not in page.text
    settings = {"sampling.approximate.steps": "5", "sampling.approximate.cache_every": "2"}
    config = with_settings(preset("emoji"), settings).model_dump(mode="json")
    text = Page(render_report(replace(data, config=config))).text
    assert "Approximate sampler" in text
    assert "steps: 5 instead of 10; inner UNet computed every 2 steps" in text


def test_quality_within_groups_names_every_group_and_its_images() -> None:
    page = Page(render_report(made_up.good_run()))
    shown = page.attribute("value")
    assert all(repr(value) in shown for value in (26.875, 27.375, 27.625, 12.25, 16.25))
    assert all(repr(value) in shown for value in (3.1875, 0.8125, 1.0625, 0.09375, 0.0546875, 0.171875, 0.140625))
    assert "narrow enough" in page.text
    # How far groups are apart with what chance gives; before there was one group, and of women no distance.
    assert all(repr(value) in shown for value in (0.75, 0.5625, 2.4375, 1.3125))
    assert "perceived gender: woman" in page.text.lower()
    # Before, no image was perceived as a woman: a number without images is none.
    assert "29.125" not in shown
    without = replace(made_up.good_run(), group_scores=(), group_diversities=(), distances=(), extensions=())
    assert "nothing has been measured within groups" in Page(render_report(without)).text


def test_scores_of_configured_scorers_are_shown() -> None:
    data = made_up.good_run()
    said = {"scorer_id": "pickscore:P@1"}
    score = {**data.scores[0], "judge_id": "pickscore:P@1", "kind": "neutral", "measure": "pickscore", "value": 21.0625}
    more = {"scores": [*data.scores, score], "group_scores": [*data.group_scores, {**data.group_scores[1], **said}]}
    page = Page(render_report(replace(data, **more)))
    assert repr(21.0625) in page.attribute("value")
    assert "PickScore" in page.text


def test_likeness_of_both_models_is_no_score_of_one(good) -> None:
    data, _ = good
    said = {"judge_id": data.builder_id, "split": "eval", "measure": "paired_similarity", "unit": "cosine", "n": 384}
    rows = [
        {**data.scores[-1], **said, "kind": kind, "value": value, "low": value - 0.125, "high": value}
        for kind, value in (("neutral", 0.765625), ("fact", 0.953125))
    ]
    page = Page(render_report(replace(data, scores=[*data.scores, *rows])))
    for value in (0.765625, 0.953125):
        assert page.attribute("value").count(repr(value)) == 2  # itself, and the upper end of its interval
    assert "controls: a fact" in page.text
    assert "Likeness" not in " ".join(cell.text for row in page.sections["scores"].rows for cell in row)


def test_strata_and_targets_stand_apart_and_the_headline_says_what_chance_gives(good) -> None:
    data, _ = good
    mean = next(row for row in data.disparities if row["level"] == "mean" and row["split"] == "eval")
    more = [
        {**mean, "model_id": model, "level": "stratum", "stratum": stratum, "value": value}
        for model in (data.base_model_id, data.model_id)
        for stratum, value in (("activities", 0.34375), ("occupations", 0.28125))
    ]
    more += [{**mean, "target": "us-cps-2022", "value": 0.40625}]
    banded = [{**row, "null_low": 0.015625, "null_high": 0.109375} for row in data.disparities]
    page = Page(render_report(replace(data, disparities=[*banded, *more])))
    shown = page.attribute("value")
    assert all(repr(value) in shown for value in (0.34375, 0.28125, 0.40625, 0.015625, 0.109375))
    assert all(text in page.text for text in ("activities", "occupations", "target us-cps-2022"))
