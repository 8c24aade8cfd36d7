import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from popalign_core.config import RunConfig, parse_config, with_settings
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_from_json_as_it_was(name: str) -> None:
    config = preset(name)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_settings_reach_their_field_and_no_other() -> None:
    before = preset("emoji")
    after = with_settings(
        before, {"sampling.steps": "7", "alignment.redraw": "false", "expansion.axes": "perceived_age, perceived_race"}
    )
    assert after.sampling.steps == 7
    assert after.alignment.redraw is False
    assert after.expansion.axes == ("perceived_age", "perceived_race")
    restored = {"sampling.steps": str(before.sampling.steps), "alignment.redraw": "true"}
    assert with_settings(after, {**restored, "expansion.axes": ",".join(before.expansion.axes)}) == before


@pytest.mark.parametrize("key", ["sampling.stepz", "steps", "sampling", "nothing.steps"])
def test_an_unknown_setting_is_named_with_the_known_ones(key: str) -> None:
    with pytest.raises(UnknownName, match=r"sampling\.steps") as caught:
        with_settings(preset("emoji"), {key: "1"})
    assert repr(key) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("sampling.steps", "0", "greater than 0"),
        ("sampling.steps", "many", "integer"),
        ("sampling.guidance_scale", "0.5", "greater than or equal to 1"),
        ("expansion.axes", "perceived_mood", "Axes are perceived_gender"),
        ("classification.min_confidence", "1.5", "less than or equal to 1"),
        ("alignment.objective", "ppo", "popalign_exact"),
        ("classification.judge", "emoji-clip", "judged by their own maker"),
    ],
)
def test_a_value_out_of_bounds_names_field_bound_and_what_came(key: str, value: str, part: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        with_settings(preset("emoji"), {key: value})
    assert part in str(caught.value)
    assert key.split(".")[0] in str(caught.value)
    assert value in str(caught.value)


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="emoji, sdxl, sdxl-paper"):
        preset("sdxxl")


@given(name=st.text(min_size=1, max_size=8).filter(lambda name: name not in RunConfig.model_fields))
def test_an_unknown_key_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="Extra inputs are not permitted"):
        parse_config({name: 1})


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        preset("emoji").seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("written", "expected"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_a_layout_of_earlier_runs_is_understood(written, expected) -> None:
    assert parse_config({"acceleration": {"channels_last": written}}).acceleration.channels_last == expected


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [
        ({"sampling.dtype": "float16", "alignment.lora_rank": "4"}, "bfloat16 or float32"),
        ({"alignment.compiled": "true", "alignment.objective": "reward"}, "differ each time"),
        ({"alignment.compiled": "true", "alignment.sharded": "true"}, "turn one of them off"),
    ],
)
def test_formats_and_passes_that_do_not_train_are_refused(settings: dict[str, str], way_out: str) -> None:
    with pytest.raises(InvalidInput, match=way_out):
        with_settings(preset("emoji"), settings)
    with_settings(preset("emoji"), {"sampling.dtype": "float16"})  # trained in float32
