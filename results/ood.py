"""Likelihood as a detector of other data: the page's section on `python -m reproduce.ood`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from results import ROOT
from results.blocks import Block, Code, Drawing, Heading, Paragraph, Table
from results.checks import flag, list_of, mapping_of, number, one_of, or_null, record, text
from results.curves import ticks
from results.drawing import Line, Picture, Shape, Text
from results.files import NO_FILES, checked_json, matching_files
from results.formats import commit, distinct, fixed, machine_text, table

KIND = "ood"
FOLDER = "ood"  # below results/
AREA = or_null(record({"value": number, "low": number, "high": number}))
COUNTS = record(
    {
        "low": number,
        "high": number,
        "inside": list_of(number, at_least=1),
        "outside": list_of(number, at_least=1),
    }
)
AVERAGES = mapping_of(or_null(number))
SCORED = {"n": number, "not_finite": number, "means": AVERAGES, "medians": AVERAGES}
FORM = record(  # what reproduce.ood writes
    {
        "kind": one_of(KIND),
        "model": text,
        "experiment": text,
        "data": text,
        "weights": text,
        "command": text,
        "n": number,
        "m": number,
        "seed": number,
        "commit": or_null(text),
        "dirty": flag,
        "device": text,
        "versions": mapping_of(text),
        "training": record(SCORED),
        "held_out": record(SCORED),
        "thresholds": mapping_of(or_null(number)),
        "inside": record(
            SCORED
            | {
                "flagged": mapping_of(or_null(number)),
                "rank_correlation": mapping_of(or_null(number)),
            }
        ),
        "sets": list_of(
            record(
                SCORED
                | {
                    "name": text,
                    "title": text,
                    "preparation": text,
                    "unreadable": number,
                    "auroc": mapping_of(AREA),
                    "flagged": mapping_of(or_null(number)),
                    "histograms": mapping_of(COUNTS),
                }
            ),
            at_least=1,
        ),
        "left_out": list_of(text),
    }
)
COMPRESSORS = {"png": "PNG", "webp": "WebP"}  # names in a file -> for a reader
TITLE = "Likelihood as a detector of other data"
TEXT = (
    "A model's own test images beside other images, which were never trained on. AUROC is the "
    "probability that an image of the other set has the higher score (1: told apart, 0.5: not at "
    "all, 0: the wrong way round), with DeLong's 95 % interval. Likelihood: bits/dim. Corrected: "
    "bits/dim minus those of the image as a PNG or a lossless WebP file (Serrà et al. 2020). "
    "Typicality: the distance of bits/dim from their mean over training images, of single images "
    "and of means of batches (Nalisnick et al. 2019). Simpler images are those with smaller PNG "
    "files. Likelihood fails where it ranks simpler images the wrong way round; another score "
    "cures that with an AUROC of at least 0.9, and lessens it above 0.5, the whole interval "
    "included."
)
# What papers report of sets that no recorded file has. The figures are quoted from memory, and were
# not compared with the papers.
QUOTED = {
    "svhn": (
        "SVHN was not at hand. Of Glow trained on CIFAR-10 these figures are quoted from memory, "
        "and are not checked: the test images of SVHN have about 2.39 bits/dim and those of "
        "CIFAR-10 about 3.46 (Nalisnick et al. 2019), so that the AUROC of likelihood is about "
        "0.07, and about 0.95 after the correction for complexity (Serrà et al. 2020)."
    )
}
FAR = 100  # bits/dim
CURED = 0.9  # the least AUROC of a score that cures what likelihood gets the wrong way round
MARGIN = 1e-9  # of an AUROC from 0.5

# ---------------------------------------------------------------------- reading


def read(path: Path, content: bytes | None = None) -> dict:
    """The content of one file. ValueError, one line: reproduce.ood has not written it."""
    damaged = "is not what reproduce.ood writes ({problem}): restore it, or delete it"
    unusable = damaged.replace("{problem}", "no usable {problem}")
    return checked_json(path, FORM, damaged, unusable, content)


def read_all(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> dict[str, dict]:
    """The content of every recorded file by its stem. new: files that are not written yet."""
    paths = matching_files(root, f"{FOLDER}/*.json", new)
    return {path.stem: read(path, new.get(path)) for path in paths}


# ---------------------------------------------------------------------- verdict


def is_simpler(other: dict, inside: dict) -> bool:
    """Whether the images of a set are simpler than the model's own, by their mean PNG file."""
    return other["means"]["png"] < inside["means"]["png"]


