"""What the papers claim (`paper/*.yaml`), what we measured (`runs/`), and how the two compare. Imports no torch."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import yaml

ROOT = Path(__file__).parent
ROUNDING = 1e-9  # 3.51 - 3.49 is 0.02 and a little in binary: a gap equal to the tolerance is within it


def load_papers(root: Path = ROOT) -> dict[str, dict]:
    """All of `paper/*.yaml`, by file stem. ValueError, one line, when a file is not YAML or has no `claims`."""
    papers = {}
    for path in sorted((Path(root) / "paper").glob("*.yaml")):
        try:
            papers[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))
            papers[path.stem]["claims"].items()
        except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be YAML with a mapping `claims`: {' '.join(str(error).split())}") from error
    return papers


def load_claims(root: Path = ROOT) -> dict[str, dict]:
    """Every claim by its id `<paper>.<row>`, e.g. `realnvp.cifar10`; each has its `id`."""
    rows = ((stem, row, claim) for stem, paper in load_papers(root).items() for row, claim in paper["claims"].items())
    return {f"{stem}.{row}": {"id": f"{stem}.{row}", **claim} for stem, row, claim in rows}


def load_claim(claim_id: str, root: Path = ROOT) -> dict:
    """The claim called `<paper>.<row>`. ValueError, one line that names the nearest id, when there is none."""
    claims = load_claims(root)
    if claim_id not in claims:
        nearest = difflib.get_close_matches(str(claim_id), sorted(claims), n=1, cutoff=0.0)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "there are no claims at all"
        raise ValueError(f"unknown claim '{claim_id}': {hint} (claims are the rows of results/paper/*.yaml)")
    return claims[claim_id]


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float; a diverged or missing metric is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def same_n_bits(claim: Mapping, data: Mapping) -> bool:
    """Whether the images of a run (its config's `data`) have the claim's bits; 8 where a run was recorded without."""
    wanted = claim["protocol"].get("n_bits")
    return wanted is None or wanted == data.get("n_bits", 8)


def compare(result: dict, root: Path = ROOT) -> dict:
    """Set a result beside its paper's number.

    Reads `metrics`, `paper` (claim, metric, comparable), `budget.fraction` and `config.data.n_bits`; value, tolerance,
    direction and `protocol.n_bits` come from the claim. 5-bit and 8-bit images are different data.

    Returns:
        gap: ours minus the paper's, in the claim's unit; None when not comparable or the metric is no finite number.
        status: `-` nothing to compare with; `reproduced` as good as the claim or within its tolerance (a metric that is
            no finite number never is); else `gap` at the full budget, `shortened` at less or an unknown one.

    Raises:
        ValueError: the claim is unknown.
    """
    paper = result.get("paper")
    if not paper or not paper.get("comparable", False):
        return {"gap": None, "status": "-"}
    claim = load_claim(paper["claim"], root)
    if not same_n_bits(claim, (result.get("config") or {}).get("data") or {}):
        return {"gap": None, "status": "-"}
    ours = result["metrics"].get(paper["metric"])
    gap = ours - claim["value"] if is_number(ours) else None
    worse = math.inf if gap is None else gap if claim["direction"] == "lower" else -gap
    if worse <= claim["tolerance"] + ROUNDING:
        return {"gap": gap, "status": "reproduced"}
    fraction: object = (result.get("budget") or {}).get("fraction")
    return {"gap": gap, "status": "gap" if is_number(fraction) and fraction >= 1 else "shortened"}
