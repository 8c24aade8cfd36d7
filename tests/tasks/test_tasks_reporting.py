"""What a report says of a single picture is what the judge's rows say of that sample."""

from storage.layout import Workspace
from storage.tables import read_artifact
from tasks.reporting import held_out_sheets
from tasks.run import BASE, read_prompts

MODEL = "round-1"
JUDGE = "written down"


def label(row: dict) -> str | None:
    return (None, "man", "woman")[(row["sample_index"] + len(row["prompt_id"]) + (row["model_id"] == MODEL)) % 3]


def test_every_picture_of_a_sheet_has_its_own_label(written_run) -> None:
    samples = {}
    for model in (BASE, MODEL):
        ref = written_run.commit_samples(model, "evaluation")
        written_run.commit_labels(ref, "judge", label)
        samples |= {(model, row["prompt_id"], row["sample_index"]): row for row in read_artifact(ref, "samples")}
    place = Workspace.open(written_run.workspace)
    prompts = read_prompts(written_run.workspace, written_run.run_id)
    rows = [vars(prompt) for prompt in prompts]
    (sheet,) = held_out_sheets(place, written_run.run_id, MODEL, rows, 12, JUDGE)
    shown = [prompt.prompt_id for prompt in prompts if prompt.split == "eval" and prompt.kind == "neutral"]
    for model, said in ((BASE, sheet.before_perceived), (MODEL, sheet.after_perceived)):
        # Eight images are drawn and a sheet has ten columns: where there is no picture, nothing is said.
        assert [len(line) for line in said] == [10, 10]
        for prompt, line in zip(shown, said, strict=True):
            labels = [label(samples[model, prompt, index]) for index in range(8)]
            assert line == [f"{one or 'unknown: low confidence'} (judge)" for one in labels] + ["", ""]
    (silent,) = held_out_sheets(place, written_run.run_id, MODEL, rows, 12)
    assert not any(text for line in silent.before_perceived for text in line)
    (other,) = held_out_sheets(place, written_run.run_id, MODEL, rows, 12, "another")
    assert other.before_perceived[0][0] == "not labelled (judge)"
