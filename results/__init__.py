"""What the papers claim (`paper/*.yaml`), what we measured (`runs/`), and how the two compare. Imports no torch."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import yaml

from results.metrics import kind_of, without_kind

ROOT = Path(__file__).parent
DECIMALS = 2  # of the numbers of a claim that does not say how many its paper prints
CLAIM = (
    "dataset",
    "data",
    "table",
    "row",
    "split",
    "metric",
    "unit",
    "value",
    "direction",
    "tolerance",
    "protocol",
)
ROUNDING = (
    1e-9  # 3.51 - 3.49 is 0.02 and a little in binary: a gap equal to the tolerance is within it
)


def load_papers(root: Path = ROOT) -> dict[str, dict]:
    """All of `paper/*.yaml`, by file stem.

    ValueError, one line: a file is not YAML or has no `claims`, or a claim lacks one of CLAIM, or its `decimals` are no
    int from 0 to 6.
    """
    papers = {}
    for path in sorted((Path(root) / "paper").glob("*.yaml")):
        try:
            papers[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))
            decimals = {
                row: decimals_of(claim) for row, claim in papers[path.stem]["claims"].items()
            }
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} must be YAML with a mapping `claims`: {' '.join(str(error).split())}"
            ) from error
        for row, claim in papers[path.stem]["claims"].items():
            if missing := [key for key in CLAIM if key not in claim]:
                raise ValueError(
                    f"{path}: the claim {row} lacks {', '.join(missing)}: see results/paper/realnvp.yaml"
                )
        for row, n in decimals.items():
            if type(n) is not int or not 0 <= n <= 6:
                raise ValueError(
                    f"{path}: decimals={n} of the claim {row} are not understood: give an int from 0 to 6"
                )
    return papers


def load_claims(root: Path = ROOT) -> dict[str, dict]:
    """Every claim by its id `<paper>.<row>`, e.g. `realnvp.cifar10`; each has its `id`.

    `decimals` may be left out: how many the paper prints in the row, DECIMALS where it does not say.
    """
    rows = (
        (stem, row, claim)
        for stem, paper in load_papers(root).items()
        for row, claim in paper["claims"].items()
    )
    return {f"{stem}.{row}": {"id": f"{stem}.{row}", **claim} for stem, row, claim in rows}


def load_claim(claim_id: str, root: Path = ROOT) -> dict:
    """The claim called `<paper>.<row>`. ValueError, one line that names the nearest id, when there is none."""
    claims = load_claims(root)
    if claim_id not in claims:
        nearest = difflib.get_close_matches(str(claim_id), sorted(claims), n=1, cutoff=0.0)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "there are no claims at all"
        raise ValueError(
            f"unknown claim '{claim_id}': {hint} (claims are the rows of results/paper/*.yaml)"
        )
    return claims[claim_id]


def decimals_of(claim: Mapping) -> int:
    """How many decimals the paper prints in a claim's row."""
    return claim.get("decimals", DECIMALS)


def printed(value: float, claim: Mapping) -> str:
    """A number of a claim's row as its paper prints it, `.120` as 0.120: with the claim's decimals."""
    return f"{value:.{decimals_of(claim)}f}"


def own_decimals(claim: Mapping, at_least: int = 3) -> int:
    """The decimals of our numbers beside a claim: one more than the claim's, and never fewer than `at_least`."""
    return max(at_least, decimals_of(claim) + 1)


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float; a diverged or missing metric is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def same_n_bits(claim: Mapping, data: Mapping) -> bool:
    """Whether the images of a run (its config's `data`) have the claim's bits; 8 where a run was recorded without."""
    wanted = claim["protocol"].get("n_bits")
    return wanted is None or wanted == data.get("n_bits", 8)


def papers_in(result: Mapping) -> list[dict]:
    """The claims beside which a run stands: `papers`, or the one `paper` of a run that was recorded with it."""
    if "papers" in result:
        return result["papers"]
    return [result["paper"]] if result.get("paper") else []


def compare(result: Mapping, paper: Mapping, root: Path = ROOT) -> dict:
    """Set a result beside one number of a paper.

    Reads the result's `metrics`, `budget.fraction` and `config.data.n_bits`, and of `paper` its `claim`, `metric` and
    `comparable`; value, tolerance, direction and `protocol.n_bits` come from the claim. 5-bit and 8-bit images are
    different data, and figures of different kinds (a bound, an exact density) are different figures.

    Returns:
        gap: ours minus the paper's, in the claim's unit; None when not comparable or the metric is no finite number.
        status: `-` nothing to compare with, also where the run has the figure as another kind only; `not measured`
            where it does not have it at all; `reproduced` as good as the claim or within its tolerance (a metric that
            is no finite number never is); else `gap` at the full budget, `shortened` at less or an unknown one.

    Raises:
        ValueError: the claim is unknown.
    """
    if not paper.get("comparable", False):
        return {"gap": None, "status": "-"}
    claim, metric = load_claim(paper["claim"], root), paper["metric"]
    same_data = same_n_bits(claim, (result.get("config") or {}).get("data") or {})
    if not same_data or kind_of(metric) != kind_of(claim["metric"]):
        return {"gap": None, "status": "-"}
    if metric not in result["metrics"]:
        as_another_kind = without_kind(metric) in map(without_kind, result["metrics"])
        return {"gap": None, "status": "-" if as_another_kind else "not measured"}
    ours = result["metrics"][metric]
    gap = ours - claim["value"] if is_number(ours) else None
    worse = math.inf if gap is None else gap if claim["direction"] == "lower" else -gap
    if worse <= claim["tolerance"] + ROUNDING:
        return {"gap": gap, "status": "reproduced"}
    fraction: object = (result.get("budget") or {}).get("fraction")
    return {"gap": gap, "status": "gap" if is_number(fraction) and fraction >= 1 else "shortened"}


def compare_all(result: Mapping, root: Path = ROOT) -> dict:
    """Set a result beside each of its `papers`.

    Returns:
        comparisons: for each claim its `claim` (the id), `metric`, `value` and `decimals`, and what `compare` returns.
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
    first = comparisons[0] if comparisons else {"gap": None, "status": "-"}
    return {"comparisons": comparisons, "gap": first["gap"], "status": first["status"]}
