"""Pictures of lines, dots and texts, written as SVG and as PNG from the same description.

Coordinates are pixels, counted from the upper left corner. The same picture gives the same SVG,
byte for byte.
"""

import html
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

TEXT_COLOR = "#333333"
FONT_SIZE = 12  # pixels
DASH = 6  # pixels, followed by a gap of GAP
GAP = 4
PNG_SCALE = 2  # pixels of the PNG for one of the picture, for screens that have as many
OVERSAMPLING = 2  # a PNG is drawn larger by this factor and then reduced, for smooth edges


@dataclass(frozen=True)
class Line:
    """A line through points, at least two."""

    points: tuple[Point, ...]
    color: str
    width: float = 1
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A filled circle around a point."""

    center: Point
    color: str
    width: float  # the diameter


@dataclass(frozen=True)
class Text:
    """A text whose baseline starts, has its middle or ends at a point.

    upright: whether the text is turned by a quarter, so that it reads from bottom to top.
    """

    place: Point
    content: str
    anchor: Anchor = "middle"
    color: str = TEXT_COLOR
    bold: bool = False
    upright: bool = False


Shape = Line | Dot | Text


@dataclass(frozen=True)
class Picture:
    """Shapes on a white ground; later ones lie above earlier ones."""

    width: int
    height: int
    shapes: tuple[Shape, ...]


# SVG


def svg(picture: Picture) -> str:
    """A picture as the text of an SVG file."""
    size = f'width="{picture.width}" height="{picture.height}"'
    font = f'font-family="sans-serif" font-size="{FONT_SIZE}" fill="{TEXT_COLOR}"'
    box = f'viewBox="0 0 {picture.width} {picture.height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} {font}>'
    ground = f'<rect {size} fill="#ffffff"/>'
    return "\n".join([head, ground, *map(svg_shape, picture.shapes), "</svg>", ""])


def svg_shape(shape: Shape) -> str:
    """One shape as an element of an SVG."""
    match shape:
        case Line():
            places = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
            dashes = f' stroke-dasharray="{DASH} {GAP}"' if shape.dashed else ""
            paint = f'fill="none" stroke="{shape.color}" stroke-width="{shape.width:g}"'
            return f'<polyline points="{places}" {paint}{dashes}/>'
        case Dot():
            x, y = shape.center
            radius = f'r="{shape.width / 2:g}"'
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" {radius} fill="{shape.color}"/>'
        case Text():
            return svg_text(shape)


def svg_text(text: Text) -> str:
    """A text as an element of an SVG."""
    x, y = text.place
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{text.anchor}"'
    if text.color != TEXT_COLOR:
        attributes += f' fill="{text.color}"'
    if text.bold:
        attributes += ' font-weight="bold"'
    if text.upright:
        attributes += f' transform="rotate(-90 {x:.1f} {y:.1f})"'
    return f"<text {attributes}>{html.escape(text.content, quote=False)}</text>"


# PNG


def png(picture: Picture) -> bytes:
    """A picture as the content of a PNG file, PNG_SCALE times as large."""
    scale = PNG_SCALE * OVERSAMPLING
    image = Image.new("RGB", (scale * picture.width, scale * picture.height), "white")
    for shape in picture.shapes:
        match shape:
            case Line():
                draw_line(image, shape, scale)
            case Dot():
                draw_dot(image, shape, scale)
            case Text():
                draw_text(image, shape, scale)
    stream = io.BytesIO()
    image.reduce(OVERSAMPLING).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def draw_line(image: Image.Image, line: Line, scale: int) -> None:
    """Draw a line, with round joints."""
    draw = ImageDraw.Draw(image)
    width = max(1, round(scale * line.width))
    pieces = [line.points]
    if line.dashed:
        pieces = [dash for pair in pairwise(line.points) for dash in dashes(*pair)]
    for piece in pieces:
        places = [(scale * x, scale * y) for x, y in piece]
        draw.line(places, fill=line.color, width=width, joint="curve")


def dashes(start: Point, end: Point) -> Iterator[tuple[Point, ...]]:
    """The dashes of a straight line.

    >>> [piece for piece in dashes((0, 5), (18, 5))]
    [((0.0, 5.0), (6.0, 5.0)), ((10.0, 5.0), (16.0, 5.0))]
    """
    length = ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
    at = 0.0
    while at < length:
        yield between(start, end, at / length), between(start, end, min(1, (at + DASH) / length))
        at += DASH + GAP


def between(start: Point, end: Point, share: float) -> Point:
    """The point at a share of the way from start to end."""
    x = start[0] + share * (end[0] - start[0])
    y = start[1] + share * (end[1] - start[1])
    return float(x), float(y)


def draw_dot(image: Image.Image, dot: Dot, scale: int) -> None:
    """Draw a filled circle."""
    x = scale * dot.center[0]
    y = scale * dot.center[1]
    radius = scale * dot.width / 2
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=dot.color)


def draw_text(image: Image.Image, text: Text, scale: int) -> None:
    """Draw a text in the font that Pillow brings along.

    That font has no bold face, so bold letters get a stroke around them.
    """
    font = ImageFont.load_default(size=scale * FONT_SIZE)
    stroke = scale // 4 if text.bold else 0
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    x = scale * text.place[0]
    y = scale * text.place[1]
    if not text.upright:
        draw = ImageDraw.Draw(image)
        draw.text((x, y), text.content, text.color, font, anchor, stroke_width=stroke)
        return
    # A mask with the place in its middle, turned around it.
    half = int(font.getlength(text.content)) + scale * FONT_SIZE
    mask = Image.new("L", (2 * half, 2 * half))
    ImageDraw.Draw(mask).text((half, half), text.content, 255, font, anchor, stroke_width=stroke)
    corner = (round(x) - half, round(y) - half)
    image.paste(text.color, corner, mask.transpose(Image.Transpose.ROTATE_90))
