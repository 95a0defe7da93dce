"""The parts of which the sections of the results page consist, and their Markdown.

A section is a list of blocks. The short README.md and the whole index.html are made from the same
blocks, so that no figure is formatted twice.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from results import drawing
from results.formats import table


@dataclass(frozen=True)
class Heading:
    """A heading. level: 2 for a section, 3 for a part of it."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text. Of Markdown it may use `code`, **bold** and [links](target)."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of texts, each as in a `Paragraph`."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table. Each cell is a text as in a `Paragraph`; every row has one for each column."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    empty: str = "None yet."  # what stands in the place of a table without rows


@dataclass(frozen=True)
class Code:
    """Lines of code, or a command. language: as GitHub names it."""

    text: str
    language: str = "bash"


@dataclass(frozen=True)
class Picture:
    """A picture. file: its path from the results folder. caption: what it shows, in words."""

    file: str
    caption: str


@dataclass(frozen=True)
class Drawing:
    """A drawing. file: where it is as SVG, as in `Picture`; empty: on the whole page only."""

    picture: drawing.Picture
    caption: str
    file: str = ""


@dataclass(frozen=True)
class Fold:
    """Blocks behind a title, which a reader opens."""

    title: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Bullets | Table | Code | Picture | Drawing | Fold


def anchor(text: str) -> str:
    """The name by which links reach a heading of the whole page, `index.html#<anchor>`.

    >>> anchor("Glow's Figure 3"), anchor("glow_cifar10/cpu-seed0")
    ('glow-s-figure-3', 'glow_cifar10-cpu-seed0')
    """
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


def markdown(blocks: Sequence[Block]) -> list[str]:
    """The lines of the blocks in GitHub's Markdown, with an empty line after each block.

    >>> markdown([Heading("Speed"), Bullets(["a", "b"])])
    ['## Speed', '', '* a', '* b', '']
    """
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading(text, level):
                lines += [f"{'#' * level} {text}", ""]
            case Paragraph(text):
                lines += [text, ""]
            case Bullets(items):
                lines += [*(f"* {item}" for item in items), ""]
            case Table(columns, rows, empty):
                lines += table(list(columns), [list(row) for row in rows], empty)
            case Code(text, language):
                lines += [f"```{language}", *text.splitlines(), "```", ""]
            case Picture(file, caption):
                lines += [f"![{caption}]({file})", ""]
            case Drawing(_, caption, file):
                if file:
                    lines += [f"![{caption}]({file})", ""]
            case Fold(title, inner):
                lines += ["<details>", f"<summary>{title}</summary>", "", *markdown(inner)]
                lines += ["</details>", ""]
    return lines
