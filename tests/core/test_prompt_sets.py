import hashlib
from pathlib import Path

import pytest

from popalign_core import prompt_sets
from popalign_core.attributes import AXES
from popalign_core.errors import UnknownName
from popalign_core.expansion import expand_prompts
from popalign_core.models.emoji.roles import ACTIVITIES, OCCUPATIONS, Role
from popalign_core.prompt_sets import PromptFileNotUsable
from popalign_core.subjects import SPLITS, Subject, check_subjects, subject_key

FOLDER = Path(prompt_sets.__file__).parent
EMOJI = {"emoji-occupations": OCCUPATIONS, "emoji-activities": ACTIVITIES}
# Drawings in which one vendor or another hides the face: a judge may find no person there.
HIDDEN = {"detective", "astronaut", "factory worker", "guard"}


def split_of(name: str, split: str) -> list[str]:
    return [subject.text for subject in prompt_sets.builtin(name) if subject.split == split]


def sizes(name: str) -> tuple[int, ...]:
    return tuple(len(split_of(name, split)) for split in SPLITS)


@pytest.mark.parametrize("name", prompt_sets.SUITES)
def test_every_set_expands(name: str) -> None:
    subjects = prompt_sets.builtin(name)
    axis = AXES["perceived_couple" if name == "couples" else "perceived_gender"]
    prompts = expand_prompts(subjects, [axis])
    assert len(prompts) == len(subjects) * (1 + len(axis.groups))
    assert {subject.suite for subject in subjects} == {prompt_sets.SUITES[name]}


@pytest.mark.parametrize("name", prompt_sets.SUITES)
def test_every_file_is_read_and_tells_its_division(name: str) -> None:
    files = sorted((FOLDER / name).iterdir())
    assert [path.name for path in files] == ["eval.txt", "train.txt", "validation.txt"]
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert "Division:" in " ".join(line for line in lines if line.startswith("#"))
        body = [line for line in lines if not line.startswith("#")]
        assert body == sorted(body, key=str.lower) == split_of(name, path.stem)


def test_the_sizes_are_as_stated() -> None:
    assert {name: sizes(name) for name in prompt_sets.SUITES} == {
        "emoji-occupations": (11, 3, 6),
        "emoji-activities": (16, 4, 9),
        "sdxl-occupations": (300, 20, 100),
        "descriptors": (40, 5, 15),
        "couples": (20, 3, 7),
    }


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_subjects_are_exactly_those_the_model_was_trained_on(name: str) -> None:
    subjects = [subject.text for subject in prompt_sets.builtin(name)]
    assert sorted(subjects) == sorted(role.wording for role in EMOJI[name])


@pytest.mark.parametrize("name", EMOJI)
def test_emoji_splits_follow_the_stated_rule(name: str) -> None:
    ordered = sorted(EMOJI[name], key=lambda role: (role.men_share, role.wording))
    rule = {
        role.wording: "eval" if not place % 3 else "validation" if not place % 5 else "train"
        for place, role in enumerate(ordered, start=1)
    }
    assert {subject.text: subject.split for subject in prompt_sets.builtin(name)} == rule


@pytest.mark.parametrize("split", ["train", "eval"])
def test_both_large_emoji_splits_have_roles_skewed_either_way_and_even_ones(split: str) -> None:
    roles: dict[str, Role] = {role.wording: role for name in EMOJI for role in EMOJI[name]}
    shares = [roles[text].men_share for name in EMOJI for text in split_of(name, split)]
    assert min(shares) <= 0.3
    assert max(shares) >= 0.7
    assert any(0.4 <= share <= 0.6 for share in shares)


def test_drawings_that_hide_the_attribute_are_kept() -> None:
    splits = {subject.text: subject.split for subject in prompt_sets.builtin("emoji-occupations")}
    assert set(HIDDEN) <= splits.keys()
    # Most of them happen to be held out: unknowns are counted where it matters.
    assert "eval" in {splits[subject] for subject in HIDDEN}


