"""The curve of a run, as SVG and as PNG: what is on it, and where."""

import io
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from results.curves import (
    BOTTOM,
    COLORS,
    HEIGHT,
    LEFT,
    PAPER_COLOR,
    RIGHT,
    TICKS,
    TOP,
    WIDTH,
    curve,
    limits,
    run_curve,
    tick_labels,
    ticks,
)
from results.drawing import PNG_SCALE, Dot, Line, Picture, Text, png, svg

CLAIM = {"metric": "test/bpd", "value": 3.5, "decimals": 2}
ROWS = [
    {"step": 0, "images": 0, "train/bpd": None, "val/bpd": 7.0},
    {"step": 1, "images": 100, "train/bpd": 4.5, "val/bpd": 4.25},
    {"step": 2, "images": 200, "train/bpd": 4.0, "val/bpd": 4.0},
]


def drawn(rows=ROWS, claims=(CLAIM,), unit="bits/dim", direction="lower", title="a, run b"):
    return curve(rows, title, unit, direction, claims)


def texts(picture):
    return [shape.content for shape in picture.shapes if isinstance(shape, Text)]


def points(picture, color):
    """The points of the lines of one colour."""
    lines = [line for line in picture.shapes if isinstance(line, Line) and line.color == color]
    return [point for line in lines for point in line.points]


def pixels(picture):
    """(height, width, 3): a picture's PNG at the size of the picture."""
    image = Image.open(io.BytesIO(png(picture)))
    assert image.size == (PNG_SCALE * picture.width, PNG_SCALE * picture.height)
    return np.asarray(image.reduce(PNG_SCALE), dtype=int)


def rgb(color):
    return [int(color[k : k + 2], 16) for k in (1, 3, 5)]


def ink(picture):
    """(height, width): how dark each pixel of the PNG is, from 0 to 1."""
    return 1 - pixels(picture).min(2) / 255


# What is on it


def test_a_curve_has_title_axes_units_and_the_papers_value():
    expected = {"a, run b", "train", "val", "training images seen", "bpd (bits/dim)", "paper 3.50"}
    assert expected <= set(texts(drawn()))
    assert "bpd" in texts(drawn(unit=""))
    assert not [text for text in texts(drawn(claims=[])) if "paper" in text]


def test_lines_are_where_their_values_are():
    picture = drawn(claims=[])
    val = points(picture, COLORS["val"])
    train = points(picture, COLORS["train"])
    assert val[0][0] == LEFT
    assert val[-1] == train[-1]  # both are 4.0
    assert val[-1][0] == WIDTH - RIGHT
    numbers = {
        shape.content: shape.place[1] - 4
        for shape in picture.shapes
        if isinstance(shape, Text) and shape.anchor == "end"
    }
    assert val[-1][1] == pytest.approx(numbers["4"])
    assert (val[1][1] - val[-1][1]) / (train[0][1] - train[-1][1]) == pytest.approx(0.5)
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in val + train)


@pytest.mark.parametrize(("value", "direction"), [(27.75, "higher"), (12.5, "lower")])
def test_the_papers_value_is_in_view_above_and_below_the_curve(value, direction):
    rows = [{"images": i, "val/psnr": 20.0 + 2 * i} for i in range(4)]
    claim = {"metric": "test/psnr", "value": value, "decimals": 2}
    picture = drawn(rows, [CLAIM, claim], direction=direction)
    [(left, y), (right, _)] = points(picture, PAPER_COLOR)
    assert (left, right) == (LEFT, WIDTH - RIGHT)
    assert TOP < y < HEIGHT - BOTTOM
    heights = [y for _, y in points(picture, COLORS["val"])]
    assert (y < min(heights)) == (value > 26)


def test_a_line_that_leaves_the_plot_ends_at_its_border():
    rows = [{"images": k, "val/bpd": {0: 1e29, 5: 1e29}.get(k, 4 - 0.01 * k)} for k in range(40)]
    picture = drawn(rows, [], direction="lower")
    heights = [y for _, y in points(picture, COLORS["val"])]
    assert min(heights) >= TOP
    assert max(heights) <= HEIGHT - BOTTOM
    assert pixels(picture).shape == (HEIGHT, WIDTH, 3)
    dots = [shape for shape in picture.shapes if isinstance(shape, Dot)]
    assert len(dots) == 38