def has(other: dict, score: str) -> bool:
    """Whether a score was measured for a set, which may have too few images for batches."""
    return other["auroc"].get(score) is not None


def is_above(other: dict, score: str) -> bool:
    """Whether a score ranks a set as other data: its whole interval is above 0.5."""
    area = other["auroc"].get(score)
    return area is not None and area["low"] > 0.5 + MARGIN


def is_below(other: dict, score: str) -> bool:
    """Whether a score ranks a set the wrong way round: its whole interval is below 0.5."""
    area = other["auroc"].get(score)
    return area is not None and area["high"] < 0.5 - MARGIN


def area_text(area: dict | None) -> str:
    """`0.071 (0.068 to 0.074)`; `-` where there are too few images."""
    if area is None:
        return "-"
    return f"{area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})"


def named(sets: Sequence[dict], score: str) -> str:
    """`MNIST test (0.012) and uniform noise (1.000)`: sets with their AUROC of a score."""
    texts = []
    for each in sets:
        area = each["auroc"].get(score)
        figure = fixed((area or {}).get("value"))
        texts.append(f"{each['title']} ({figure})")
    return joined(texts)


def joined(texts: Sequence[str]) -> str:
    """Texts as a list in a sentence.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def scores_of(content: dict) -> dict[str, str]:
    """The scores beside the likelihood, with the subject of a sentence on each."""
    names = {
        f"corrected_{key}": f"the correction by {name}"
        for key, name in COMPRESSORS.items()
        if key in content["inside"]["means"]
    }
    names["typicality_1"] = "typicality of single images"
    names["typicality_m"] = f"typicality of batches of {content['m']:g}"
    return names


def verdict(content: dict) -> str:
    """Whether simpler images score higher, and whether other scores cure it, in sentences."""
    inside = content["inside"]
    sets = content["sets"]
    simpler = [each for each in sets if is_simpler(each, inside)]
    failing = [each for each in simpler if is_below(each, "likelihood")]
    return " ".join([failure(simpler, failing), *cures(content, failing), *correlation(inside)])


def failure(simpler: list[dict], failing: list[dict]) -> str:
    """The sentence on whether simpler images are more likely. failing: those of `simpler`."""
    if not simpler:
        return (
            "No set is simpler than the model's own test images, "
            "so nothing can be said of the failure of likelihood."
        )
    if not failing:
        return (
            "The known failure of likelihood does not appear: no simpler set is more likely than "
            f"the model's own test images, by AUROC {named(simpler, 'likelihood')}."
        )
    text = (
        "The known failure of likelihood appears: simpler images are more likely than the model's "
        f"own test images, by AUROC {named(failing, 'likelihood')}"
    )
    others = [each for each in simpler if each not in failing]
    if others:
        text += f"; of the simpler sets {named(others, 'likelihood')} are not"
    return f"{text}."


def cures(content: dict, failing: list[dict]) -> Iterator[str]:
    """A sentence for each of the other scores: what it cures, and what it loses."""
    detected = [each for each in content["sets"] if is_above(each, "likelihood")]
    for score, name in scores_of(content).items():
        parts = [
            f"{words} {named(sets, score)}"
            for words, sets in graded([each for each in failing if has(each, score)], score).items()
            if sets
        ]
        lost = [each for each in detected if has(each, score) and not is_above(each, score)]
        if lost:
            parts.append(f"no longer finds {named(lost, score)}, which likelihood does")
        if parts:
            yield f"{name[0].upper()}{name[1:]} {joined(parts)}."


def graded(failing: list[dict], score: str) -> dict[str, list[dict]]:
    """The sets at which likelihood fails, by what another score does about it, in words."""
    grades: dict[str, list[dict]] = {"cures it for": [], "lessens it for": [], "does not cure": []}
    for each in failing:
        if not is_above(each, score):
            grades["does not cure"].append(each)
        elif each["auroc"][score]["value"] < CURED:
            grades["lessens it for"].append(each)
        else:
            grades["cures it for"].append(each)
    return grades


def correlation(inside: dict) -> Iterator[str]:
    """A sentence on how complexity and likelihood go together in the model's own test images."""
    rank = inside["rank_correlation"].get("png")
    if rank is not None:
        yield (
            "Among the model's own test images the rank correlation of bits/dim with the bits/dim "
            f"of the PNG file is {rank:.2f}."
        )


