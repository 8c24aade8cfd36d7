"""The pieces of the page: contact sheets, strips, scales, bars, curves."""

import base64
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from popalign_core.errors import InvalidInput
from popalign_core.reporting.charts import disparity_scale, dumbbell, nice_ticks, percent, stacked_bar, tag
from popalign_core.reporting.contact_sheet import contact_sheet, sheet_rows
from popalign_core.reporting.curves import Line, Point, TrendPoint, round_chart, step_chart, trend_chart
from popalign_core.reporting.formatting import as_text
from popalign_core.reporting.report_data import Change, ContactSheet, Measured
from popalign_core.reporting.strips import perceived_text, strip_sheets

RNG = np.random.default_rng(0)


def noise(height: int = 16, width: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGBA"))


def test_a_sheet_holds_every_image_in_its_cell_without_loss():
    rows = [[noise() for _ in range(3)] for _ in range(2)]
    strips = sheet_rows(contact_sheet(rows), 2)
    for images, strip in zip(rows, strips, strict=True):
        drawn = pixels(strip)
        assert drawn.shape == (18, 54, 4)
        for place, image in enumerate(images):
            cell = drawn[:16, place * 18 : place * 18 + 16]
            assert np.array_equal(cell[..., :3], image)
            assert (cell[..., 3] == 255).all()
        assert (drawn[16:, :, 3] == 0).all()


def test_missing_images_leave_their_cells_transparent():
    drawn = pixels(contact_sheet([[noise(), None], [noise()]]))
    assert drawn.shape == (36, 36, 4)
    assert (drawn[:, 18:, 3] == 0).all()


def test_large_images_become_small_and_keep_their_proportions():
    drawn = pixels(contact_sheet([[noise(200, 100)]], cell_size=80))
    assert drawn.shape == (82, 82, 4)
    opaque = drawn[..., 3] > 127
    assert (opaque.any(axis=0).sum(), opaque.any(axis=1).sum()) == (40, 80)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((8, 8, 4), np.uint8)])
def test_images_of_another_kind_are_refused(image):
    with pytest.raises(InvalidInput, match="uint8"):
        contact_sheet([[image]])


def test_sheets_that_cannot_be_cut_are_refused():
    with pytest.raises(InvalidInput, match="one image at least"):
        contact_sheet([[None]])
    with pytest.raises(InvalidInput, match="equal rows"):
        sheet_rows(contact_sheet([[noise()]]), 4)
    with pytest.raises(InvalidInput, match="can be read"):
        sheet_rows(b"not an image", 1)


