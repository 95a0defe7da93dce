"""Bicubic interpolation as a super-resolution model: the section on `reproduce.bicubic`.

It is a model without any parameters, whose figures are published, and so a check of the metrics.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from results import ROOT
from results.blocks import Block, Bullets, Code, Heading, Paragraph, Table
from results.checks import (
    fact,
    flag,
    list_of,
    mapping_of,
    number,
    one_of,
    or_null,
    positive,
    record,
    text,
)
from results.files import NO_FILES, checked_json, matching_files
from results.formats import commit, distinct
from results.metrics import QUANTITIES

FOLDER = "super_resolution"
METRICS = ("psnr", "ssim", "psnr_y", "ssim_y", "lr_psnr")  # the columns
DECIMALS = {"dB": 2, "grey levels": 2, "": 4}  # by the unit
SET = record(
    {
        "images": positive,
        "sha256": text,
        "metrics": record({f"test/{name}": or_null(number) for name in METRICS}),
        "definitions": mapping_of(mapping_of(or_null(number))),
    }
)
FORM = record(
    {
        "model": one_of("bicubic"),
        "scale": positive,
        "arguments": list_of(text),
        "sets": mapping_of(SET),
        "protocol": mapping_of(mapping_of(fact)),
        "commit": or_null(text),
        "dirty": flag,
        "versions": mapping_of(text),
    }
)


class Published(NamedTuple):
    """A published row of bicubic interpolation.

    name: of the set. values: by the names of METRICS. source: one of SOURCES.
    """

    name: str
    scale: int
    values: Mapping[str, float]
    source: str


SOURCES = {  # the full reference of a source of published figures
    "ESRGAN": (
        "Wang et al. 2018, [arXiv 1809.00219](https://arxiv.org/abs/1809.00219), Table 2. Lim et "
        "al. 2017 (EDSR) and Zhang et al. 2018 (RCAN) have the same figures; that is recalled"
    ),
    "RCAN, recalled": (
        "Zhang et al. 2018, [arXiv 1807.02758](https://arxiv.org/abs/1807.02758), from memory: the "
        "figures were not compared with the paper"
    ),
    "SRFlow": (
        "Lugmayr et al. 2020, [arXiv 2006.14200](https://arxiv.org/abs/2006.14200), the comparison "
        "on DIV2K as a review quotes it"
    ),
}
PUBLISHED = (
    Published("Set5", 4, {"psnr_y": 28.42, "ssim_y": 0.8104}, "ESRGAN"),
    Published("Set14", 4, {"psnr_y": 26.00, "ssim_y": 0.7027}, "ESRGAN"),
    Published("BSD100", 4, {"psnr_y": 25.96, "ssim_y": 0.6675}, "ESRGAN"),
    Published("DIV2K", 4, {"psnr": 26.70, "ssim": 0.77, "lr_psnr": 38.70}, "SRFlow"),
    Published("Set5", 8, {"psnr_y": 24.40, "ssim_y": 0.6580}, "RCAN, recalled"),
    Published("Set14", 8, {"psnr_y": 23.10, "ssim_y": 0.5660}, "RCAN, recalled"),
    Published("BSD100", 8, {"psnr_y": 23.67, "ssim_y": 0.5480}, "RCAN, recalled"),
    Published("DIV2K", 8, {"psnr": 23.74, "ssim": 0.63, "lr_psnr": 37.16}, "SRFlow"),
)


class Definition(NamedTuple):
    """How a figure may be defined. difference: from what is logged. user: who defines it so."""

    difference: str
    user: str


# reproduce.bicubic computes each of them, by the same key.
DEFINITIONS = {
    "rgb": Definition(
        "**RGB**: all channels, whole image, SSIM with a uniform window of 7 x 7. Logged as "
        "`test/psnr` and `test/ssim`",
        "SRFlow's paper and ours",
    ),
    "rgb/floor": Definition(
        "RGB; the super-resolved image rounded down", "SRFlow's release, which casts to uint8"
    ),
    "rgb/axis": Definition(
        "RGB; both resizings also rounded between their two axes", "MATLAB's imresize"
    ),
    "rgb/gaussian": Definition(
        "RGB; without a border of the scale, SSIM with a Gaussian window", "HCFlow's release"
    ),
    "rgb/pooled": Definition(
        "RGB; PSNR of the mean squared error over the whole set, not the mean of PSNRs",
        "torchmetrics, unless it is told `dim`",
    ),
    "y": Definition(
        "**Y**: luma, without a border of the scale, SSIM with a Gaussian window. Logged as "
        "`test/psnr_y` and `test/ssim_y`",
        "BasicSR and ours",
    ),
    "y/whole": Definition("Y; with the border", "-"),
    "y/uniform": Definition("Y; SSIM with a uniform window of 7 x 7", "scikit-image's default"),
    "y/grey": Definition(
        "Y; of a file with grey levels these, 0 to 255, and not a luma from 16 to 235",
        "MATLAB scripts, which convert only files with three channels",
    ),
    "y/matlab": Definition(
        "Y; as the line before, luma rounded to uint8, resizings rounded between their axes",
        "MATLAB scripts on uint8 images",
    ),
    "y/luma_first": Definition(
        "Y; the rounded luma is what is resized, in floating point, and the result rounded",
        "MATLAB scripts since SRCNN (Dong et al. 2014); it comes closest to what is published",
    ),
    "lr": Definition("**LR-PSNR** by RGB. Logged as `test/lr_psnr`", "ours"),
    "lr/floor": Definition(
        "LR-PSNR; the super-resolved image rounded down", "SRFlow's release, which casts to uint8"
    ),
    "lr/axis": Definition(
        "LR-PSNR; all resizings also rounded between their axes", "MATLAB's imresize"
    ),
    "lr/unmirrored": Definition(
        "LR-PSNR; the super-resolved image reduced without mirroring it at its border",
        "PyTorch's antialiased `interpolate`",
    ),
}
SHOWN = ("Set5", "Set14", "BSD100")  # the columns of the table of definitions, ...
SHOWN_SCALE = 4  # ... and their scale
TEXT = (
    "Images are reduced and enlarged by bicubic interpolation, compatible with MATLAB, and rounded "
    "once each time. Values are means over images; published ones are in brackets. "
    "[docs/evaluation.md](../docs/evaluation.md) says how each metric is defined."
)
DEFINITIONS_TEXT = (
    "The same images at scale {scale}, PSNR in dB / SSIM, by every definition that is in use. Two "
    "figures can be compared only if they are of one line."
)


def read(path: Path, content: bytes | None = None) -> dict:
    """The content of one file. ValueError, one line: reproduce.bicubic has not written it."""
    damaged = "is not what reproduce.bicubic writes ({problem}): restore it, or delete it"
    unusable = damaged.replace("{problem}", "no usable {problem}")
    return checked_json(path, FORM, damaged, unusable, content)


def read_all(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[dict]:
    """The content of every recorded file, by scale. new: files that are not written yet."""
    paths = matching_files(root, f"{FOLDER}/*.json", new)
    return sorted((read(path, new.get(path)) for path in paths), key=lambda file: file["scale"])


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section on all files of results/super_resolution/; empty without files."""
    files = read_all(root, new)
    if not files:
        return []
    commands = [
        shlex.join(["python", "-m", "reproduce.bicubic", *file["arguments"]]) for file in files
    ]
    blocks: list[Block] = [
        Heading("Super-resolution: bicubic interpolation as the model"),
        Paragraph(TEXT),
        Code("\n".join(commands)),
        figures(files, with_missing=True),
        Paragraph("Published in:"),
        Bullets([f"{source}: {reference}." for source, reference in SOURCES.items()]),
    ]
    at_scale = [file for file in files if file["scale"] == SHOWN_SCALE]
    if at_scale:
        blocks += [
            Heading("What a definition changes", level=3),
            Paragraph(DEFINITIONS_TEXT.format(scale=SHOWN_SCALE)),
            definitions(at_scale),
        ]
    return blocks


