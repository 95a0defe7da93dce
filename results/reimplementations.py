"""What other implementations reached: points for the charts, and the section that names them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from results import ROOT, VERIFIED
from results.blocks import Block, Heading, Paragraph, Table
from results.checks import flag, list_of, one_of, positive, record, text
from results.files import NO_FILES, abbreviated, checked_yaml
from results.formats import count

NAME = "reimplementations.yaml"
POINT = record(
    {"value": positive}, optional={"images": positive, "epochs": positive, "at_most": flag}
)
IMPLEMENTATION = record(
    {"what": text, "where": text, "points": list_of(POINT, at_least=1), "differs": text},
    optional={"epoch": positive},  # images
)
OWN_KEYS = {"verified": one_of(*VERIFIED), "source": text}  # the other keys are claims
COLUMNS = ["implementation", "bits/dim", "images", "what", "where", "what differs"]


@dataclass(frozen=True)
class Published:
    """A figure that another implementation published, at a number of training images seen."""

    images: float
    value: float
    label: str


def read(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> dict[str, dict[str, dict]]:
    """The implementations by the claim's id and their name; {} where there is no file of them.

    Each point has its `images`, computed from `epochs` where those are given; None if unknown.

    ValueError, one line: the file cannot be read, or counts epochs without the images of one.
    """
    path = Path(root) / NAME
    if path not in new and not path.is_file():
        return {}
    whole = checked_yaml(path, record(OWN_KEYS), new.get(path))
    by_claim = {}
    for claim, implementations in whole.items():
        if claim not in OWN_KEYS:
            faults = record(dict.fromkeys(implementations or {}, IMPLEMENTATION))(implementations)
            if faults:
                raise ValueError(f"{path}: {claim} lacks a usable {abbreviated(faults)}")
            by_claim[claim] = {
                name: {**entry, "points": [point_of(p, entry, path) for p in entry["points"]]}
                for name, entry in implementations.items()
            }
    return by_claim


def point_of(point: Mapping, implementation: Mapping, path: Path) -> dict:
    """A point with its `images`. ValueError: it counts epochs of unknown length."""
    images = point.get("images")
    if "epochs" in point:
        if "epoch" not in implementation:
            raise ValueError(f"{path}: {point['epochs']} epochs need `epoch`, the images of one")
        images = point["epochs"] * implementation["epoch"]
    return {"value": point["value"], "images": images, "at_most": point.get("at_most", False)}


def published(
    claim_id: str, root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES
) -> list[Published]:
    """The points for the chart of a claim: those with known images, each with its name."""
    return [
        Published(point["images"], point["value"], name)
        for name, entry in read(root, new).get(claim_id, {}).items()
        for point in entry["points"]
        if point["images"] is not None
    ]


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section of the results page: a table for each claim; [] where there is no file."""
    by_claim = read(root, new)
    if not by_claim:
        return []
    words = (
        "What other implementations state. No run is compared with these figures: the last column "
        "says why."
    )
    blocks: list[Block] = [Heading("Other implementations"), Paragraph(words)]
    for claim, implementations in by_claim.items():
        rows = [row_of(name, entry) for name, entry in implementations.items()]
        blocks += [Heading(claim, 3), Table(COLUMNS, rows)]
    return blocks


def row_of(name: str, entry: Mapping) -> list[str]:
    """The cells of COLUMNS for one implementation."""
    values = [f"{'< ' if p['at_most'] else ''}{p['value']:g}" for p in entry["points"]]
    images = [count(p["images"]) for p in entry["points"] if p["images"] is not None]
    words = [" ".join(entry[key].split()) for key in ("what", "where", "differs")]
    return [name, ", ".join(values), ", ".join(images) or "not stated", *words]
