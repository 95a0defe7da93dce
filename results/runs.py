"""Recorded runs: record one from its run folder, and read all of them."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import ROOT, compare_all, decimals_form, papers_in
from results.checks import (
    anything,
    flag,
    list_of,
    mapping,
    number,
    one_of,
    or_null,
    record,
    stem,
    text,
)
from results.files import (
    NO_FILES,
    Addition,
    checked_json,
    is_new_record,
    matching_files,
    portable,
    small_png,
)
from results.files import number as number_in

BUDGET = record(
    {"images": number, "of": or_null(number), "fraction": or_null(number), "source": text}
)
PAPER = record(
    {"claim": text, "metric": text, "comparable": flag},
    optional={"decimals": decimals_form},
)
CONFIG = record(optional={"data": or_null(mapping), "trainer": or_null(mapping)})
RESULT = record(
    {
        "experiment": stem,
        "run": stem,
        "preset": or_null(text),
        "metrics": mapping,
        "budget": or_null(BUDGET),
        "seed": or_null(number),
        "commit": or_null(text),
        "dirty": flag,
        "config": CONFIG,
        "versions": mapping,
        "device": text,
        "precision": text,
        "tf32": flag,
        "deterministic": anything,
        "images": number,
        "seconds": number,
        "n_train": or_null(number),
    },
    optional={
        "papers": list_of(PAPER),
        "paper": or_null(PAPER),  # older runs have one paper, not a list
        "curve": list_of(mapping),
        "extended": list_of(mapping),  # the earlier ends of a run that was extended
        "metric": or_null(record({"unit": text, "direction": one_of("lower", "higher")})),
        "overrides": list_of(text),
        "parameters": or_null(number),
        "suspect": or_null(text),
        "tested": or_null(record({"step": number, "chosen": text, "weights": text})),
        "wandb_url": or_null(text),
        "weights": or_null(text),
    },
)


def form(result: Any) -> list[str]:
    """What is missing or of the wrong kind in a result (`results.checks`)."""
    places = RESULT(result)
    if isinstance(result, dict) and "papers" not in result and "paper" not in result:
        places = [*places, ".papers"]
    return places


def read_json(path: Path, content: bytes | None = None) -> dict:
    """Read one result. The one `paper` of an older result becomes the list `papers`.

    content: the file's content, if it is not written yet.

    ValueError, one line: the file is not JSON, or lacks something, which the message names.
    """
    result = checked_json(
        path,
        form,
        damaged="is not valid JSON ({problem}): restore it, or run the experiment again",
        unusable="lacks a usable {problem}: edited, or of another version? Run it again",
        content=content,
    )
    rest = {key: value for key, value in result.items() if key != "paper"}
    return rest | {"papers": papers_in(result)}


def read_runs(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[dict]:
    """Every recorded run with what `compare_all` returns for it, sorted by experiment and run id.

    new: files that are not written yet.

    ValueError: a run cannot be read.
    """
    paths = matching_files(Path(root), "runs/*/*.json", new)
    return [beside_papers(read_json(path, new.get(path)), path, root) for path in paths]


def beside_papers(result: dict, path: Path, root: Path) -> dict:
    """A result with what `compare_all` returns for it.

    ValueError, one line with the result's file: a claim is unknown.
    """
    try:
        return result | compare_all(result, root)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_curve(path: Path) -> list[dict]:
    """The rows of a curve.csv, with cells as numbers or None; [] if there is no file.

    ValueError: the file is not a table of numbers.
    """
    if not path.is_file():
        return []
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        return [{key: number_in(cell) for key, cell in row.items()} for row in rows]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a table of numbers ({error}): still being written, or damaged"
        ) from error


def picture(folder: Path) -> bytes | None:
    """The newest samples/samples*.png as `small_png`, else density.png; None without either."""
    by_age = sorted(
        folder.glob("samples/samples*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name)
    )
    path = [folder / "density.png", *by_age][-1]
    if path.is_file():
        return small_png(path)
    return None


def add(folder: str | Path, suspect: str | None = None, root: Path = ROOT) -> Addition:
    """The files that record a finished run: `runs/<experiment>/<run>.json`, and a picture.

    Args:
        folder: the run's folder, `outputs/<experiment>/<run>`.
        suspect: what may explain a gap; has to be given where the status is `gap`, unless the
            result names one.
        root: the results folder.

    Returns:
        The files, which are not written here, and lines to print.

    Raises:
        ValueError: one line that says what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give a run folder, outputs/<experiment>/<run>")
    if not (folder / "result.json").is_file():
        raise ValueError(
            f"{folder} has no result.json: the run has not finished; continue it with resume=auto"
        )
    curve = read_curve(folder / "curve.csv")
    measured = portable(read_json(folder / "result.json") | {"curve": curve})
    result = beside_papers(measured, folder / "result.json", root)
    result["suspect"] = suspect or result.get("suspect")
    statuses = {comparison["metric"]: comparison["status"] for comparison in result["comparisons"]}
    if "gap" in statuses.values() and not result["suspect"]:
        raise ValueError(
            "a gap at full budget needs a named suspect: "
            f'python -m results add {folder} suspect="..."'
        )
    path = Path(root) / "runs" / result["experiment"] / f"{result['run']}.json"
    content = json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if not is_new_record(path, content):
        return Addition(lines=[f"{path} is already recorded, with the same content"])
    files = {}
    image = picture(folder)
    if image is not None:
        files[path.with_suffix(".png")] = image
    files[path] = content.encode()  # last: the run counts as recorded from here on
    lines = [f"recorded {path}: {summary(result, statuses)}"]
    if result["dirty"]:
        lines.append(
            f"warning: {result['run']} was made with uncommitted changes: "
            "its code is not that of its commit"
        )
    return Addition(files, lines)


def summary(result: dict, statuses: dict[str, str]) -> str:
    """The status of a run, e.g. `reproduced`; with several claims that of each: `test/psnr gap`."""
    if result["status"] == "-" and len(statuses) <= 1:
        return "compared with no claim"
    if len(statuses) <= 1:
        return result["status"]
    return ", ".join(f"{metric} {status}" for metric, status in statuses.items())
