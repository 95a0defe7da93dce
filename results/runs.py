"""Recorded runs: take one in from its run folder, read them back."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from results import ROOT, compare_all, is_number, papers_in
from results.files import checked_json, lacking, number, portable, small_png, write

REQUIRED = [  # what a result.json holds at least
    *(
        "experiment",
        "run",
        "preset",
        "metrics",
        "budget",
        "seed",
        "commit",
        "dirty",
        "config",
        "versions",
    ),
    *("device", "precision", "tf32", "deterministic", "images", "seconds", "n_train"),
]
BUDGET = ["images", "of", "fraction", "source"]  # or null
PAPER = ["claim", "metric", "comparable"]  # each of `papers`; older runs have one `paper`, or null


def read_json(path: Path) -> dict:
    """One result with the REQUIRED keys and `papers`. ValueError, one line: the file, and what it lacks, otherwise."""
    result = checked_json(
        path,
        faults,
        damaged="is not valid JSON ({problem}): restore it, or run the experiment again",
        unusable="lacks a usable {problem}: edited, or of another version? Run it again",
    )
    return {key: value for key, value in result.items() if key != "paper"} | {
        "papers": papers_in(result)
    }


def faults(result: Any) -> list[str]:
    """The keys that a result lacks, or whose value cannot be what it should."""
    has_papers = not (lacking(result, ["papers"]) and lacking(result, ["paper"]))
    if keys := [*lacking(result, REQUIRED), *([] if has_papers else ["papers"])]:
        return keys
    keys = [key for key in ("metrics", "config", "versions") if not isinstance(result[key], dict)]
    keys += [key for key in ("images", "seconds") if not is_number(result[key])]
    keys += [
        f"budget.{part}"
        for part in lacking(result["budget"], BUDGET)
        if result["budget"] is not None
    ]
    if isinstance(claims := papers_in(result), list):
        keys += [
            f"papers[{k}].{part}"
            for k, claim in enumerate(claims)
            for part in lacking(claim, PAPER)
        ]
    else:
        keys += ["papers"]
    return keys + [
        key for key in ("experiment", "run") if not re.fullmatch(r"\w[\w.+-]*", str(result[key]))
    ]


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
        raise ValueError(
            f"{path} is not a table of numbers ({error}): still being written, or damaged"
        ) from error


def picture(folder: Path) -> bytes | None:
    """The newest samples/samples*.png, else density.png, as `small_png`; None when there is neither."""
    samples = sorted(
        folder.glob("samples/samples*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name)
    )
    path = samples[-1] if samples else folder / "density.png"
    return small_png(path) if path.is_file() else None


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
        raise ValueError(
            f"{folder} has no result.json: the run has not finished; continue it with resume=auto"
        )
    result = portable(
        read_json(folder / "result.json") | {"curve": read_curve(folder / "curve.csv")}
    )
    result |= {"suspect": suspect or result.get("suspect"), **compare_all(result, root)}
    statuses = {comparison["metric"]: comparison["status"] for comparison in result["comparisons"]}
    if "gap" in statuses.values() and not result["suspect"]:
        raise ValueError(
            f'a gap at full budget needs a named suspect: python -m results add {folder} suspect="..."'
        )
    path = Path(root) / "runs" / result["experiment"] / f"{result['run']}.json"
    content = json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if path.exists():
        if path.read_text(encoding="utf-8") == content:
            return [f"{path} is already recorded, with the same content"]
        raise ValueError(
            f"{path} is already recorded, with other content: delete it first to replace it"
        )
    image = picture(folder)
    if image:
        write(path.with_suffix(".png"), image)
    write(path, content)  # last: the run counts as recorded from here on
    warning = (
        f"warning: {result['run']} ran on uncommitted changes: its commit does not give its code"
    )
    if len(statuses) > 1:
        status = ", ".join(f"{metric} {word}" for metric, word in statuses.items())
    else:
        status = result["status"]
    return [f"recorded {path}: {status}", *([warning] if result["dirty"] else [])]
