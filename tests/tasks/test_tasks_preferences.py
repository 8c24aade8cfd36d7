"""From labels that are written down to pairs: exact numbers, whatever the models say."""

from collections import Counter

import pytest

from popalign_core.config import PopulationsConfig
from storage.artifacts import ArtifactRef, artifact_digest
from storage.tables import read_artifact
from tasks.counterfactuals import write_counterfactuals
from tasks.labels import labelled_samples
from tasks.populations import build_preferences
from tasks.run import BASE, read_prompts
from tasks.targets import own_samples, population_plans

AXIS = "perceived_gender"


def neutral_training_prompts(run) -> list[str]:
    prompts = read_prompts(run.workspace, run.run_id)
    return [prompt.prompt_id for prompt in prompts if (prompt.split, prompt.kind) == ("train", "neutral")]


def planned(run, label) -> tuple[ArtifactRef, ArtifactRef]:
    """The committed own samples and the counterfactuals that their labels ask for."""
    own = run.commit_samples(BASE, "round-1")
    run.commit_labels(own, "builder", label)
    return own, write_counterfactuals.fn(run.workspace, run.run_id, run.config, BASE, 1)


def draw_counterfactuals(run, plan: ArtifactRef, obeyed) -> None:
    """Commits the images of a plan, with the label each caption asks for where `obeyed` says so."""
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(run.workspace, run.run_id)}
    wanted = {
        row["sample_id"]: prompts[row["target_prompt_id"]].requested[AXIS] for row in read_artifact(plan, plan.table)
    }
    shard = run.commit_samples(BASE, "counterfactual-1")
    run.commit_labels(shard, "builder", lambda row: wanted[row["sample_id"]] if obeyed(row) else None)


def test_as_few_images_change_as_balance_each_prompt(written_run) -> None:
    """Prompt 1: eight men, one woman, one unknown; prompt 2: five and five."""
    first, second = neutral_training_prompts(written_run)

    def label(row) -> str | None:
        if row["prompt_id"] == second:
            return "man" if row["sample_index"] < 5 else "woman"
        return {0: "woman", 1: None}.get(row["sample_index"], "man")

    own, plan = planned(written_run, label)
    rows = read_artifact(plan, "counterfactuals")
    assert Counter(row["prompt_id"] for row in rows) == {first: 3}
    changed = {row["own_sample_id"] for row in rows}
    assert changed <= {row["sample_id"] for row in read_artifact(own, "samples") if label(row) == "man"}
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(written_run.workspace, written_run.run_id)}
    for row in rows:
        assert prompts[row["target_prompt_id"]].requested == {AXIS: "woman"}
        assert row["own_sample_id"].endswith(f"/{row['sample_index']}")


def test_pairs_share_their_noise_and_stand_under_the_neutral_caption(written_run) -> None:
    _, plan = planned(written_run, lambda _: "man")
    draw_counterfactuals(written_run, plan, lambda _: True)
    ref = build_preferences.fn(written_run.workspace, written_run.run_id, written_run.config, BASE, 1)
    pairs = read_artifact(ref, "preferences")
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(written_run.workspace, written_run.run_id)}
    assert Counter(pair["prompt_id"] for pair in pairs) == dict.fromkeys(neutral_training_prompts(written_run), 5)
    for pair in pairs:
        assert pair["caption"] == prompts[pair["prompt_id"]].text
        winner, loser = pair["winner_sample_id"].split("/"), pair["loser_sample_id"].split("/")
        assert winner[-1] == loser[-1]
        assert prompts[winner[1]].requested == {AXIS: "woman"}
        assert prompts[loser[1]].kind == "neutral"
        assert prompts[winner[1]].family_id == prompts[loser[1]].family_id