def test_strips_stop_at_the_limit_and_say_how_many_are_left_out():
    labels = [f"row {place}" for place in range(5)]
    image = contact_sheet([[noise()] for _ in labels])
    size = len(sheet_rows(image, 5)[0])
    (whole,) = strip_sheets([ContactSheet("title", image, None, labels)])
    assert (len(whole.strips), whole.left_out) == (5, 0)
    assert whole.strips[0].after is None
    uri = whole.strips[0].before or ""
    assert base64.b64decode(uri.removeprefix("data:image/webp;base64,")) == sheet_rows(image, 5)[0]
    (cut,) = strip_sheets([ContactSheet("title", image, None, labels)], most_bytes=2 * size + size // 2)
    assert (len(cut.strips), cut.left_out) == (2, 3)


def test_what_is_perceived_stands_at_its_own_picture():
    images = [[noise(), None, noise(), noise()], [noise()]]
    said = [["a", "", "b", "c"], ["d"]]
    sheet = contact_sheet(images)
    (found,) = strip_sheets([ContactSheet("title", sheet, sheet, ["one", "two"], said, [])])
    width = pixels(sheet).shape[1]
    for row, strip in enumerate(found.strips):
        drawn = pixels(base64.b64decode((strip.before or "").removeprefix("data:image/webp;base64,")))
        assert [picture.perceived for picture in strip.before_pictures] == [text for text in said[row] if text]
        for picture in strip.before_pictures:
            left, size = (width * float(share.removesuffix("%")) / 100 for share in (picture.left, picture.width))
            own = drawn[:16, round(left) : round(left) + 16, :3]
            assert np.array_equal(own, images[row][said[row].index(picture.perceived)])
            assert round(size) == 18
    assert [picture.number for picture in found.strips[0].before_pictures] == [1, 3, 4]
    assert not found.strips[0].after_pictures


@pytest.mark.parametrize(
    ("outcomes", "text"),
    [
        ([("perceived_skin_tone", "medium", "ok"), ("perceived_gender", "woman", "ok")], "woman, medium (judge)"),
        ([("perceived_gender", None, "no_person"), ("perceived_age", None, "no_person")], "unknown: no person (judge)"),
        ([("perceived_gender", "man", "low_confidence")], "unknown: low confidence (judge)"),
        (
            [("perceived_gender", "man", "ok"), ("perceived_skin_tone", "dark", "several")],
            "man, skin tone unknown: several people (judge)",
        ),
        ([], "not labelled (judge)"),
    ],
)
def test_perceived_attributes_in_words(outcomes, text):
    rows = [{"axis": axis, "label": label, "status": status} for axis, label, status in outcomes]
    assert perceived_text(rows) == text


@given(st.floats(-10, 10), st.floats(1e-3, 10))
def test_positions_stay_on_the_scale(value, top):
    place = float(percent(value, top).removesuffix("%"))
    assert 0 <= place <= 100
    if 0 <= value <= top:
        assert place == pytest.approx(100 * value / top, abs=0.0051)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_with_few_round_numbers(low, span):
    high = low + span
    ticks = nice_ticks(low, high)
    if high > low:
        slack = 1e-6 * span + 1e-11
        assert ticks[0] <= low + slack
        assert ticks[-1] >= high - slack
        assert len(ticks) <= 8
        assert ticks == sorted(ticks)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10).filter(lambda shares: sum(shares) > 0.01))
@settings(max_examples=50)
def test_the_parts_of_a_bar_fill_it(weights):
    shares = [weight / sum(weights) for weight in weights]
    bar = stacked_bar(shares)
    widths = [float(width) for width in re.findall(r'width="([\d.]+)%"', bar)]
    starts = [float(start) for start in re.findall(r'<rect class="part" x="([\d.]+)%"', bar)]
    assert sum(widths) == pytest.approx(100, abs=0.06)
    assert starts == pytest.approx([100 * sum(shares[:place]) for place in range(len(shares))], abs=0.02)


def test_the_disparity_scale_ends_where_one_group_is_alone():
    change = Change(Measured(0.2), None)
    assert disparity_scale("perceived_gender", [change], "l2")[0] == math.sqrt(0.5)
    assert disparity_scale("perceived_gender", [change], "kl_divergence")[0] == 0.2
    assert disparity_scale("unheard of", [change], "l2")[0] == 0.2


def test_before_is_hollow_and_above_after_is_filled_and_below():
    drawn = dumbbell(Change(Measured(0.4, 0.3, 0.5, floor=0.1), Measured(0.2, 0.1, 0.3, floor=0.1)), 0.8, [0.0, 0.4])
    marks = re.findall(r'<circle class="mark (\w+)" cx="([\d.]+)%" cy="(\d+)"', drawn)
    assert marks == [("before", "50.00", "9"), ("after", "25.00", "23")]
    assert re.findall(r'class="interval-line (\w+)" x1="([\d.]+)%" x2="([\d.]+)%"', drawn) == [
        ("before", "37.50", "62.50"),
        ("after", "12.50", "37.50"),
    ]
    assert drawn.count('class="floor"') == 2
    one_side = dumbbell(Change(None, Measured(0.2)), 0.8, [])
    assert re.findall(r'class="(link|mark \w+|interval-line \w+|floor)"', one_side) == ["mark after"]


