"""What the papers claim (`paper/*.yaml`), what we measured (`runs/`), and how the two compare.

Nothing in this package imports torch.
"""

import difflib
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from results.checks import (
    check,
    fact,
    is_number,
    keys,
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
from results.metrics import kind_of, without_kind
from results.protocol import IMAGE_FACTS, differences, image_facts, images_of

ROOT = Path(__file__).parent
# What commands write into a clone, relative to its root: pages, curves, pictures and recorded runs.
# No code reads them in training, so a change to them does not make the state of the code dirty.
GENERATED = (
    "README.md",
    "results/README.md",
    "results/ablations",
    "results/benchmarks",
    "results/index.html",
    "results/ood",
    "results/runs",
    "results/stability",
    "results/thumbnails",
    "results/super_resolution",
    "results/weights",
)
DECIMALS = 2  # of the numbers of a claim that does not say how many its paper prints
STATUSES = {
    "reproduced": "the paper's protocol, and as good as the claim or within its tolerance",
    "gap": "worse than the tolerance allows, with the full budget; the run names a likely cause",
    "shortened": "worse than the tolerance allows, with less than the full budget",
    "other protocol": "measured in another way than the paper's: the two are not compared",
    "not measured": "the run does not have the claim's metric",
    "not run": "no run is recorded",
    "-": "there is no claim that the run can be compared with",
}
VERIFIED = {  # where a claim's numbers were read; one from memory alone is never a claim
    "seed": "in a review that this project started from",
    "stored": "in another text that quotes the paper",
}
decimals_form = check(lambda value: type(value) is int and 0 <= value <= 6)
FIGURE = record(
    {"value": number, "train": or_null(number)},
    optional={"bound": text, "decimals": decimals_form},
)
CLAIM = {
    "dataset": text,
    "data": text,
    "table": text,
    "row": text,
    "split": text,
    "metric": text,
    "unit": text,
    "value": number,
    "direction": one_of("lower", "higher"),
    "tolerance": number,
    "protocol": mapping,
    "train": or_null(number),
    "compared": mapping_of(FIGURE),
    "verified": one_of(*VERIFIED),
}
MORE_OF_CLAIM = {
    "checked": mapping_of(fact),  # facts that must agree for a comparison (`results.protocol`)
    "allowed": mapping_of(fact),  # facts that may differ; the difference is printed
    "experiment": stem,  # the recipe, where its name is not <paper>_<row>
    "decimals": decimals_form,
    "source": text,
}
PAPER = record({"title": text, "arxiv": text}, optional={"notes": list_of(text)})
ROUNDING = (
    1e-9  # 3.51 - 3.49 is slightly more than 0.02 in binary, and is within a tolerance of 0.02
)


def load_papers(root: Path = ROOT) -> dict[str, dict]:
    """All of `paper/*.yaml`, by file stem. ValueError as `load_paper`."""
    return {path.stem: load_paper(path) for path in sorted((Path(root) / "paper").glob("*.yaml"))}


def load_paper(path: Path) -> dict:
    """One file of claims.

    ValueError, one line: the file is not YAML or has no `claims`, or a value is missing or of the
    wrong kind, for example a key of CLAIM.
    """
    try:
        paper = parsed(path.read_text(encoding="utf-8"))
        claims = {row: dict(claim) for row, claim in paper["claims"].items()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be YAML with a mapping `claims`: {reason}") from error
    faults = {"the file": keys(PAPER, paper)}
    for row, claim in claims.items():
        if decimals_form(decimals_of(claim)):
            raise ValueError(
                f"{path}: decimals={decimals_of(claim)} of the claim {row} are not understood: "
                "give an int from 0 to 6"
            )
        refuse_unknown(claim, f"{path}: the claim {row}")
        faults[f"the claim {row}"] = keys(record(CLAIM, MORE_OF_CLAIM), claim)
    for place, names in faults.items():
        if names:
            raise ValueError(
                f"{path}: {place} lacks {', '.join(names)}: see results/paper/realnvp.yaml"
            )
    return paper


def refuse_unknown(claim: Mapping, place: str) -> None:
    """ValueError, one line: a claim has a key that nothing reads, perhaps misspelled."""
    known = [*CLAIM, *MORE_OF_CLAIM]
    for key in claim:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{place} has an unknown key '{key}': did you mean '{nearest}'?")


@functools.lru_cache(maxsize=64)
def parsed(content: str) -> Any:
    """The value of a YAML file; the same object for the same content, so it must stay as it is."""
    return yaml.safe_load(content)


def load_claims(root: Path = ROOT) -> dict[str, dict]:
    """Every claim by its id `<paper>.<row>`, e.g. `realnvp.cifar10`; each has its `id`.

    A claim may have `decimals`, how many of them the paper prints in the row; the default is
    DECIMALS.
    """
    claims = {}
    for name, paper in load_papers(root).items():
        for row, claim in paper["claims"].items():
            claim_id = f"{name}.{row}"
            claims[claim_id] = {"id": claim_id, **claim}
    return claims


def load_claim(claim_id: str, root: Path = ROOT) -> dict:
    """The claim called `<paper>.<row>`.

    ValueError, one line that names the nearest id: there is no such claim.
    """
    claims = load_claims(root)
    if claim_id in claims:
        return claims[claim_id]
    nearest = difflib.get_close_matches(str(claim_id), sorted(claims), n=1, cutoff=0.0)
    hint = "there are no claims at all"
    if nearest:
        hint = f"did you mean '{nearest[0]}'?"
    raise ValueError(
        f"unknown claim '{claim_id}': {hint} (claims are the rows of results/paper/*.yaml)"
    )


def recipe_of(claim: Mapping) -> str:
    """The name of the recipe that reproduces a claim, e.g. `realnvp_cifar10`."""
    return claim.get("experiment", claim["id"].replace(".", "_"))


def papers_with_recipe(recipes: Iterable[str], root: Path = ROOT) -> dict[str, dict]:
    """Of `load_papers` those of which a recipe reproduces a claim.

    recipes: the names of the files in configs/, without their suffix.
    """
    names = set(recipes)
    stems = {
        claim["id"].partition(".")[0]
        for claim in load_claims(root).values()
        if recipe_of(claim) in names
    }
    return {stem: paper for stem, paper in load_papers(root).items() if stem in stems}


def decimals_of(claim: Mapping) -> int:
    """How many decimals the paper prints in a claim's row."""
    return claim.get("decimals", DECIMALS)


def printed(value: float, claim: Mapping) -> str:
    """A number of a claim's row as its paper prints it, with the claim's decimals, e.g. `0.120`."""
    return f"{value:.{decimals_of(claim)}f}"


def own_decimals(claim: Mapping, at_least: int = 3) -> int:
    """The decimals of our numbers beside a claim: one more than the claim's, or `at_least`."""
    return max(at_least, decimals_of(claim) + 1)


def same_n_bits(claim: Mapping, data: Mapping) -> bool:
    """Whether the images of a run have as many bits as the claim's.

    data: the section of the run's config. Older runs were recorded without `n_bits` and had 8.
    """
    claimed = claim["protocol"].get("n_bits")
    return claimed is None or claimed == data.get("n_bits", 8)


def same_images(claim: Mapping, data: Mapping) -> bool:
    """Whether a run has a claim's images: the data set, the bits, and IMAGE_FACTS of `checked`.

    data: the section of the run's config.
    """
    checked = claim.get("checked") or {}
    facts = image_facts(data)
    same_facts = all(
        facts.get(fact) == checked[fact] for fact in IMAGE_FACTS if checked.get(fact) is not None
    )
    return images_of(data) == claim["data"] and same_n_bits(claim, data) and same_facts


def papers_in(result: Mapping) -> list[dict]:
    """The claims with which a run is compared: `papers`, or the one `paper` of an older run."""
    if "papers" in result:
        return result["papers"]
    if result.get("paper"):
        return [result["paper"]]
    return []


def compare(result: Mapping, paper: Mapping, root: Path = ROOT) -> dict[str, Any]:
    """Compare a result with one number of a paper.

    Images of 5 and of 8 bits are different data, and a bound and an exact density are different
    figures: neither pair is compared. Nor are figures that were measured in different ways.

    Args:
        result: a run's result; its `metrics`, `budget.fraction`, `config.data.n_bits` and what
            `results.protocol` and the reason of a missing metric need are read.
        paper: an entry of its `papers`: the claim's id, the metric, and `comparable`.
        root: the results folder. Value, tolerance, direction and bits come from the claim there.

    Returns:
        gap: our number minus the paper's, in the claim's unit; None if the two are not compared, or
            if the metric is not a finite number.
        status: one of
            `-`               there is nothing to compare, or the run has only another kind of the
                              figure;
            `not measured`    the run does not have the claim's figure;
            `other protocol`  the figure was measured in another way than the claim's;
            `reproduced`      as good as the claim, or within its tolerance; never without a finite
                              number;
            `gap`             worse than that, at the full budget;
            `shortened`       worse than that, at a smaller or an unknown budget.
        differences: what keeps a figure of another protocol from comparison, in sentences.
        reason: why the metric was not measured and what to do; None where that is not known.

    Raises:
        ValueError: the claim is unknown.
    """
    verdict: dict[str, Any] = {"gap": None, "status": "-", "differences": [], "reason": None}
    if not paper.get("comparable", False):
        return verdict
    metric = paper["metric"]
    claim = load_claim(paper["claim"], root)
    data = (result.get("config") or {}).get("data") or {}
    if not same_n_bits(claim, data) or kind_of(metric) != kind_of(claim["metric"]):
        return verdict
    if metric in result["metrics"]:
        return verdict | judged(result, {**claim, "metric": metric})
    reason = (result.get("not_measured") or {}).get(metric)
    if reason is None and without_kind(metric) in map(without_kind, result["metrics"]):
        return verdict
    return verdict | {"status": "not measured", "reason": reason}


def judged(result: Mapping, claim: Mapping) -> dict[str, Any]:
    """The gap and the status of a measured metric, or the differences in its protocol."""
    others = differences(claim, result)
    if others:
        return {"status": "other protocol", "differences": others}
    gap = gap_to(claim, result["metrics"][claim["metric"]])
    return {"gap": gap, "status": status_of(gap, claim, result.get("budget") or {})}


def gap_to(claim: Mapping, value: object) -> float | None:
    """A value minus the claim's; None where the value is no finite number."""
    if is_number(value):
        return value - claim["value"]
    return None


def status_of(gap: float | None, claim: Mapping, budget: Mapping) -> str:
    """The status of a measured metric: see `compare`."""
    excess = math.inf
    if gap is not None:
        excess = {"lower": gap, "higher": -gap}[claim["direction"]]
    if excess <= claim["tolerance"] + ROUNDING:
        return "reproduced"
    fraction: object = budget.get("fraction")
    if is_number(fraction) and fraction >= 1:
        return "gap"
    return "shortened"


def compare_all(result: Mapping, root: Path = ROOT) -> dict[str, Any]:
    """Compare a result with each of its `papers`.

    Returns:
        comparisons: for each claim its `claim` (the id), `metric`, `value` and `decimals`, and what
            `compare` returns.
        gap, status: those of the first claim; None and `-` without any.
    """
    comparisons = [
        {
            "claim": paper["claim"],
            "metric": paper["metric"],
            "value": paper.get("value"),
            "decimals": decimals_of(paper),
            **compare(result, paper, root),
        }
        for paper in papers_in(result)
    ]
    first = next(iter(comparisons), {"gap": None, "status": "-"})
    return {"comparisons": comparisons, "gap": first["gap"], "status": first["status"]}
