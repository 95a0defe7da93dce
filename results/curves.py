"""The curve of a run as SVG: training and validation over images seen.

The same run gives the same bytes, so that the page can be made again and compared.
"""

import math
from collections.abc import Callable

from results import is_number, printed
from results.formats import count

WIDTH = 640  # pixels, as the next five
HEIGHT = 320
LEFT = 64  # margins of the plot
RIGHT = 24
TOP = 36
BOTTOM = 48
COLORS = {"train": "#9a6700", "val": "#0550ae"}
PAPER_COLOR = "#cf222e"
POINTS = 400  # the most that a line has, about
LARGEST = 1e30  # values beyond it are not drawn, like those that are not finite

Point = tuple[float, float]
Pixels = Callable[[float, float], Point]


def curve_svg(run: dict, claims: list[dict]) -> str | None:
    """Training and validation curve over images seen, as SVG; None if there is no curve.

    The run's claim on the metric of the curve, if there is one, is drawn as a dashed line.
    """
    name, lines = series(run)
    if not lines:
        return None
    on_curve = [claim for claim in claims if claim["metric"].partition("/")[2] == name][:1]
    metric = run.get("metric") or {}  # older runs have none: lower was better in all of them
    points = [point for line in lines.values() for point in line]
    values = [y for _, y in points]
    claimed = [claim["value"] for claim in on_curve]
    x_ticks = ticks(0, max([1, *(x for x, _ in points)]), 6)
    y_ticks = ticks(*limits(values, claimed, metric.get("direction", "lower")), 5)
    at = pixels(x_ticks, y_ticks)
    title = f"{run['experiment']}, {name}"
    if metric:
        title += f" ({metric['unit']})"
    parts = [*frame(title, at, x_ticks, y_ticks), *polylines(lines, at)]
    for claim in on_curve:
        parts += paper_line(claim, at)
    return "\n".join([*parts, "</svg>", ""])


def series(run: dict) -> tuple[str, dict[str, list[Point]]]:
    """The metric of the curve (bpd, nll ..), and the points (images, value) of train and val.

    Long lines are thinned to about POINTS points.
    """
    rows = run.get("curve") or []
    names = [key.removeprefix("val/") for row in rows for key in row if key.startswith("val/")]
    claimed = [comparison["metric"].partition("/")[2] for comparison in run["comparisons"]]
    name = next((metric for metric in claimed if metric in names), next(iter(names), "bpd"))
    lines = {}
    for split in COLORS:
        points = [(row.get("images"), row.get(f"{split}/{name}")) for row in rows]
        lines[split] = thinned([(x, y) for x, y in points if drawable(x) and drawable(y)])
    return name, {split: points for split, points in lines.items() if points}


def drawable(value: object) -> bool:
    """Whether a value has a place in a plot."""
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
    """About n round numbers that enclose [low, high].

    >>> ticks(3.4, 4.1, 5)
    [3.4, 3.6, 3.8, 4.0, 4.2]
    """
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if step >= rough * (1 - 1e-9))
    first = math.floor(low / step)
    last = math.ceil(high / step - 1e-9)
    return [round(step * k, 9) for k in range(first, last + 1)]


def pixels(x_ticks: list[float], y_ticks: list[float]) -> Pixels:
    """The map from a point to its pixels.

    The plot shows x from 0 to the last tick, and y from the first tick to the last.
    """

    def at(x: float, y: float) -> Point:
        right = x / x_ticks[-1]
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + (WIDTH - LEFT - RIGHT) * right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up

    return at


def text(x: float, y: float, content: str, anchor: str, more: str = "") -> str:
    """An SVG text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{content}</text>'


def frame(title: str, at: Pixels, x_ticks: list[float], y_ticks: list[float]) -> list[str]:
    """The SVG's head, title, grid and tick labels."""
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM
    size = f'width="{WIDTH}" height="{HEIGHT}"'
    font = 'font-family="sans-serif" font-size="12" fill="#333333"'
    plot = f"M{LEFT} {TOP}H{right}V{bottom}H{LEFT}Z"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        f'<rect {size} fill="#ffffff"/>',
        text(LEFT, 20, title, "start", ' font-weight="bold"'),
        f'<clipPath id="plot"><path d="{plot}"/></clipPath>',
    ]
    for value in y_ticks:
        y = at(0, value)[1]
        lines.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#dddddd"/>')
        lines.append(text(LEFT - 8, y + 4, f"{value:.7g}", "end"))
    for value in x_ticks:
        x = at(value, y_ticks[0])[0]
        lines.append(text(x, bottom + 18, count(value), "middle"))
    lines.append(text((LEFT + right) / 2, HEIGHT - 8, "images seen", "middle"))
    return lines


def polylines(lines: dict[str, list[Point]], at: Pixels) -> list[str]:
    """Each series as a line, with dots where it has few points, and its name at the top right."""
    parts = []
    for k, (split, points) in enumerate(lines.items()):
        color = COLORS[split]
        places = [f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points)]
        paint = f'fill="none" stroke="{color}" stroke-linecap="round" clip-path="url(#plot)"'
        parts.append(f'<polyline points="{" ".join(places)}" {paint} stroke-width="1.5"/>')
        if len(places) <= 40:
            dots = "".join(f"M{place}h0" for place in places)
            parts.append(f'<path d="{dots}" {paint} stroke-width="5"/>')
        bold = f' fill="{color}" font-weight="bold"'
        parts.append(text(WIDTH - RIGHT - 50 * k, 20, split, "end", bold))
    return parts


def paper_line(claim: dict, at: Pixels) -> list[str]:
    """The value of a claim, dashed across the plot."""
    y = at(0, claim["value"])[1]
    label = f"paper {printed(claim['value'], claim)}"
    line = (
        f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{PAPER_COLOR}" stroke-dasharray="6 4"/>'
    )
    return [line, text(LEFT + 6, y - 5, label, "start", f' fill="{PAPER_COLOR}"')]
