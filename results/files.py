"""Files as results keep them: written in one step, read with checks, without a machine's paths, pictures small."""

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from results import is_number

PICTURE_BYTES = 200_000  # a repository keeps every version of a picture for good


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def checked_json(
    path: Path, faults: Callable[[Any], list[str]], damaged: str, unusable: str
) -> Any:
    """The content of a JSON file in which `faults` finds nothing.

    Args:
        path: the file.
        faults: takes the content; returns the keys that it lacks, or whose values are of no use.
        damaged: what is said of a file that is not JSON or not text, with {problem} for the reason.
        unusable: what is said of a file with faults, with {problem} for their keys.

    Raises:
        ValueError: one line, the path and one of the two texts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} {damaged.format(problem=error)}") from error
    if keys := faults(content):
        raise ValueError(f"{path} {unusable.format(problem=', '.join(keys))}")
    return content


def lacking(mapping: object, keys: list[str]) -> list[str]:
    """The keys that a mapping does not have; all of them when it is no mapping."""
    return [key for key in keys if not isinstance(mapping, dict) or key not in mapping]


def number(cell: str | None) -> int | float | None:
    """A cell of a table: '' is None, '3' an int, '3.5' a float."""
    cell = (cell or "").strip()
    return int(cell) if re.fullmatch(r"-?\d+", cell) else float(cell) if cell else None


def portable(value: Any) -> Any:
    """A value as others may read it: an absolute path, also after `key=`, becomes its last part; NaN becomes None."""
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [portable(part) for part in value]
    if isinstance(value, float) and not is_number(value):
        return None
    if isinstance(value, str):
        key, equals, path = ("", "", value) if value.startswith("/") else value.partition("=")
        return key + equals + Path(path).name if path.startswith("/") else value
    return value


def small_png(path: Path) -> bytes:
    """A picture as a PNG below PICTURE_BYTES, smaller where it must be. ValueError, one line: not readable."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is not a readable picture ({error}): delete it or make it again"
        ) from error
    while True:
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        if stream.tell() < PICTURE_BYTES:
            return stream.getvalue()
        image = image.resize(
            (max(1, image.width * 4 // 5), max(1, image.height * 4 // 5)), Image.Resampling.LANCZOS
        )