# ---------------------------------------------------------------------- table


def columns(content: dict) -> list[str]:
    """The names of the columns."""
    here = [name for key, name in COMPRESSORS.items() if key in content["inside"]["means"]]
    return [
        "images",
        "n",
        "bits/dim",
        *(f"as {name}" for name in here),
        "AUROC of likelihood",
        *(f"corrected by {name}" for name in here),
        "typicality, m=1",
        f"typicality, m={content['m']:g}",
        "beyond the limit, m=1",
        f"m={content['m']:g}",
    ]


def rows(content: dict) -> list[list[str]]:
    """A row for the model's own test images, and one for each set."""
    inside = content["inside"]
    scores = ["likelihood", *scores_of(content)]
    limits = ["typicality_1", "typicality_m"]
    own = [f"**{content['data']}, its own test**", *figures(inside), *["-"] * len(scores)]
    own += [share_text(inside, name) for name in limits]
    others = [
        [
            f"{each['title']} ({each['preparation']})",
            *figures(each),
            *(area_text(each["auroc"].get(score)) for score in scores),
            *(share_text(each, name) for name in limits),
        ]
        for each in content["sets"]
    ]
    return [own, *others]


def figures(scored: dict) -> list[str]:
    """How many images there are, and the means of their bits per dimension."""
    count = f"{scored['n']:,}"
    if scored["not_finite"]:
        count += f" ({scored['not_finite']:,} not finite)"
    return [count, *(average(scored, name) for name in scored["means"])]


def average(scored: dict, name: str) -> str:
    """The mean; where single images are far out, so that it says little, also the median."""
    mean = scored["means"][name]
    if mean is None or abs(mean) < FAR:
        return fixed(mean)
    return f"{mean:.1e} (median {scored['medians'][name]:.4g})"


def lines_of(content: dict) -> list[str]:
    """The table as lines for a terminal."""
    return table(columns(content), rows(content))


def without_set(name: str, advice: str) -> str:
    """The line on a set that was not compared."""
    return f"{name} is left out: {advice}"


def threshold_text(content: dict) -> str:
    """What the thresholds of typicality let pass and stop."""
    parts = []
    for name, m in (("typicality_1", 1), ("typicality_m", content["m"])):
        limit = fixed(content["thresholds"][name])
        own = share_text(content["inside"], name)
        parts.append(f"batches of {m:g} beyond {limit} bits/dim: {own} of its own test")
    n = content["held_out"]["n"]
    return (
        "The last columns are the shares of batches whose typicality is beyond a limit that 99 % "
        f"of batches drawn from {n:,} held-out images pass; {', '.join(parts)}."
    )


def share_text(scored: dict, name: str) -> str:
    """The share of batches that are beyond the limit of a typicality; `-` without batches."""
    return fixed(scored["flagged"].get(name), ".1%")


# ---------------------------------------------------------------------- histograms

WIDTH = 760  # pixels, as the next seven
PANEL = 130  # the height of one row of histograms
LEFT = 24
GAP = 40  # between the histograms of a row
TOP = 44
TITLE_ROOM = 26
AXIS_ROOM = 24
BASELINE = 15  # of the numbers, below the axis
INSIDE_COLOR = "#0550ae"
OUTSIDE_COLOR = "#bc4c00"
AXIS_COLOR = "#888888"