def test_counts_name_every_group_and_both_sides(written_run) -> None:
    _, plan = planned(written_run, lambda _: "man")
    draw_counterfactuals(written_run, plan, lambda _: True)
    ref = build_preferences.fn(written_run.workspace, written_run.run_id, written_run.config, BASE, 1)
    counts = {
        (row["prompt_id"], row["side"], row["group"]): row["count"]
        for row in read_artifact(ref, "populations")
        if row["axis"] == AXIS
    }
    for prompt_id in neutral_training_prompts(written_run):
        assert counts[prompt_id, "dispreferred", "man"] == 10
        assert counts[prompt_id, "dispreferred", "woman"] == 0
        assert counts[prompt_id, "preferred", "man"] == counts[prompt_id, "preferred", "woman"] == 5


def test_winners_not_perceived_as_requested_make_no_pair(written_run) -> None:
    _, plan = planned(written_run, lambda _: "man")
    first, second = neutral_training_prompts(written_run)
    of_second = {row["sample_id"] for row in read_artifact(plan, "counterfactuals") if row["prompt_id"] == second}
    draw_counterfactuals(written_run, plan, lambda row: row["sample_id"] not in of_second)
    ref = build_preferences.fn(written_run.workspace, written_run.run_id, written_run.config, BASE, 1)
    assert {pair["prompt_id"] for pair in read_artifact(ref, "preferences")} == {first}
    refused = read_artifact(ref, "refusals")
    assert [row["prompt_id"] for row in refused] == [second]
    assert "0 perceived as requested" in refused[0]["detail"]
    unknown = {row["prompt_id"]: row["unknown"] for row in read_artifact(ref, "yields")}
    assert unknown == {first: 0, second: 5}


@pytest.mark.parametrize("task", [write_counterfactuals, build_preferences])
def test_what_is_committed_is_not_made_again(written_run, task) -> None:
    _, plan = planned(written_run, lambda _: "man")
    draw_counterfactuals(written_run, plan, lambda _: True)
    arguments = (written_run.workspace, written_run.run_id, written_run.config, BASE, 1)
    first = task.fn(*arguments)
    digest, written = artifact_digest(first), first.folder.stat().st_mtime_ns
    assert artifact_digest(task.fn(*arguments)) == digest
    assert first.folder.stat().st_mtime_ns == written


def share_aimed_at(run, model_id: str, round_index: int) -> dict[str, float]:
    """The target share of men by training prompt, from populations of men alone."""
    ref = run.commit_samples(model_id, f"round-{round_index}")
    run.commit_labels(ref, "builder", lambda _: "man")
    config = run.config.model_copy(
        update={"populations": PopulationsConfig(winners="counterfactual", weighting="axis", overshoot=1)}
    )
    own = own_samples(
        labelled_samples(run.workspace, run.run_id, config, model_id, f"round-{round_index}", "builder"),
        neutral_training_prompts(run),
    )
    plans = population_plans(run.workspace, run.run_id, config, model_id, round_index, own)
    return {prompt_id: float(plan.targets()[0][0]) for prompt_id, plan in plans.items()}


def test_overshoot_follows_what_validation_prompts_keep_of_their_lean(written_run) -> None:
    """Training prompts show men alone; validation prompts too, until round 1 takes half of that away."""
    run = written_run
    run.commit_labels(run.commit_samples(BASE, "validation"), "builder", lambda _: "man")
    # Ten men, and a prior of one man and one woman: 11/12, as far above one half as the target is below.
    assert share_aimed_at(run, BASE, 1) == dict.fromkeys(neutral_training_prompts(run), pytest.approx(1 / 12))
    half = run.commit_samples("round-1", "validation")
    run.commit_labels(half, "builder", lambda row: "man" if row["sample_index"] < 6 else "woman")
    # Six of eight men where there were eight of eight: .7 and .9 with the prior, so that half of the lean is kept.
    assert share_aimed_at(run, "round-1", 2) == dict.fromkeys(
        neutral_training_prompts(run), pytest.approx(0.5 - 0.5 * 5 / 12)
    )
