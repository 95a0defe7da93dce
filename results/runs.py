"""Recorded runs: take one in from its run folder, read them back."""

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from results import ROOT, compare, is_number

REQUIRED = [  # what a result.json holds at least
    *("experiment", "run", "preset", "metrics", "paper", "budget", "seed", "commit", "dirty", "config", "versions"),
    *("device", "precision", "tf32", "deterministic", "images", "seconds", "n_train"),
]
PARTS = {"paper": ["claim", "metric", "comparable"], "budget": ["images", "of", "fraction", "source"]}  # or null
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


def read_json(path: Path) -> dict:
    """One result with the REQUIRED keys. ValueError, one line that names the file and what it lacks, otherwise."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not valid JSON ({error}): restore it, or run the experiment again") from error
    missing = lacking(result, REQUIRED)
    if not missing:
        missing = [key for key in ("metrics", "config", "versions") if not isinstance(result[key], dict)]
        missing += [key for key in ("images", "seconds") if not is_number(result[key])]
        parts = {key: lacking(result[key], keys) for key, keys in PARTS.items() if result[key] is not None}
        missing += [f"{key}.{part}" for key, lacks in parts.items() for part in lacks]
        missing += [key for key in ("experiment", "run") if not re.fullmatch(r"\w[\w.+-]*", str(result[key]))]
    if missing:
        raise ValueError(f"{path} lacks a usable {', '.join(missing)}: edited, or of another version? Run it again")
    return result


def lacking(mapping: object, keys: list[str]) -> list[str]:
    """The keys that a mapping does not have; all of them when it is no mapping."""
    return [key for key in keys if not isinstance(mapping, dict) or key not in mapping]


def read_runs(root: Path = ROOT) -> list[dict]:
    """Every recorded run, by experiment and run id. ValueError when one cannot be read."""
    return [read_json(path) for path in sorted((Path(root) / "runs").glob("*/*.json"))]


def read_curve(path: Path) -> list[dict]:
    """The rows of curve.csv, cells as numbers or None; [] without the file. ValueError if no table of numbers."""
    if not path.is_file():
        return []
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        return [{key: number(cell) for key, cell in row.items()} for row in rows]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table of numbers ({error}): still being written, or damaged") from error


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


def picture(folder: Path) -> bytes | None:
    """The newest samples/samples*.png, else density.png, as `small_png`; None when there is neither."""
    samples = sorted(folder.glob("samples/samples*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    path = samples[-1] if samples else folder / "density.png"
    return small_png(path) if path.is_file() else None


def small_png(path: Path) -> bytes:
    """A picture as a PNG below PICTURE_BYTES, smaller where it must be. ValueError, one line: not readable."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is not a readable picture ({error}): delete it or make it again") from error
    while True:
        stream = io.BytesIO()
        image.save(stream, "PNG", optimize=True)
        if stream.tell() < PICTURE_BYTES:
            return stream.getvalue()
        image = image.resize((max(1, image.width * 4 // 5), max(1, image.height * 4 // 5)), Image.Resampling.LANCZOS)


def add(folder: str | Path, suspect: str | None = None, root: Path = ROOT) -> list[str]:
    """Record a finished run as `runs/<experiment>/<run>.json`, with one sample picture beside it.

    Args:
        folder: the run's folder, `outputs/<experiment>/<run>`.
        suspect: what may explain a gap; required where the status is `gap` and the result names none itself.
        root: the results folder.

    Returns:
        Lines to print: what was done, and a warning when the code was not committed.

    Raises:
        ValueError: one line that says what to do; nothing has been written then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give a run folder, outputs/<experiment>/<run>")
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} has no result.json: the run has not finished; continue it with resume=auto")
    result = portable(read_json(folder / "result.json") | {"curve": read_curve(folder / "curve.csv")})
    result |= {"suspect": suspect or result.get("suspect"), **compare(result, root)}
    if result["status"] == "gap" and not result["suspect"]:
        raise ValueError(f'a gap at full budget needs a named suspect: python -m results add {folder} suspect="..."')
    path = Path(root) / "runs" / result["experiment"] / f"{result['run']}.json"
    content = json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if path.exists():
        if path.read_text(encoding="utf-8") == content:
            return [f"{path} is already recorded, with the same content"]
        raise ValueError(f"{path} is already recorded, with other content: delete it first to replace it")
    image = picture(folder)
    if image:
        write(path.with_suffix(".png"), image)
    write(path, content)  # last: the run counts as recorded from here on
    warning = f"warning: {result['run']} ran on uncommitted changes: its commit does not give its code"
    return [f"recorded {path}: {result['status']}", *([warning] if result["dirty"] else [])]
