"""Blocks as one HTML page, which needs no other file, no network and no script.

The page is written by the template index.html.j2, which escapes every text. Pictures are inside the
page as long as it stays small; beyond that, it links to their files.
"""

import base64
import functools
import html as stdlib_html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from results import drawing
from results.blocks import Block, Heading, Table, anchor
from results.files import content_of
from results.thumbnails import thumbnail

TEMPLATE = "index.html.j2"
NARROW = 640  # pixels: a drawing that is not wider fits on a phone, with larger letters
MOST_PICTURE_BYTES = 1_200_000  # of all pictures inside the page, in base 64
SYMBOLS = {  # a status is recognised without its colour, too
    "reproduced": "✓",
    "gap": "✕",
    "shortened": "◔",
    "other protocol": "≠",
    "not measured": "∅",
    "not run": "○",
}
INLINE = re.compile(
    r"`(?P<code>[^`]+)`"
    r"|\*\*(?P<bold>[^*]+)\*\*"
    r"|(?<![\w*])\*(?P<slanted>[^\s*](?:[^*]*[^\s*])?)\*(?![\w*])"
    r"|\[(?P<label>[^\]]+)\]\((?P<target>[^)\s]+)\)"
    r"|(?P<url>https?://[^\s<>()]*[^\s<>().,;:])"
)
SAFE_TARGET = re.compile(r"https?://|[\w./#-][^:]*$")  # no other scheme, such as javascript:
NUMBER = re.compile(r"[≤+-]?\s?[\d.,]+( ?[%a-zA-Z]{1,3})?( ± [\d.,]+)?( \(n=\d+\))?")
NOTHING = ("", "-")


@dataclass
class Resources:
    """The files that a page shows.

    root: the results folder. new: files that are not written to it yet.
    thumbnails: those that the page shows, by their path. used: bytes of the pictures inside it.
    """

    root: Path
    new: Mapping[Path, bytes]
    thumbnails: dict[Path, bytes] = field(default_factory=dict)
    used: int = 0

    def source(self, file: str) -> str:
        """The `src` of a picture: its thumbnail as data, or its file where the page is full.

        file: its path from the results folder.

        ValueError: the file is not a readable picture.
        """
        path = self.root / file
        content = self.new.get(path) or content_of(path)
        if content is None:
            return file
        kind = "image/svg+xml"
        if path.suffix != ".svg":
            kind = "image/webp"
            name, content = thumbnail(content, path, self.root)
            self.thumbnails[name] = content
        encoded = base64.b64encode(content).decode()
        if self.used + len(encoded) > MOST_PICTURE_BYTES:
            return file
        self.used += len(encoded)
        return f"data:{kind};base64,{encoded}"


@dataclass(frozen=True)
class Section:
    """A heading of level 2 and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def html(
    title: str, lead: str, summary: Mapping[str, int], blocks: Sequence[Block], files: Resources
) -> str:
    """A page with a title, a first paragraph, the number of claims by status, and blocks.

    The blocks start with a heading of level 2. lead: a text as in a `Paragraph`.
    """
    return template().render(
        title=title, lead=lead, summary=summary, sections=sections(blocks), source=files.source
    )


@functools.cache
def template() -> Template:
    """The template of the page, with the filters that it uses."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "anchor": anchor,
        "cells": cells_of,
        "inline": inline,
        "kind": lambda block: type(block).__name__,
        "svg": inline_svg,
        "together": together,
    }
    environment.globals |= {"symbols": SYMBOLS}
    return environment.get_template(TEMPLATE)


def sections(blocks: Sequence[Block]) -> list[Section]:
    """Blocks by the headings of level 2 among them.

    >>> [(part.title, len(part.blocks)) for part in sections([Heading("a"), Heading("b", 3)])]
    [('a', 1)]
    """
    parts: list[tuple[str, list[Block]]] = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            parts.append((block.text, []))
        else:
            parts[-1][1].append(block)
    return [Section(*part) for part in parts]


def inline(text: str) -> Markup:
    """A text as HTML: `code`, **bold**, *slanted*, links, addresses; the rest is escaped.

    >>> inline("**a** < [b](c.md)")
    Markup('<strong>a</strong> &lt; <a href="c.md">b</a>')
    """
    parts = []
    end = 0
    for match in INLINE.finditer(text):
        parts += [escape(text[end : match.start()]), marked(match)]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def marked(match: re.Match[str]) -> Markup:
    """One piece of `inline` that is not plain text. A link that is not safe stays text."""
    words = match.groupdict()
    if words["code"]:
        return Markup("<code>{}</code>").format(words["code"])
    if words["bold"]:
        return Markup("<strong>{}</strong>").format(inline(words["bold"]))
    if words["slanted"]:
        return Markup("<em>{}</em>").format(inline(words["slanted"]))
    if words["url"]:
        return Markup('<a href="{0}">{0}</a>').format(words["url"])
    if not SAFE_TARGET.match(words["target"]):
        return escape(match[0])
    return Markup('<a href="{}">{}</a>').format(words["target"], inline(words["label"]))


def cells_of(table: Table) -> dict[str, Any]:
    """A table as the template reads it.

    Returns:
        kinds: of the columns: `state` (a status), `number`, `text` (long), `phrase`, `words`.
        rows: the cells, and whether the row is `to do`.
    """
    columns = [[row[k] for row in table.rows] for k in range(len(table.columns))]
    kinds = [kind_of(name, cells) for name, cells in zip(table.columns, columns, strict=True)]
    rows = [{"cells": row, "is_to_do": "not run" in row} for row in table.rows]
    return {"kinds": kinds, "rows": rows}


def kind_of(name: str, cells: Sequence[str]) -> str:
    """How a column is set: see `cells_of`."""
    filled = [cell for cell in cells if cell not in NOTHING]
    if name == "status":
        return "state"
    if filled and all(NUMBER.fullmatch(cell) for cell in filled):
        return "number"
    longest = max(map(len, filled), default=0)
    if longest > 40:
        return "text"
    if longest > 18:
        return "phrase"
    return "words"


def together(blocks: Sequence[Block]) -> list[Sequence[Block]]:
    """Blocks one by one, except for pictures that follow one another, which stand together."""
    groups: list[list[Block]] = []
    for block in blocks:
        if groups and is_picture(block) and is_picture(groups[-1][-1]):
            groups[-1].append(block)
        else:
            groups.append([block])
    return list(groups)


def is_picture(block: Block) -> bool:
    """Whether a block is a picture or a drawing."""
    return type(block).__name__ in ("Picture", "Drawing")


def inline_svg(picture: drawing.Picture, caption: str) -> Markup:
    """A drawing as an element of the page, which style sheets reach."""
    classes = ""
    if picture.width <= NARROW:
        classes = 'class="narrow" '
    label = f'<svg role="img" {classes}aria-label="{stdlib_html.escape(caption)}" '
    element = drawing.svg(picture).replace('<svg xmlns="http://www.w3.org/2000/svg" ', label, 1)
    return Markup(element)  # `drawing.svg` escapes its texts
