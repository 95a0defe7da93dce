"""Comparison of a run with the numbers in the papers."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L

from results import own_decimals, printed

COLUMNS = ("experiment", "metric", "paper", "ours", "gap", "status")


class PaperComparison(L.Callback):
    """Logs `paper/<metric>` for each claim at validations, and `gap/<metric>` = ours - paper.

    Nothing is logged for a claim that the run cannot be compared with, for example one on other
    data: such a number beside the run's own would look like a comparison. During training "ours" is
    the validation value; the table at the end of a run uses the split of the claim.

    papers: the papers' claims that the run is compared with, each {"claim", "metric", "value",
        "comparable"}.
    """

    def __init__(self, papers: list[dict[str, Any]]) -> None:
        self.papers = papers

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for paper in self.papers:
            if not paper["comparable"]:
                continue
            name = paper["metric"].split("/")[-1]
            pl_module.log(f"paper/{name}", paper["value"])
            ours = trainer.callback_metrics.get(f"val/{name}")
            if ours is not None:
                pl_module.log(f"gap/{name}", ours - paper["value"])


def comparison_rows(result: Mapping[str, Any]) -> list[tuple]:
    """Rows of COLUMNS for each test metric and each claim, ordered by metric.

    The value of "paper" is None if a metric has no claim that the run can be compared with, and
    that of "ours" if the run did not measure a claim's metric; "gap" is None in both cases. A claim
    whose status is "-", for example one on other data, is left out.

    result: the contents of result.json (the schema is in results/runs.py).
    """
    metrics = result["metrics"]
    claims = {
        comparison["metric"]: comparison
        for comparison in result["comparisons"]
        if comparison["status"] != "-"
    }
    tested = {key for key in metrics if key.startswith("test/") or key == "density_integral"}
    rows = []
    for metric in sorted(tested | claims.keys()):
        claim = claims.get(metric, {"value": None, "gap": None, "status": "-"})
        row = (metric, claim["value"], metrics.get(metric), claim["gap"], claim["status"])
        rows.append((result["experiment"], *row))
    return rows


def comparison_table(result: Mapping[str, Any]) -> str:
    """The table at the end of a run: COLUMNS, with a row for each test metric and each claim."""
    claims = {comparison["metric"]: comparison for comparison in result["comparisons"]}
    rows = [COLUMNS]
    for experiment, metric, value, ours, gap, status in comparison_rows(result):
        claim = claims.get(metric, {})
        numbers = (
            "-" if value is None else printed(value, claim),
            "-" if ours is None else f"{ours:.{own_decimals(claim, 4)}f}",
            "-" if gap is None else f"{gap:+.{own_decimals(claim)}f}",
        )
        rows.append((experiment, metric, *numbers, status))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    header, *body = lines
    return "\n".join([header, "-" * len(header), *body])
