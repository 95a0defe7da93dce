"""The section on the quality of samples: distances to real images, with their protocol."""

from results import is_number
from results.blocks import Block, Heading, Paragraph, Table, anchor
from results.formats import fixed, run_name
from results.protocol import in_words
from results.reading import Records, ordered_runs

TITLE = "Quality of samples"
METRICS = {  # by the name of the metric: its column
    "fid": "FID ↓",
    "kid": "KID ↓",
    "inception_score": "Inception Score ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
}
FACTS = ["n", "temperature", "reference", "reference_n", "extractor", "published_weights"]
COLUMNS = ["run", *METRICS.values(), "samples", *(fact.replace("_", " ") for fact in FACTS[1:])]
TEXT = (
    "These figures change with how they are measured, which stands beside them. Two rows compare "
    "only where all of their facts agree. A figure of fewer samples than the others of its row has "
    "their number, n, beside it. ↓: lower is better; ↑: higher is better."
)


def section(records: Records) -> list[Block]:
    """A row for each run with one of METRICS in its test; [] without such a run."""
    runs = [
        run
        for run in ordered_runs(records.runs, records.claims)
        if any(is_number(run["metrics"].get(f"test/{name}")) for name in METRICS)
    ]
    if not runs:
        return []
    return [Heading(TITLE), Paragraph(TEXT), Table(COLUMNS, [cells(run) for run in runs])]


def cells(run: dict) -> list[str]:
    """The cells of COLUMNS. Facts are those of the first metric that has a protocol."""
    link = f"[{run_name(run)}](#{anchor(run_name(run))})"
    protocols = run.get("protocol") or {}
    facts: dict = next((protocols[f"test/{k}"] for k in METRICS if f"test/{k}" in protocols), {})
    figures = []
    for name in METRICS:
        figure = fixed(run["metrics"].get(f"test/{name}"), ".4g")
        n = protocols.get(f"test/{name}", {}).get("n")
        if n is not None and n != facts.get("n"):
            figure += f" (n={in_words(n)})"
        figures.append(figure)
    return [link, *figures, *(in_words(facts.get(fact, "-")) for fact in FACTS)]
