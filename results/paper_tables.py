"""The sections of the papers' tables as they are printed, with the models that they compare."""

from results import printed
from results.blocks import Block, Bullets, Heading, Paragraph, Table
from results.formats import distinct
from results.reading import Records

TITLE = "The papers' tables"
WORDS = "The figure on the training images stands in brackets; ≤ marks an upper bound."


def section(records: Records) -> list[Block]:
    """A part for each paper."""
    if not records.papers:
        return []
    parts = [part for paper in records.papers.values() for part in paper_part(paper)]
    return [Heading(TITLE), Paragraph(WORDS), *parts]


def paper_part(paper: dict) -> list[Block]:
    """A paper's tables as printed, one for each metric, and notes on them."""
    by_table: dict[str, dict[str, list[dict]]] = {}
    for claim in paper["claims"].values():
        by_metric = by_table.setdefault(claim["table"], {})
        by_metric.setdefault(claim["metric"], []).append(claim)
    blocks: list[Block] = [Heading(f"{paper['title']} (arXiv {paper['arxiv']})", 3)]
    for title, by_metric in by_table.items():
        for metric, claims in by_metric.items():
            words = title
            if len(by_metric) > 1:
                words += f", {metric}"
            blocks += [Paragraph(f"{words}:"), quoted_table(claims)]
    notes = [" ".join(note.split()) for note in paper.get("notes", [])]
    if notes:
        blocks.append(Bullets(notes))
    return blocks


def quoted_table(claims: list[dict]) -> Table:
    """One metric in one table of a paper: a row for each data set, a column for each model."""
    models = list(dict.fromkeys(model for claim in claims for model in claim["compared"]))
    own = list(dict.fromkeys(claim["row"] for claim in claims))
    by_data: dict[tuple, list[dict]] = {}
    for claim in claims:
        place = (claim["dataset"], claim["split"], claim["unit"])
        nth = sum(claim["row"] == other["row"] for other in by_data.get((*place, 0), []))
        by_data.setdefault((*place, nth), []).append(claim)
    rows = []
    for (dataset, split, unit, _), alike in by_data.items():
        figures: dict[str, str] = {}
        for claim in alike:
            figures |= {row: figure(entry, claim) for row, entry in claim["compared"].items()}
            figures[claim["row"]] = figure(claim, claim)
        verified = distinct([claim["verified"] for claim in alike], ", ")
        cells = [figures.get(name, "-") for name in [*own, *models]]
        rows.append([dataset, split, unit or "-", *cells, verified])
    return Table(["dataset", "split", "unit", *own, *models, "verified"], rows)


def figure(entry: dict, claim: dict) -> str:
    """A number of a claim's row as printed, with its bound and training figure: `≤ 4.40 (4.35)`."""
    row = {**claim, **entry}  # an entry may have decimals of its own
    words = printed(entry["value"], row)
    if entry.get("bound") == "upper":
        words = f"≤ {words}"
    if entry["train"] is not None:
        words += f" ({printed(entry['train'], row)})"
    return words