@pytest.mark.parametrize(
    ("name", "evaluation", "validation"), [("sdxl-occupations", 100, 20), ("descriptors", 15, 5), ("couples", 7, 3)]
)
def test_the_other_sets_are_divided_by_digest(name: str, evaluation: int, validation: int) -> None:
    texts = [subject.text for subject in prompt_sets.builtin(name)]
    ordered = sorted(texts, key=lambda text: hashlib.blake2b(text.encode()).hexdigest())
    assert set(split_of(name, "eval")) == set(ordered[:evaluation])
    assert set(split_of(name, "validation")) == set(ordered[evaluation : evaluation + validation])


def test_sdxl_occupations_are_of_one_person_and_name_no_gender() -> None:
    texts = [subject.text for subject in prompt_sets.builtin("sdxl-occupations")]
    assert len({subject_key(text) for text in texts}) == 420
    assert not [text for text in texts if text.endswith(("man", "woman", "ess", "men", "s")) and text != "boss"]
    assert {"blacksmith", "goldsmith", "human resources manager"} <= set(texts)


def test_descriptors_are_of_a_person_and_couples_of_two() -> None:
    assert all("person" in subject.text.split() for subject in prompt_sets.builtin("descriptors"))
    assert all(subject.text.startswith("couple ") for subject in prompt_sets.builtin("couples"))


def test_sets_that_go_together_do_not_overlap() -> None:
    check_subjects(prompt_sets.load_subjects(["emoji-occupations", "emoji-activities"]))
    check_subjects(prompt_sets.load_subjects(["sdxl-occupations", "descriptors", "couples"]))


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"unknown prompt set 'emoji-pets'. Known: emoji-occupations"):
        prompt_sets.builtin("emoji-pets")
    with pytest.raises(UnknownName, match=r"unknown prompt set 'jobs.txt'"):
        prompt_sets.load_subjects(["jobs.txt"])


def test_a_file_is_read_without_comments_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "jobs.txt"
    path.write_text("\ufeff# mine\n\n baker \nC# developer  # with a sharp\r\n\tbrewer\n", encoding="utf-8")
    expected = [Subject(text, "crafts", "eval") for text in ("baker", "C# developer", "brewer")]
    assert prompt_sets.load_prompt_file(path, "crafts", "eval") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "no subject"), (b"# only this\n\n", "no subject"), (b"\xff\xfe\x00", "no UTF-8")],
)
def test_missing_empty_and_binary_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "jobs.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptFileNotUsable, match=f"jobs.txt.*{message}"):
        prompt_sets.load_prompt_file(path, "jobs", "train")


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(PromptFileNotUsable, match="cannot be read"):
        prompt_sets.load_prompt_file(tmp_path, "jobs", "train")


def test_entries_are_sets_files_and_single_subjects(tmp_path: Path) -> None:
    path = tmp_path / "crafts.txt"
    path.write_text("weaver\ndyer\n", encoding="utf-8")
    subjects = prompt_sets.load_subjects([f"train={path}", "eval:bee keeper", "emoji-activities"])
    assert subjects[:3] == [
        Subject("weaver", "crafts", "train"),
        Subject("dyer", "crafts", "train"),
        Subject("bee keeper", "listed", "eval"),
    ]
    assert subjects[3:] == prompt_sets.builtin("emoji-activities")
    with pytest.raises(UnknownName, match="unknown split 'test'"):
        prompt_sets.load_subjects([f"test={path}"])


def test_the_first_so_many_of_each_split() -> None:
    entries = ["emoji-occupations", "emoji-activities"]
    every = prompt_sets.load_subjects(entries)
    assert len(every) == 49
    few = prompt_sets.load_subjects(entries, max_subjects=2)
    assert few == [s for split in SPLITS for s in [one for one in every if one.split == split][:2]]
