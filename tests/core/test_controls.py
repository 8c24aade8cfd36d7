"""Prompts that an alignment must leave alone: the built-in list, one's own, and what is refused."""

from pathlib import Path

import pytest

from popalign_core.config import with_settings
from popalign_core.controls import load_controls
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.expansion import prompts_of
from popalign_core.presets import preset
from popalign_core.sample_sets import image_requests, slices
from popalign_core.workload import workload


def written(folder: Path, *lines: str) -> str:
    (folder / "own.txt").write_text("# a comment\n" + "\n".join(lines) + "\n")
    return str(folder / "own.txt")


def test_the_built_in_list_is_balanced_and_has_pictures_without_a_person() -> None:
    prompts = load_controls(["people-and-things"], "a photo of ")
    facts = [prompt.requested["perceived_gender"] for prompt in prompts if prompt.kind == "fact"]
    assert facts.count("woman") == facts.count("man") == 10
    assert sum(prompt.kind == "no_person" for prompt in prompts) == 10
    assert all(prompt.text.startswith("a photo of ") and prompt.split == "eval" for prompt in prompts)
    assert len({prompt.prompt_id for prompt in prompts}) == 30
    # None is a prompt of a set: it would then be trained on, or held out twice.
    assert not {p.text for p in prompts} & {p.text for p in prompts_of(preset("sdxl").expansion)}


def test_ones_own_list(tmp_path: Path) -> None:
    source = written(tmp_path, "Ada Lovelace | perceived_gender=woman, perceived_age=old", "a tree")
    ada, tree = load_controls([source], "a photo of")
    assert (ada.text, ada.kind, ada.suite) == ("a photo of Ada Lovelace", "fact", "own")
    assert ada.requested == {"perceived_gender": "woman", "perceived_age": "old"}
    assert (tree.text, tree.kind, tree.requested) == ("a photo of a tree", "no_person", {})


@pytest.mark.parametrize(
    ("lines", "error", "match"),
    [
        (["Ada | gender=woman"], UnknownName, "perceived_gender"),
        (["Ada | perceived_gender=lady"], UnknownName, "woman"),
        (["Ada |"], InvalidInput, "after a bar"),
        (["| perceived_gender=woman"], InvalidInput, "a subject is expected"),
        (["a tree", "a tree"], InvalidInput, "twice"),
        ([], InvalidInput, "no subject"),
    ],
)
def test_what_is_no_control_is_refused(tmp_path: Path, lines: list[str], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        load_controls([written(tmp_path, *lines)], "")


def test_a_list_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidInput, match="people-and-things"):
        load_controls(["people"], "")


def test_controls_are_drawn_and_counted() -> None:
    config = with_settings(preset("emoji"), {"expansion.controls": "people-and-things", "images.controls": "3"})
    prompts = load_controls(config.expansion.controls, "")
    requests = image_requests(prompts, slices("controls", config.images), model_id="base", run_seed=0, cells=4)
    assert len(requests) == 90
    assert len({request.seed for request in requests}) == 90
    counted = [part.images for part in workload(config).image_sets if part.purpose == "controls"]
    assert counted == [90, 90]  # of the base and of the kept model