def test_long_titles_do_not_touch_the_legend():
    title = "glow_cifar10_additive5bit, run 20261122-231500-ab12"
    assert title in texts(drawn(title=title))
    longest = Text((LEFT, 20), drawn(title=f"{title} {100 * 'w'}").shapes[0].content, "start")
    assert longest.content.endswith("…")
    assert ink(Picture(WIDTH, 40, (longest,)))[:, WIDTH - RIGHT - 90 :].max() == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_first_steps_far_worse_than_the_rest_do_not_flatten_a_curve(sign):
    """They lie above the rest where lower is better, and below where higher is."""
    direction = {1: "lower", -1: "higher"}[sign]
    values = [sign * value for value in (90.0, *(4 - 0.01 * k for k in range(20)))]
    low, high = sorted(sign * bound for bound in limits(values, [], direction))
    assert low == pytest.approx(3.81, abs=0.02)
    assert high == pytest.approx(4.0, abs=0.02)
    low, high = sorted(sign * bound for bound in limits(values, [sign * 3.49], direction))
    assert low < 3.49 < 4 < high < 5


@pytest.mark.parametrize(
    ("low", "high"), [(3.34, 4.1), (0, 179_968), (-1e29, 1e30), (0.0, 1e-6), (3.4899, 3.4901)]
)
def test_ticks_are_a_few_numbers_in_the_interval(low, high):
    values = ticks(low, high, TICKS)
    slack = 1e-6 * (high - low)
    assert TICKS / 2 <= len(values) <= TICKS + 1
    assert low - slack <= min(values) < max(values) <= high + slack
    assert [float(label) for label in tick_labels(values)] == pytest.approx(values)
    assert len({len(label.partition(".")[2]) for label in tick_labels(values)}) == 1 or high > 1e7


def test_a_run_draws_the_curve_that_the_page_shows():
    """The record of a run has the rows and the metric that the run itself had."""
    run = {"experiment": "a", "run": "b", "curve": ROWS, "comparisons": []}
    metric = {"name": "bpd", "unit": "bits/dim", "direction": "lower"}
    assert run_curve(run | {"metric": metric}, [CLAIM]) == drawn()
    assert run_curve(run, [CLAIM]) == drawn()  # an older run, without its metric
    assert run_curve(run | {"curve": []}, [CLAIM]) is None


# SVG and PNG


@pytest.mark.parametrize("color", ["#ff0000", "#0550ae"])
def test_shapes_have_the_same_place_in_both_formats(color):
    line = Line(((10, 20), (90, 20)), color, 4)
    dashed = Line(((10, 40), (90, 40)), color, 4, dashed=True)
    dot = Dot((50, 60), color, 10)
    picture = Picture(100, 80, (line, dashed, dot))
    image = pixels(picture)
    white = [255, 255, 255]
    assert [image[20, x].tolist() for x in (5, 50, 95)] == [white, rgb(color), white]
    assert [image[40, x].tolist() for x in (12, 18, 22)] == [rgb(color), white, rgb(color)]
    assert [image[y, 50].tolist() for y in (53, 60, 67)] == [white, rgb(color), white]
    tree = xml.etree.ElementTree.fromstring(svg(picture))
    _, first, second, circle = tree
    assert first.attrib["points"] == "10.0,20.0 90.0,20.0"
    assert second.attrib["stroke-dasharray"] == "6 4"
    assert [circle.attrib[key] for key in ("cx", "cy", "r")] == ["50.0", "60.0", "5"]
    assert {element.attrib.get("stroke", color) for element in (first, second)} == {color}


@pytest.mark.parametrize("anchor", ["start", "middle", "end"])
def test_texts_stand_at_their_place(anchor):
    plain = Picture(100, 100, (Text((50, 60), "abcde", anchor),))
    upright = Picture(100, 100, (Text((50, 60), "abcde", anchor, upright=True),))
    centre = {"start": 65, "middle": 50, "end": 35}[anchor]
    columns = np.flatnonzero(ink(plain).max(0) > 0.3)
    rows = np.flatnonzero(ink(plain).max(1) > 0.3)
    assert (columns[0] + columns[-1]) / 2 == pytest.approx(centre, abs=3)
    assert 48 < rows[0] < rows[-1] <= 60  # above the baseline
    columns = np.flatnonzero(ink(upright).max(0) > 0.3)
    rows = np.flatnonzero(ink(upright).max(1) > 0.3)
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(110 - centre, abs=3)  # reads upwards
    assert 38 < columns[0] < columns[-1] <= 50
    bold = Picture(100, 100, (Text((50, 60), "abcde", anchor, bold=True),))
    assert ink(bold).sum() > 1.2 * ink(plain).sum()


def test_texts_are_escaped():
    tree = xml.etree.ElementTree.fromstring(svg(Picture(9, 9, (Text((1, 2), "a<b & 'c'"),))))
    assert [element.text for element in tree] == [None, "a<b & 'c'"]