def histograms(content: dict) -> Picture:
    """The distribution of scores, of each set beside the model's own test images.

    A row for each set: bits/dim on the left, and on the right those corrected by the best
    compressor that there is. Each curve is scaled to its own highest interval.
    """
    shown = [name for name in ("corrected_webp", "corrected_png") if name in scores_of(content)]
    compressor = COMPRESSORS[shown[0].removeprefix("corrected_")]
    titles = {"likelihood": "bits/dim", shown[0]: f"corrected by {compressor}"}
    shapes: list[Shape] = [
        Text((LEFT, 20), f"{content['model']}: its own test images", "start", INSIDE_COLOR, True),
        Text((WIDTH - LEFT, 20), "the other images", "end", OUTSIDE_COLOR, True),
    ]
    for row, each in enumerate(content["sets"]):
        for column, (score, title) in enumerate(titles.items()):
            width = (WIDTH - 2 * LEFT - GAP) / 2
            corner = (LEFT + column * (width + GAP), TOP + row * PANEL)
            shapes.append(Text((corner[0], corner[1] + 12), f"{each['title']}: {title}", "start"))
            counts = each["histograms"].get(score)
            if counts is not None:
                shapes += panel(counts, corner, width)
    return Picture(WIDTH, TOP + PANEL * len(content["sets"]), tuple(shapes))


def panel(counts: dict, corner: tuple[float, float], width: float) -> Iterator[Shape]:
    """The two histograms of one score. corner: the upper left one of the panel."""
    bottom = corner[1] + PANEL - AXIS_ROOM
    height = PANEL - AXIS_ROOM - TITLE_ROOM - 4
    span = counts["high"] - counts["low"]
    for color, name in ((INSIDE_COLOR, "inside"), (OUTSIDE_COLOR, "outside")):
        yield steps(counts[name], corner[0], bottom, width, height, color)
    yield Line(((corner[0], bottom), (corner[0] + width, bottom)), AXIS_COLOR)
    for value in ticks(counts["low"], counts["high"], 5):
        x = corner[0] + width * (value - counts["low"]) / span
        yield Line(((x, bottom), (x, bottom + 3)), AXIS_COLOR)
        yield Text((x, bottom + BASELINE), f"{value:g}")


def steps(
    counts: list[int], left: float, bottom: float, width: float, height: float, color: str
) -> Line:
    """The outline of a histogram, as high as `height` at its highest interval."""
    most = max([1, *counts])
    points = [(left, bottom)]
    for k, count in enumerate(counts):
        y = bottom - height * count / most
        points.append((left + width * k / len(counts), y))
        points.append((left + width * (k + 1) / len(counts), y))
    points.append((left + width, bottom))
    return Line(tuple(points), color, 1.5)


# ---------------------------------------------------------------------- section


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section: for each file in results/ood/ the verdict, the table and the histograms."""
    files = read_all(root, new)
    if not files:
        return []
    blocks: list[Block] = [Heading(TITLE), Paragraph(TEXT)]
    for stem, content in files.items():
        blocks += part(stem, content)
    measured = {each["name"] for content in files.values() for each in content["sets"]}
    blocks += [Paragraph(quote) for name, quote in QUOTED.items() if name not in measured]
    return blocks


def part(stem: str, content: dict) -> list[Block]:
    """The blocks of one file."""
    left_out = distinct(content["left_out"], ", ")
    facts = f"Commit {commit(content)}, {machine_text(content['device'])}."
    if left_out:
        facts += f" Left out: {left_out}."
    caption = (
        f"Histograms of the scores of {content['model']}: the first and the last interval also "
        "hold the scores beyond them"
    )
    return [
        Heading(content["model"], 3),
        Paragraph(verdict(content)),
        Table(columns(content), rows(content)),
        Paragraph(threshold_text(content)),
        Drawing(histograms(content), caption, f"{FOLDER}/{stem}.svg"),
        Code(content["command"]),
        Paragraph(facts),
    ]