def figures(files: Sequence[dict], with_missing: bool = False) -> Table:
    """The table of the recorded sets, with published figures in brackets.

    with_missing: whether published rows that no file has get a line, too.
    """
    rows = []
    published = {(row.name, row.scale): row for row in PUBLISHED}
    for file in files:
        for name, measured in file["sets"].items():
            row = published.pop((name, file["scale"]), None)
            rows.append(
                [
                    name,
                    f"{file['scale']}",
                    f"{measured['images']}",
                    *(
                        cell(metric, measured["metrics"][f"test/{metric}"], row)
                        for metric in METRICS
                    ),
                    "-" if row is None else row.source,
                    commit(file),
                ]
            )
    if with_missing:
        for row in published.values():
            values = [cell(metric, None, row) for metric in METRICS]
            rows.append([row.name, f"{row.scale}", "not run", *values, row.source, "-"])
    labels = [heading(metric) for metric in METRICS]
    return Table(["set", "scale", "images", *labels, "published in", "commit"], rows)


def heading(metric: str) -> str:
    """The name of a metric with its unit: `PSNR (RGB), dB`."""
    quantity = QUANTITIES[metric]
    return f"{quantity.label}, {quantity.unit}" if quantity.unit else quantity.label


def cell(metric: str, value: float | None, row: Published | None) -> str:
    """A measured value, and the published one in brackets: `28.43 (28.42)`."""
    shown = decimal(metric, value)
    if row is not None and metric in row.values:
        return f"{shown} ({decimal(metric, row.values[metric])})"
    return shown


def decimal(metric: str, value: float | None) -> str:
    """A value with the decimals of its unit; `-` for none."""
    if value is None:
        return "-"
    return f"{value:.{DECIMALS[QUANTITIES[metric].unit]}f}"


def definitions(files: Sequence[dict]) -> Table:
    """The table of DEFINITIONS on the sets of SHOWN, and the published figures in Y below it."""
    sets: dict[str, dict] = {}
    for file in files:
        sets |= file["sets"]
    names = [name for name in SHOWN if name in sets]
    rows = []
    for key, definition in DEFINITIONS.items():
        cells = [both(sets[name]["definitions"].get(key, {})) for name in names]
        if set(cells) != {"-"}:
            rows.append([definition.difference, definition.user, *cells])
    published = {row.name: row for row in PUBLISHED if row.scale == SHOWN_SCALE}
    quoted = [row for row in published.values() if row.name in names]
    if quoted:
        cells = []
        for name in names:
            values = published[name].values
            cells.append(both({"psnr": values["psnr_y"], "ssim": values["ssim_y"]}))
        sources = distinct([row.source for row in quoted], "; ")
        rows.append(["Published, in Y", sources, *cells])
    return Table(["definition", "whose", *names], rows)


def both(values: Mapping[str, float | None]) -> str:
    """PSNR and SSIM by one definition, `28.43 / 0.8113`; only the one that it has.

    >>> both({"psnr": 28.428, "ssim": None}), both({}), both({"ssim": 0.81131})
    ('28.43', '-', '- / 0.8113')
    """
    psnr = decimal("psnr", values.get("psnr"))
    if values.get("ssim") is None:
        return psnr
    return f"{psnr} / {decimal('ssim', values['ssim'])}"