@pytest.mark.parametrize(
    ("values", "paths"),
    [([1.0, 2.0, 3.0], 1), ([1.0, math.nan, 3.0, 4.0], 2), ([5.0], 1), ([2.0, 2.0], 1), ([0.0, 0.0], 1)],
)
def test_curves_break_where_a_value_is_no_number(values, paths):
    drawn = step_chart([Line("loss", values)], [])
    commands = re.findall(r' d="([^"]*)"', drawn)
    assert len(commands) == 1
    assert commands[0].count("M") == paths
    assert "nan" not in drawn


def scale_of(drawn: str) -> list[float]:
    return [float(tick) for tick in re.findall(r'class="left"[^>]*>([-\d.e]+)<', drawn)]


def heights_of(drawn: str) -> list[float]:
    return [float(y) for y in re.findall(r'class="mark before"[^>]* cy="([-\d.]+)"', drawn)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_shares_that_hardly_move_do_not_fill_the_height(values):
    drawn = trend_chart([TrendPoint("run", Measured(value), None) for value in values], shares=True)
    scale = scale_of(drawn)
    assert min(scale) >= 0
    assert max(scale) <= 1
    assert min(scale) <= min(values) + 1e-6
    assert max(scale) >= max(values) - 1e-6
    assert max(scale) - min(scale) >= 0.0999
    assert all(0 <= y <= 170 for y in heights_of(drawn))


@pytest.mark.parametrize("values", [[0.1, 0.1 + 1e-15], [1e-250], [55.25, 55.25 + 1e-13], [-1e-13, 1e-13]])
def test_what_only_rounding_moves_is_drawn_as_constant(values):
    heights = heights_of(trend_chart([TrendPoint("run", Measured(value), None) for value in values]))
    assert max(heights) - min(heights) < 1
    assert 20 < heights[0] < 150


def test_a_hundredth_is_a_tenth_of_the_height_of_a_chart_of_shares():
    points = [TrendPoint("run", Measured(value), None) for value in (0.94, 0.95)]
    one, other = heights_of(trend_chart(points, shares=True))
    assert abs(one - other) <= 17.1
    one, other = heights_of(trend_chart(points))
    assert abs(one - other) == 170
    lines = step_chart([Line("accuracy", [0.5, 0.51])], [], guide=0.5, shares=True)
    assert max(scale_of(lines)) - min(scale_of(lines)) >= 0.1


def test_curves_of_many_steps_have_few_points():
    drawn = step_chart([Line("loss", [float(step % 7) for step in range(10_000)])], [])
    assert 100 <= drawn.count("L") <= 300
    assert "No finite value" in step_chart([Line("loss", [math.nan])], [])


def test_rounds_mark_the_start_and_what_was_kept():
    points = [
        Point("base", Measured(0.5, 0.4, 0.6, floor=0.1), kept=False),
        Point("round-1", Measured(0.3, 0.2, 0.4, floor=0.1), kept=True),
        Point("round-2", Measured(0.35), kept=False),
    ]
    drawn = round_chart(points)
    assert re.findall(r'class="mark (\w+)"', drawn) == ["before", "after", "after"]
    assert drawn.count('class="ring"') == 1
    assert drawn.count(">kept<") == 1
    assert drawn.count('class="floor"') == 2


def test_elements_escape_what_they_are_given():
    assert tag("text", '<b>"', x='"><b>') == '<text x="&#34;&gt;&lt;b&gt;">&lt;b&gt;&#34;</text>'


@pytest.mark.parametrize(
    ("value", "style", "text"),
    [
        (0.4714, "plain", "0.471"),
        (0.7125, "share", "71.2%"),
        (10000, "count", "10,000"),
        (59.94, "seconds", "59.9 s"),
        (59.97, "seconds", "1 min 0 s"),
        (119.7, "seconds", "2 min 0 s"),
        (0.447, "ratio", "0.45"),
        (27.4149, "significant", "27.41"),
        (0.146, "significant", "0.1460"),
        (500.0, "significant", "500"),
        (math.inf, "plain", "infinite"),
        (-math.inf, "share", "minus infinite"),
    ],
)
def test_numbers_as_text(value, style, text):
    assert as_text(value, style) == text
