"""Comparison of a run with the numbers in the papers."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L

from lightning_modules.lightning_internals import forget_metrics
from results import own_decimals, printed
from results.formats import by_text

COLUMNS = ("experiment", "metric", "paper", "ours", "gap", "status", "note")


class PaperComparison(L.Callback):
    """Logs `paper/<metric>` for each claim at validations, and `gap/<metric>` = ours - paper.

    Nothing is logged for a claim that the run cannot be compared with, for example one on other
    data: such a number beside the run's own would look like a comparison. During training "ours" is
    the validation value; the table at the end of a run uses the split of the claim. A validation
    that does not measure a claim's metric has no gap. So a figure on few samples (`val/fid_5k`),
    which has another name, is never compared with the claim on many.

    The values of all other callbacks are known by the end of a validation, so their order does not
    matter.

    papers: the papers' claims that the run is compared with, each {"claim", "metric", "value",
        "comparable"}.
    """

    def __init__(self, papers: list[dict[str, Any]]) -> None:
        self.papers = papers

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        forget_metrics(trainer, [f"val/{short_name(paper['metric'])}" for paper in self.papers])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.logger is None:
            return
        row: dict[str, float] = {}
        for paper in self.papers:
            if not paper["comparable"]:
                continue
            name = short_name(paper["metric"])
            row[f"paper/{name}"] = paper["value"]
            ours = trainer.callback_metrics.get(f"val/{name}")
            if ours is not None:
                row[f"gap/{name}"] = float(ours) - paper["value"]
        if row:
            trainer.logger.log_metrics(row, step=trainer.global_step)


def short_name(metric: str) -> str:
    """A metric's name without its split: `fid` for `test/fid`."""
    return metric.rpartition("/")[2]


def notes_of(result: Mapping[str, Any]) -> dict[str, str]:
    """For each metric that has one, a note in one line.

    It says why a metric was not measured and what to do, or how the measurement differs from the
    claim's protocol.

    result: the contents of result.json.
    """
    notes = dict(result.get("not_measured") or {})
    for comparison in result["comparisons"]:
        differences = comparison.get("differences")
        if differences and comparison["status"] != "-":
            notes.setdefault(comparison["metric"], "; ".join(differences))
    return notes


def comparison_rows(result: Mapping[str, Any]) -> list[tuple]:
    """Rows of COLUMNS for each test metric, claim and note, ordered by metric.

    The value of "paper" is None if a metric has no claim that the run can be compared with, and
    that of "ours" if the run did not measure the metric; "gap" is None in both cases. "note" is
    empty for most (`notes_of`). A claim whose status is "-", for example one on other data, is left
    out.

    result: the contents of result.json (the schema is in results/runs.py).
    """
    metrics = result["metrics"]
    notes = notes_of(result)
    claims = {
        comparison["metric"]: comparison
        for comparison in result["comparisons"]
        if comparison["status"] != "-"
    }
    tested = {key for key in metrics if key.startswith("test/") or key == "density_integral"}
    rows = []
    for metric in sorted(tested | claims.keys() | notes.keys()):
        status = "-"
        if metric not in metrics:
            status = "not measured"
        claim = claims.get(metric, {"value": None, "gap": None, "status": status})
        row = (metric, claim["value"], metrics.get(metric), claim["gap"], claim["status"])
        rows.append((result["experiment"], *row, notes.get(metric, "")))
    return rows


def comparison_table(result: Mapping[str, Any]) -> str:
    """The table at the end of a run: a row for each test metric, claim and note.

    It has the COLUMNS but the last one: notes are long, and follow in lines of their own,
    each of them once.
    """
    claims = {comparison["metric"]: comparison for comparison in result["comparisons"]}
    rows = [COLUMNS[:-1]]
    notes = {}
    for experiment, metric, value, ours, gap, status, note in comparison_rows(result):
        claim = claims.get(metric, {})
        numbers = (
            "-" if value is None else printed(value, claim),
            "-" if ours is None else f"{ours:.{own_decimals(claim, 4)}f}",
            "-" if gap is None else f"{gap:+.{own_decimals(claim)}f}",
        )
        rows.append((experiment, metric, *numbers, status))
        if note:
            notes[metric] = note
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    header, *body = lines
    below = [f"{metrics}: {note}" for note, metrics in by_text(notes).items()]
    return "\n".join([header, "-" * len(header), *body, *below])
