"""The section on other generative models: the table of a survey, quoted as context."""

from collections.abc import Mapping
from pathlib import Path

from results import ROOT, VERIFIED
from results.blocks import Block, Bullets, Heading, Paragraph, Table
from results.checks import list_of, mapping_of, number, one_of, record, text
from results.files import NO_FILES, checked_yaml

NAME = "survey.yaml"
MODEL = record(optional={"fid": number, "bpd": number, "bound": one_of("upper")})
SURVEY = record(
    {
        "title": text,
        "arxiv": text,
        "data": text,
        "verified": one_of(*VERIFIED),
        "source": text,
        "families": mapping_of(mapping_of(MODEL)),
    },
    optional={"notes": list_of(text)},
)
COLUMNS = ["family", "model", "FID", "bits/dim"]


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section of the results page; [] where the folder has no survey.

    ValueError, one line: the file cannot be read.
    """
    path = Path(root) / NAME
    if path not in new and not path.is_file():
        return []
    survey = checked_yaml(path, SURVEY, new.get(path))
    rows = [
        [family, model, cell(figures.get("fid")), cell(figures.get("bpd"), figures.get("bound"))]
        for family, models in survey["families"].items()
        for model, figures in models.items()
    ]
    words = (
        f"{survey['data']} in *{survey['title']}* (arXiv {survey['arxiv']}; {survey['source']}). "
        "These figures are context: no run is compared with them."
    )
    notes = [" ".join(note.split()) for note in survey.get("notes", [])]
    return [
        Heading("Other generative models"),
        Paragraph(words),
        Table(COLUMNS, rows),
        *([Bullets(notes)] if notes else []),
    ]


def cell(value: float | None, bound: str | None = None) -> str:
    """A figure as the survey prints it.

    >>> cell(2.42), cell(4.5, "upper"), cell(None)
    ('2.42', '≤ 4.50', '-')
    """
    if value is None:
        return "-"
    if bound == "upper":
        return f"≤ {value:.2f}"
    return f"{value:.2f}"
