"""Recorded runs: record one from its run folder, and read all of them."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from results import ROOT, compare_all, decimals_form, papers_in
from results.checks import (
    anything,
    check,
    fact,
    flag,
    is_number,
    list_of,
    mapping,
    mapping_of,
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
    content_of,
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
METRIC = record(
    {"unit": text, "direction": one_of("lower", "higher")},
    optional={"name": text},
)
FIGURES = mapping_of(or_null(check(is_number)))  # by the metric; null: not finite
END = record(  # of a run that was extended
    {
        "steps": number,
        "images": number,
        "seconds": number,
        "metrics": FIGURES,
        "commit": or_null(text),
        "date": text,
    }
)
START = record({"model": text, "experiment": text, "commit": or_null(text), "sha256": text})
DATA = record(optional={"sha256": text})  # of a user's own images
REASON = check(lambda value: isinstance(value, str) and value.strip() and "\n" not in value)
CONFIG = record(optional={"data": or_null(mapping), "trainer": or_null(mapping)})
WEIGHTS_BYTES = 8_000_000  # of one file of weights in results/weights/
ALL_WEIGHTS_BYTES = 40_000_000  # of all of them
WEIGHTS = record({"file": text, "sha256": text, "bytes": number, "dtype": text})
RESULT = record(
    {
        "experiment": stem,
        "run": stem,
        "preset": or_null(text),
        "metrics": FIGURES,
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
        "curve": list_of(FIGURES),
        "data": or_null(DATA),
        "extended": list_of(END),  # the earlier ends, the first one first
        "init_from": or_null(START),  # the trained weights from which the run started
        "metric": or_null(METRIC),
        "not_measured": mapping_of(REASON),  # by the metric: why not, and what to do, in one line
        "overrides": list_of(text),
        "parameters": or_null(number),
        "protocol": mapping_of(mapping_of(fact)),  # by the metric: what its figure depends on
        "skipped_steps": or_null(number),
        "suspect": or_null(text),
        "tested": or_null(record({"step": number, "chosen": text, "weights": text})),
        "wandb_url": or_null(text),
        "weights": or_null(WEIGHTS),
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


class Weights(NamedTuple):
    """The weights of a run that is recorded.

    entry: what the record says of them; None if they are not kept.
    files: the file's content by its path; {} if they are not kept.
    line: what is printed.
    """

    entry: dict[str, Any] | None
    files: dict[Path, bytes]
    line: str


def weights_of(folder: Path, result: Mapping[str, Any], root: Path = ROOT) -> Weights:
    """The weights of a run, if they are small enough for the repository.

    They are in the run's folder, or were exported to its folder `export`. A file may have
    WEIGHTS_BYTES, and all of them together ALL_WEIGHTS_BYTES: a repository keeps every version of a
    file for good.

    ValueError, one line: the file is missing, or is not the one that the result describes.
    """
    source, described = described_weights(folder, result)
    if described is None:
        reason = f"make a file of them with python -m reproduce.export {folder}, then record it"
        return Weights(None, {}, f"no weights are kept: {reason}")
    name = f"weights/{result['experiment']}/{result['run']}.safetensors"
    target = Path(root) / name
    obstacle = too_large(described["bytes"], target, Path(root) / "weights")
    if obstacle is not None:
        return Weights(None, {}, f"no weights are kept: {obstacle}")
    file = source / described["file"]
    content = content_of(file)
    if content is None or hashlib.sha256(content).hexdigest() != described["sha256"]:
        raise ValueError(
            f"{file} is missing, or is not the file that {source / 'result.json'} describes: "
            "restore it, or make both again"
        )
    line = f"weights: {target}, {megabytes(len(content))}"
    return Weights({**described, "file": name}, {target: content}, line)


def described_weights(folder: Path, result: Mapping[str, Any]) -> tuple[Path, dict | None]:
    """The folder of a run's file of weights, and what its result says of the file, if there is one.

    ValueError, one line: the file in `export` is of other weights than the result.
    """
    exported = folder / "export"
    if result.get("weights") is not None or not (exported / "result.json").is_file():
        return folder, result.get("weights")
    other = read_json(exported / "result.json")
    if (other["run"], other["metrics"]) != (result["run"], result["metrics"]):
        raise ValueError(f"{exported} is of other weights than {folder}: delete it")
    return exported, other.get("weights")


def too_large(size: int, target: Path, weights: Path) -> str | None:
    """Why a file of weights is too large for the repository; None: it is not.

    Args:
        size: in bytes.
        target: where the file would lie; an older file there is replaced.
        weights: the folder of all weights.
    """
    if size > WEIGHTS_BYTES:
        return f"they are {megabytes(size)}, and at most {megabytes(WEIGHTS_BYTES)} are"
    others = [path for path in weights.glob("*/*") if path != target]
    total = size + sum(path.stat().st_size for path in others)
    if total > ALL_WEIGHTS_BYTES:
        limit = megabytes(ALL_WEIGHTS_BYTES)
        return f"{weights} would grow to {megabytes(total)}, and may have {limit}"
    return None


def megabytes(n: int) -> str:
    """A number of bytes in megabytes.

    >>> megabytes(3_140_000), megabytes(40_000_000), megabytes(98_765)
    ('3.1 MB', '40 MB', '0.099 MB')
    """
    return f"{n / 1e6:.2g} MB"


def add(folder: str | Path, suspect: str | None = None, root: Path = ROOT) -> Addition:
    """The files that record a finished run: `runs/<experiment>/<run>.json`, a picture, weights.

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
    weights = weights_of(folder, result, root)
    result["weights"] = weights.entry
    path = Path(root) / "runs" / result["experiment"] / f"{result['run']}.json"
    content = json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if not is_new_record(path, content):
        return Addition(lines=[f"{path} is already recorded, with the same content"])
    files = dict(weights.files)
    image = picture(folder)
    if image is not None:
        files[path.with_suffix(".png")] = image
    files[path] = content.encode()  # last: the run counts as recorded from here on
    lines = [f"recorded {path}: {summary(result, statuses)}", weights.line]
    for comparison in result["comparisons"]:
        for words in comparison["differences"]:
            lines.append(f"{comparison['metric']} is not compared with the paper's: {words}")
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
