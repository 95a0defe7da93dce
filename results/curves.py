"""The curve of a run: training and validation over images seen, beside the paper's value.

A run draws it as curve.png, and the results page as SVG, both from the same `Picture`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

from results import is_number, printed
from results.drawing import Dot, Line, Picture, Point, Shape, Text
from results.formats import count

WIDTH = 640  # pixels, as the next eight
HEIGHT = 320
LEFT = 76  # margins of the plot
RIGHT = 24
TOP = 36
BOTTOM = 48
HEADING = 20  # of the baseline of title and legend
LEGEND = 50  # from one entry of the legend to the next
COLORS = {"train": "#9a6700", "val": "#0550ae"}
GRID_COLOR = "#dddddd"
AXIS_COLOR = "#888888"
PAPER_COLOR = "#cf222e"
POINTS = 400  # the most that a line has, about
DOTTED = 40  # the most points of a line that has a dot at each
TITLE = 60  # the most letters of a title, so that it does not touch the legend
TICKS = 6  # about the most numbers at an axis; at least half as many
LARGEST = 1e30  # values beyond it are not drawn, like those that are not finite
UNITS = {"bpd": "bits/dim", "nll": "nats"}  # of older runs, which were recorded without

Row = Mapping[str, Any]
Pixels = Callable[[float, float], Point]


def run_curve(run: dict, claims: list[dict], title: str | None = None) -> Picture | None:
    """The curve of a recorded run; None if it has none.

    claims: those with which the run is compared.
    title: by default `title_of` the run.
    """
    rows = run.get("curve") or []
    metric = run.get("metric") or {}
    unit = metric.get("unit", UNITS.get(metric_name(rows), ""))
    direction = metric.get("direction", "lower")  # in all older runs, which have no metric
    if title is None:
        title = title_of(run["experiment"], run["run"])
    return curve(rows, title, unit, direction, claims)


def title_of(experiment: str, run: str) -> str:
    """The title of a run's curve."""
    return f"{experiment}, run {run}"


def curve(
    rows: Sequence[Row], title: str, unit: str, direction: str, claims: Sequence[Mapping]
) -> Picture | None:
    """train/M and val/M over images seen; None if no value of them can be drawn.

    rows: of curve.csv, with `images` and the values of one metric M; missing values are None.
    unit, direction: of M. direction is "lower" or "higher", whichever is better.
    claims: those with which the run can be compared, each with its `metric`, `value` and
        `decimals`. The claim on M, if there is one, is drawn as a dashed line.
    """
    name = metric_name(rows)
    lines = series(rows, name)
    if not lines:
        return None
    on_curve = [claim for claim in claims if claim["metric"].partition("/")[2] == name][:1]
    points = [point for line in lines.values() for point in line]
    values = [y for _, y in points]
    claimed = [claim["value"] for claim in on_curve]
    most = max([1, *(x for x, _ in points)])
    low, high = limits(values, claimed, direction)
    at = pixels(most, low, high)
    shapes = heading(title, list(lines))
    shapes += images_axis(at, ticks(0, most, TICKS), low)
    shapes += values_axis(at, ticks(low, high, TICKS), axis_label(name, unit))
    for claim in on_curve:
        shapes += paper_line(claim, at)
    for split, line in lines.items():
        shapes += plotted(line, at, low, high, COLORS[split])
    return Picture(WIDTH, HEIGHT, tuple(shapes))


# What is shown


def metric_name(rows: Sequence[Row]) -> str:
    """The metric M of a curve's columns train/M and val/M; empty if there are none."""
    names = [key.partition("/")[2] for row in rows for key in row if "/" in key]
    return next(iter(names), "")


def series(rows: Sequence[Row], name: str) -> dict[str, list[Point]]:
    """The points (images, value) of train and val, without a split that has none.

    Long lines are thinned to about POINTS points.
    """
    lines = {}
    for split in COLORS:
        points = [(row.get("images"), row.get(f"{split}/{name}")) for row in rows]
        lines[split] = thinned([(x, y) for x, y in points if drawable(x) and drawable(y)])
    return {split: points for split, points in lines.items() if points}


def drawable(value: object) -> TypeGuard[float]:
    """True for a value that has a place in a plot."""
    return is_number(value) and abs(value) < LARGEST


def thinned(points: list[Point]) -> list[Point]:
    """Every n-th point, counted from the last one, which is kept."""
    step = math.ceil(len(points) / POINTS) or 1
    return points[::-step][::-1]


def limits(
    values: list[float], claimed: list[float], direction: str = "lower"
) -> tuple[float, float]:
    """The lowest and the highest value of the axis.

    Values that are far worse than nine tenths of all are left outside: those of the first steps
    would flatten the rest.

    values: of the lines.
    claimed: the paper's value, which the axis always shows; may be empty.
    direction: "lower" or "higher", whichever is better.
    """
    sign = {"lower": 1, "higher": -1}[direction]
    losses = sorted(sign * value for value in values)
    best = losses[0]
    worse = losses[math.ceil(0.9 * len(losses)) - 1]
    shown = [value for value in values if sign * value <= worse + (worse - best)] + claimed
    room = 0.05 * (max(shown) - min(shown)) or 0.05 * abs(shown[0]) or 1.0
    room = max(room, 1e-6)  # ticks have 9 decimals
    return min(shown) - room, max(shown) + room


