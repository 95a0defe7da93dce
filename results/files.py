"""Files of results: written in one step, checked when they are read, without a machine's paths."""

import contextlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml
from PIL import Image

from results import is_number
from results.checks import Check, keys

PICTURE_BYTES = 200_000  # a repository keeps every version of a picture for good
NO_FILES: Mapping[Path, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class Addition:
    """What a finished run or figure adds to the results folder. Nothing of it is written yet.

    files: the content of new files by their path, in the order in which they are written.
    lines: what is printed once they are written.
    """

    files: dict[Path, bytes] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def write(path: Path, content: str | bytes) -> None:
    """Write a file in one step: a reader sees either the old content or all of the new."""
    write_all({path: content})


def write_all(files: Mapping[Path, str | bytes]) -> None:
    """Write files in their order, each in one step. If one cannot be written, none is changed."""
    with contextlib.ExitStack() as undo:
        parts = {}
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path] = path.with_name(f".{path.name}.{os.getpid()}")
            undo.callback(parts[path].unlink, missing_ok=True)
            parts[path].write_bytes(as_bytes(content))
        for path, part in parts.items():
            undo.callback(restore, path, content_of(path))
            part.replace(path)
        undo.pop_all()  # all are written: nothing is undone


def as_bytes(content: str | bytes) -> bytes:
    """Text as UTF-8; bytes as they are."""
    if isinstance(content, str):
        return content.encode()
    return content


def content_of(path: Path) -> bytes | None:
    """The content of a file; None if there is no file."""
    if path.is_file():
        return path.read_bytes()
    return None


def restore(path: Path, content: bytes | None) -> None:
    """Give a file its earlier content back; None removes it."""
    if content is not None:
        path.write_bytes(content)
    elif path.is_file():
        path.unlink()


def is_new_record(path: Path, content: str) -> bool:
    """Whether a record is new. ValueError, one line: the file is there, with other content."""
    if not path.exists():
        return True
    if path.read_text(encoding="utf-8") == content:
        return False
    raise ValueError(
        f"{path} is already recorded, with other content: delete it first to replace it"
    )


def matching_files(root: Path, pattern: str, new: Mapping[Path, bytes] = NO_FILES) -> list[Path]:
    """The files below a folder that match a pattern, with those of `new`, not written yet."""
    unwritten = [path for path in new if path.relative_to(root).match(pattern)]
    return sorted({*Path(root).glob(pattern), *unwritten})


def checked_json(
    path: Path, form: Check, damaged: str, unusable: str, content: bytes | None = None
) -> Any:
    """The value in a JSON file of a certain form.

    Args:
        path: the file.
        form: the check that the value has to pass (`results.checks`).
        damaged: the message if the file is not JSON or not text, with {problem} for the reason.
        unusable: the message if its form is another, with {problem} for the keys that are wrong.
        content: the file's content, if it is not written yet.

    Raises:
        ValueError: one line, the path and one of the two messages.
    """
    if content is None:
        content = path.read_bytes()
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} {damaged.format(problem=error)}") from error
    if faults := keys(form, value):
        raise ValueError(f"{path} {unusable.format(problem=abbreviated(faults))}")
    return value


def checked_yaml(path: Path, form: Check, content: bytes | None = None) -> Any:
    """The value in a YAML file of a certain form; arguments as those of `checked_json`.

    ValueError, one line with the path: the file is not YAML, or the keys that are wrong.
    """
    if content is None:
        content = path.read_bytes()
    try:
        value = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if faults := keys(form, value):
        raise ValueError(f"{path} lacks a usable {abbreviated(faults)}")
    return value


def refuse_constant(name: str) -> NoReturn:
    """ValueError: JSON has no NaN and no Infinity, although Python reads them."""
    raise ValueError(f"{name} is no value of JSON: put null in its place")


def abbreviated(names: list[str], at_most: int = 12) -> str:
    """Names separated by commas; of very many only the first ones, and how many more there are."""
    if len(names) <= at_most:
        return ", ".join(names)
    return f"{', '.join(names[:at_most])} and {len(names) - at_most} more"


def number(cell: str | None) -> int | float | None:
    """A cell of a table: '' is None, '3' an int, '3.5' a float."""
    stripped = (cell or "").strip()
    if not stripped:
        return None
    if re.fullmatch(r"-?\d+", stripped):
        return int(stripped)
    return float(stripped)


IN_LIST = re.compile(r"(?<=[\[, ])/[^,\]]*")  # an absolute path in the text of a list


def portable(value: Any) -> Any:
    """A value without this machine's paths and without NaN.

    An absolute path, also one after `key=`, becomes its last part; a number that is not finite
    becomes None.
    """
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [portable(part) for part in value]
    if isinstance(value, float) and not is_number(value):
        return None
    if isinstance(value, str):
        return portable_text(value)
    return value


def portable_text(value: str) -> str:
    """`/a/b` as `b`, `key=/a/b` as `key=b`, and the same in lists; any other text as it is.

    >>> portable_text("data.root=[/data/train, b/c]")
    'data.root=[train, b/c]'
    """
    key, equals, path = value.partition("=")
    if path.startswith("["):
        return key + equals + IN_LIST.sub(lambda found: Path(found[0]).name, path)
    if value.startswith("/"):
        return Path(value).name
    if path.startswith("/"):
        return key + equals + Path(path).name
    return value


def small_png(path: Path) -> bytes:
    """A picture as a PNG below PICTURE_BYTES, with fewer pixels where that is needed.

    ValueError, one line: the file is not a readable picture.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is not a readable picture ({error}): delete it or make it again"
        ) from error
    while True:
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        if stream.tell() < PICTURE_BYTES:
            return stream.getvalue()
        smaller = (max(1, image.width * 4 // 5), max(1, image.height * 4 // 5))
        image = image.resize(smaller, Image.Resampling.LANCZOS)
