"""The chart of all runs of one claim: validation over images seen, beside the paper's value.

Runs differ in their budgets by orders of magnitude, so the axis of images is logarithmic. Published
points of other implementations are diamonds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from results import printed
from results.curves import (
    AXIS_COLOR,
    GRID_COLOR,
    PAPER_COLOR,
    TICKS,
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

WIDTH = 800  # pixels, as the next five
HEIGHT = 400
LEFT = 64
RIGHT = 200  # of it the labels of the lines have most
TOP = 16
BOTTOM = 48
COLORS = ("#0550ae", "#9a6700", "#116329", "#8250df", "#bf3989", "#57606a")
POINT_COLOR = "#57606a"
POINT_SIZE = 5  # pixels from the middle of a diamond to its corners
LETTERS = 28  # the most of a label beside the plot
SPACING = FONT_SIZE + 3  # pixels from one label to the next


@dataclass(frozen=True)
class Published:
    """A figure that another implementation published, at a number of training images seen."""

    images: float
    value: float
    label: str


@dataclass(frozen=True)
class Series:
    """The points (images, value) of a run, and the name that stands beside its line."""

    points: list[Point]
    label: str
    color: str


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
    images = [x for line in lines for x, _ in line.points] + [p.images for p in published]
    settled = [y for line in lines for _, y in line.points[len(line.points) // 2 :]]
    shown = [claim["value"], *(point.value for point in published)]
    low, high = limits(settled, shown, claim["direction"])
    decades = (math.floor(math.log10(min(images))), math.ceil(math.log10(max(images))))
    at = pixels(decades, low, high)
    shapes = [*values_axis(at, low, high, axis_label(name, claim["unit"]))]
    shapes += images_axis(at, decades, low)
    shapes += paper_line(claim, at, decades)
    for line in lines:
        for piece in pieces_inside(line.points, low, high):
            shapes.append(Line(tuple(at(*point) for point in piece), line.color, 2))
        shapes += [Dot(at(x, y), line.color, 5) for x, y in line.points if low <= y <= high]
    shapes += [shape for point in published for shape in diamond(point, at)]
    return Picture(WIDTH, HEIGHT, (*shapes, *labels(lines, at, low, high)))


def all_series(runs: Sequence[Mapping], name: str) -> list[Series]:
    """The lines of val/<name> of all runs that have at least two values of it."""
    lines: list[Series] = []
    for run in runs:
        rows = [(row.get("images"), row.get(f"val/{name}")) for row in run.get("curve") or []]
        points = [(x, y) for x, y in rows if drawable(x) and drawable(y) and x >= 1]
        if len(points) >= 2:
            color = COLORS[len(lines) % len(COLORS)]
            lines.append(Series(thinned(points), label_of(run), color))
    return lines


def label_of(run: Mapping) -> str:
    """The name of a run beside its line, shortened to LETTERS."""
    if len(run["run"]) <= LETTERS:
        return run["run"]
    return f"{run['run'][: LETTERS - 1]}…"


# Where it is shown


def pixels(decades: tuple[int, int], low: float, high: float) -> Callable[[float, float], Point]:
    """The map from (images, value) to pixels. decades: powers of ten at the ends of the axis."""
    first, last = decades

    def at(images: float, value: float) -> Point:
        right = (math.log10(images) - first) / (max(last, first + 1) - first)
        up = (value - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    return at


def values_axis(
    at: Callable[[float, float], Point], low: float, high: float, label: str
) -> list[Shape]:
    """The vertical axis: lines across the plot, numbers beside them, and its label."""
    values = ticks(low, high, TICKS)
    shapes: list[Shape] = []
    for value, number in zip(values, tick_labels(values), strict=True):
        y = at(1, value)[1]
        shapes.append(Line(((LEFT, y), (WIDTH - RIGHT, y)), GRID_COLOR))
        shapes.append(Text((LEFT - 8, y + 4), number, "end"))
    return [*shapes, Text((14, (TOP + HEIGHT - BOTTOM) / 2), label, upright=True)]


def images_axis(
    at: Callable[[float, float], Point], decades: tuple[int, int], low: float
) -> list[Shape]:
    """The horizontal axis: a line below the plot, its powers of ten, and its label."""
    bottom = HEIGHT - BOTTOM
    shapes: list[Shape] = [Line(((LEFT, bottom), (WIDTH - RIGHT, bottom)), AXIS_COLOR)]
    for power in range(decades[0], max(decades[1], decades[0] + 1) + 1):
        x = at(10.0**power, low)[0]
        shapes.append(Line(((x, bottom), (x, bottom + 4)), AXIS_COLOR))
        shapes.append(Text((x, bottom + 18), count(10.0**power)))
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*shapes, Text((middle, HEIGHT - 8), "training images seen, logarithmic")]


def paper_line(
    claim: Mapping, at: Callable[[float, float], Point], decades: tuple[int, int]
) -> list[Shape]:
    """The value of a claim, dashed across the plot."""
    y = at(1, claim["value"])[1]
    label = f"paper {printed(claim['value'], claim)}"
    line = Line(((LEFT, y), (WIDTH - RIGHT, y)), PAPER_COLOR, 1.5, dashed=True)
    return [line, Text((LEFT + 6, y - 5), label, "start", PAPER_COLOR, bold=True)]


def diamond(point: Published, at: Callable[[float, float], Point]) -> list[Shape]:
    """A published figure: a diamond around its point, and whose it is."""
    x, y = at(point.images, point.value)
    size = POINT_SIZE
    corners = ((x, y - size), (x + size, y), (x, y + size), (x - size, y), (x, y - size))
    label = Text((x - size - 4, y + 4), point.label, "end", POINT_COLOR)
    return [Line(corners, POINT_COLOR, 1.5), label]


def labels(
    lines: list[Series], at: Callable[[float, float], Point], low: float, high: float
) -> list[Shape]:
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
        shapes.append(Text((left, y + 4), line.label, "start", line.color, bold=True))
    return shapes


def spread(heights: list[float], spacing: float, top: float, bottom: float) -> list[float]:
    """Sorted heights, moved apart so that neighbours have at least a spacing between them.

    >>> spread([10, 12, 40], 10, 0, 100), spread([95, 99], 10, 0, 100)
    ([10, 20, 40], [90, 100])
    """
    moved: list[float] = []
    for height in heights:
        lowest = moved[-1] + spacing if moved else top
        moved.append(max(height, lowest))
    limit = bottom
    for k in reversed(range(len(moved))):
        moved[k] = min(moved[k], limit)
        limit = moved[k] - spacing
    return moved