def ticks(low: float, high: float, n: int) -> list[float]:
    """About n round numbers in [low, high].

    >>> ticks(3.34, 4.1, 4)
    [3.4, 3.6, 3.8, 4.0]
    """
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * k, 9) for k in range(first, last + 1)]


def tick_labels(values: list[float]) -> list[str]:
    """Numbers with as many decimals as the one that needs most.

    >>> tick_labels([3.5, 3.75, 4.0]), tick_labels([5e8, 1e9])
    (['3.50', '3.75', '4.00'], ['5e+08', '1e+09'])
    """
    labels = [f"{value:.7g}" for value in values]
    if any("e" in label for label in labels):
        return labels
    decimals = max(len(label.partition(".")[2]) for label in labels)
    return [f"{value:.{decimals}f}" for value in values]


def axis_label(name: str, unit: str) -> str:
    """`bpd (bits/dim)`; the name alone without a unit."""
    if unit:
        return f"{name} ({unit})"
    return name


# Where it is shown


def pixels(most: float, low: float, high: float) -> Pixels:
    """The map from a point to its pixels: the plot shows x in [0, most] and y in [low, high]."""

    def at(x: float, y: float) -> Point:
        right = x / most
        up = (y - low) / (high - low)
        return LEFT + (WIDTH - LEFT - RIGHT) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    return at


def heading(title: str, splits: list[str]) -> list[Shape]:
    """The title on the left, and on the right the names of the lines in their colours."""
    if len(title) > TITLE:
        title = f"{title[: TITLE - 1]}…"
    shapes: list[Shape] = []
    if title:
        shapes.append(Text((LEFT, HEADING), title, "start", bold=True))
    for k, split in enumerate(reversed(splits)):
        place = (WIDTH - RIGHT - LEGEND * k, HEADING)
        shapes.append(Text(place, split, "end", COLORS[split], bold=True))
    return shapes


def images_axis(at: Pixels, values: list[float], low: float) -> list[Shape]:
    """The horizontal axis: a line below the plot, counts of images below it, and its label."""
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM
    shapes: list[Shape] = [Line(((LEFT, bottom), (right, bottom)), AXIS_COLOR)]
    for value in values:
        x = at(value, low)[0]
        shapes.append(Line(((x, bottom), (x, bottom + 4)), AXIS_COLOR))
        shapes.append(Text((x, bottom + 18), count(value)))
    return [*shapes, Text(((LEFT + right) / 2, HEIGHT - 8), "training images seen")]


def values_axis(at: Pixels, values: list[float], label: str) -> list[Shape]:
    """The vertical axis: lines across the plot, numbers beside them, and its label."""
    shapes: list[Shape] = []
    for value, number in zip(values, tick_labels(values), strict=True):
        y = at(0, value)[1]
        shapes.append(Line(((LEFT, y), (WIDTH - RIGHT, y)), GRID_COLOR))
        shapes.append(Text((LEFT - 8, y + 4), number, "end"))
    return [*shapes, Text((16, (TOP + HEIGHT - BOTTOM) / 2), label, upright=True)]


def plotted(points: list[Point], at: Pixels, low: float, high: float, color: str) -> list[Shape]:
    """A line as far as it lies in the plot, with a dot at each point where it has few."""
    shapes: list[Shape] = []
    for piece in pieces_inside(points, low, high):
        shapes.append(Line(tuple(at(*point) for point in piece), color, 1.5))
    if len(points) <= DOTTED:
        shapes += [Dot(at(x, y), color, 5) for x, y in points if low <= y <= high]
    return shapes


def pieces_inside(points: list[Point], low: float, high: float) -> list[list[Point]]:
    """The pieces of a line whose values lie in [low, high].

    >>> pieces_inside([(0, 4), (2, 0), (3, 1), (4, 9)], 0, 2)
    [[(1.0, 2), (2, 0), (3, 1), (3.125, 2)]]
    """
    pieces: list[list[Point]] = []
    for start, end in pairwise(points):
        if max(start[1], end[1]) < low or min(start[1], end[1]) > high:
            continue
        first = moved_inside(start, end, low, high)
        last = moved_inside(end, start, low, high)
        if pieces and pieces[-1][-1] == first:
            pieces[-1].append(last)
        else:
            pieces.append([first, last])
    return pieces


def moved_inside(point: Point, other: Point, low: float, high: float) -> Point:
    """A point, or where the line from it to another one enters [low, high]."""
    x, y = point
    bound = min(max(y, low), high)
    if y == bound:
        return point
    return x + (other[0] - x) * (bound - y) / (other[1] - y), bound


def paper_line(claim: Mapping, at: Pixels) -> list[Shape]:
    """The value of a claim, dashed across the plot."""
    y = at(0, claim["value"])[1]
    label = f"paper {printed(claim['value'], claim)}"
    line = Line(((LEFT, y), (WIDTH - RIGHT, y)), PAPER_COLOR, dashed=True)
    return [line, Text((LEFT + 6, y - 5), label, "start", PAPER_COLOR)]
