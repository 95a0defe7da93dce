"""The chart of all runs of one claim: validation over images seen, beside the paper's value.

Runs differ in their budgets by orders of magnitude, so the axis of images is logarithmic. Published
points of other implementations are diamonds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from results import printed
from results.curves import (
    AXIS_COLOR,
    GRID_COLOR,
    PAPER_COLOR,
    TICKS,
    Pixels,
    axis_label,
    drawable,
    limits,
    pieces_inside,
    thinned,
    tick_labels,
    ticks,
)
from results.drawing import FONT_SIZE, Dot, Line, Picture, Point, Shape, Text
from results.formats import count
from results.reimplementations import Published

WIDTH = 880  # pixels, as the next five
HEIGHT = 400
LEFT = 64
RIGHT = 290  # of it the labels of the lines have most
TOP = 16
BOTTOM = 48
COLORS = ("#0550ae", "#9a6700", "#116329", "#8250df", "#bf3989", "#57606a")
POINT_COLOR = "#57606a"
POINT_SIZE = 5  # pixels from the middle of a diamond to its corners
LETTERS = 42  # the most of a label beside the plot
SPACING = FONT_SIZE + 3  # pixels from one label to the next


@dataclass(frozen=True)
class Series:
    """The points (images, value) of a run or of a publication, and the name beside its line."""

    points: list[Point]
    label: str
    color: str
    is_published: bool = False


def progress(
    runs: Sequence[Mapping], claim: Mapping, published: Sequence[Published] = ()
) -> Picture | None:
    """The validation of all runs beside a claim; None where no run has two values to draw.

    runs: recorded runs (`results.runs`) that are compared with the claim, the best one first.
    claim: its `metric`, `value`, `decimals`, `unit` and `direction` are read.
    """
    name = claim["metric"].partition("/")[2]
    lines = all_series(runs, name)
    if not lines:
        return None
    settled = [y for line in lines for _, y in line.points[len(line.points) // 2 :]]
    shown = [claim["value"], *(point.value for point in published)]
    lines += published_series(published)
    images = [x for line in lines for x, _ in line.points]
    low, high = limits(settled, shown, claim["direction"])
    decades = (math.floor(math.log10(min(images))), math.ceil(math.log10(max(images))))
    at = pixels(decades, low, high)
    shapes = [*values_axis(at, low, high, axis_label(name, claim["unit"]))]
    shapes += images_axis(at, decades, low)
    shapes += paper_line(claim, at, decades)
    shapes += [shape for line in reversed(lines) for shape in marks(line, at, low, high)]
    return Picture(WIDTH, HEIGHT, (*shapes, *labels(lines, at, low, high)))


def all_series(runs: Sequence[Mapping], name: str) -> list[Series]:
    """The lines of val/<name> of all runs that have at least two values of it."""
    lines: list[Series] = []
    for run in runs:
        rows = [(row.get("images"), row.get(f"val/{name}")) for row in run.get("curve") or []]
        points = [(x, y) for x, y in rows if drawable(x) and drawable(y) and x >= 1]
        if len(points) >= 2:
            color = COLORS[len(lines) % len(COLORS)]
            lines.append(Series(thinned(points), shortened(run["run"]), color))
    return lines


def published_series(published: Sequence[Published]) -> list[Series]:
    """The published figures, those of one implementation together."""
    by_label: dict[str, list[Point]] = {}
    for point in sorted(published, key=lambda point: point.images):
        by_label.setdefault(point.label, []).append((point.images, point.value))
    return [
        Series(points, shortened(label), POINT_COLOR, is_published=True)
        for label, points in by_label.items()
    ]


def shortened(label: str) -> str:
    """A name beside a line, with at most LETTERS letters."""
    if len(label) <= LETTERS:
        return label
    return f"{label[: LETTERS - 1]}…"


# Where it is shown


def pixels(decades: tuple[int, int], low: float, high: float) -> Pixels:
    """The map from (images, value) to pixels. decades: powers of ten at the ends of the axis."""
    first, last = decades

    def at(images: float, value: float) -> Point:
        right = (math.log10(images) - first) / (max(last, first + 1) - first)
        up = (value - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    return at


def values_axis(at: Pixels, low: float, high: float, label: str) -> list[Shape]:
    """The vertical axis: lines across the plot, numbers beside them, and its label."""
    values = ticks(low, high, TICKS)
    shapes: list[Shape] = []
    for value, number in zip(values, tick_labels(values), strict=True):
        y = at(1, value)[1]
        shapes.append(Line(((LEFT, y), (WIDTH - RIGHT, y)), GRID_COLOR))
        shapes.append(Text((LEFT - 8, y + 4), number, "end"))
    return [*shapes, Text((14, (TOP + HEIGHT - BOTTOM) / 2), label, upright=True)]


def images_axis(at: Pixels, decades: tuple[int, int], low: float) -> list[Shape]:
    """The horizontal axis: a line below the plot, its powers of ten, and its label."""
    bottom = HEIGHT - BOTTOM
    shapes: list[Shape] = [Line(((LEFT, bottom), (WIDTH - RIGHT, bottom)), AXIS_COLOR)]
    for power in range(decades[0], max(decades[1], decades[0] + 1) + 1):
        x = at(10.0**power, low)[0]
        shapes.append(Line(((x, bottom), (x, bottom + 4)), AXIS_COLOR))
        shapes.append(Text((x, bottom + 18), count(10.0**power)))
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*shapes, Text((middle, HEIGHT - 8), "training images seen, logarithmic")]


def paper_line(claim: Mapping, at: Pixels, decades: tuple[int, int]) -> list[Shape]:
    """The value of a claim, dashed across the plot."""
    y = at(1, claim["value"])[1]
    label = f"paper {printed(claim['value'], claim)}"
    line = Line(((LEFT, y), (WIDTH - RIGHT, y)), PAPER_COLOR, 1.5, dashed=True)
    return [line, Text((LEFT + 6, y - 5), label, "start", PAPER_COLOR, bold=True)]


def marks(line: Series, at: Pixels, low: float, high: float) -> list[Shape]:
    """A line with dots at its points; a published one is thinner, with diamonds."""
    shapes: list[Shape] = []
    width = {True: 1, False: 2}[line.is_published]
    for piece in pieces_inside(line.points, low, high):
        shapes.append(Line(tuple(at(*point) for point in piece), line.color, width))
    for x, y in line.points:
        if low <= y <= high and line.is_published:
            shapes.append(diamond(at(x, y)))
        elif low <= y <= high:
            shapes.append(Dot(at(x, y), line.color, 5))
    return shapes


def diamond(place: Point) -> Line:
    """A diamond around a point, of which both are in pixels."""
    x, y = place
    size = POINT_SIZE
    corners = ((x, y - size), (x + size, y), (x, y + size), (x - size, y), (x, y - size))
    return Line(corners, POINT_COLOR, 1.5)


def labels(lines: list[Series], at: Pixels, low: float, high: float) -> list[Shape]:
    """The names of the lines beside the plot, at the height of their last points if there is room.

    A line in its colour joins the name to the end of the run.
    """
    ends = []
    for line in lines:
        x, y = line.points[-1]
        ends.append((at(x, min(max(y, low), high)), line))
    ends.sort(key=lambda end: end[0][1])
    heights = spread([place[1] for place, _ in ends], SPACING, TOP + SPACING, HEIGHT - BOTTOM)
    shapes: list[Shape] = []
    left = WIDTH - RIGHT + 14
    for (place, line), y in zip(ends, heights, strict=True):
        shapes.append(Line((place, (left - 4, y)), line.color, 0.75))
        bold = not line.is_published
        shapes.append(Text((left, y + 4), line.label, "start", line.color, bold=bold))
    return shapes


def spread(heights: list[float], spacing: float, top: float, bottom: float) -> list[float]:
    """Sorted heights, moved apart so that neighbours have at least a spacing between them.

    >>> spread([10, 12, 40], 10, 0, 100), spread([95, 99], 10, 0, 100)
    ([10, 20, 40], [90, 100])
    """
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, top))
        top = moved[-1] + spacing
    limit = bottom
    for k in reversed(range(len(moved))):
        moved[k] = min(moved[k], limit)
        limit = moved[k] - spacing
    return moved
