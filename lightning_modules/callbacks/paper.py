"""The papers' numbers beside ours."""

import lightning.pytorch as L

from results import own_decimals, printed

COLUMNS = ("experiment", "metric", "paper", "ours", "gap", "status")


class PaperComparison(L.Callback):
    """Logs for each claim `paper/<metric>` at validations and, on its own data, `gap/<metric>` = ours - paper.

    During training ours is the validation value; the rows that are reported use the claims' own split.
    papers: the claims beside which the run is shown, each {"claim", "metric", "value", "comparable"}.
    """

    def __init__(self, papers: list[dict]) -> None:
        self.papers = papers

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for paper in self.papers:
            name = paper["metric"].split("/")[-1]
            pl_module.log(f"paper/{name}", paper["value"])
            ours = trainer.callback_metrics.get(f"val/{name}")
            if ours is not None and paper["comparable"]:
                pl_module.log(f"gap/{name}", ours - paper["value"])


def comparison_rows(result: dict) -> list[tuple]:
    """COLUMNS for each test metric and each claim, by metric.

    paper is None where a metric has no claim, ours where the run did not measure a claim's metric, and gap where the
    two cannot be compared. A claim on other data whose metric was not measured either has no row.
    """
    claims = {
        comparison["metric"]: comparison
        for comparison in result["comparisons"]
        if comparison["metric"] in result["metrics"] or comparison["status"] != "-"
    }
    tested = {
        key for key in result["metrics"] if key.startswith("test/") or key == "density_integral"
    }
    rows = []
    for metric in sorted(tested | claims.keys()):
        claim = claims.get(metric, {"value": None, "gap": None, "status": "-"})
        ours = result["metrics"].get(metric)
        rows.append(
            (result["experiment"], metric, claim["value"], ours, claim["gap"], claim["status"])
        )
    return rows


def comparison_table(result: dict) -> str:
    """The last lines of a run: COLUMNS, a row a test metric or claim."""
    claims, rows = (
        {comparison["metric"]: comparison for comparison in result["comparisons"]},
        [COLUMNS],
    )
    for experiment, metric, value, ours, gap, status in comparison_rows(result):
        claim = claims.get(metric, {})
        shown = (
            "-" if value is None else printed(value, claim),
            "-" if ours is None else f"{ours:.{own_decimals(claim, 4)}f}",
            "-" if gap is None else f"{gap:+.{own_decimals(claim)}f}",
        )
        rows.append((experiment, metric, *shown, status))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
