"""Whether an affine Glow stays finite: the files of `python -m benchmarks.stability`, without torch, for the page."""

import json
from pathlib import Path
from typing import Any

from results import ROOT
from results.runs import lacking

MODEL = ("depth", "hidden_channels", "batch_size", "min_scale", "optim")  # equal in all runs of a file
RUN = [  # what a run has; min_scale, which not all have: see `model`
    *("seed", "depth", "hidden_channels", "batch_size", "optim", "steps", "skipped_steps", "bpd", "highest_rise"),
    *("round_trip_grey_levels", "finite_T0.7", "finite_T1", "commit", "dirty", "device"),
]


def model(run: dict) -> dict[str, Any]:
    """The values of MODEL with dotted keys; min_scale is 0, the authors', where a run was recorded without."""
    values = {"min_scale": 0.0} | {key: run[key] for key in MODEL if key in run}
    return values | {f"optim.{key}": value for key, value in values.pop("optim").items()}


def changes(there: dict, here: dict) -> tuple[str, str] | None:
    """What the two have otherwise, `depth=4` and `depth=8`; None where they agree."""
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    was, now = (" ".join(f"{k}={values.get(k)}" for k in keys) for values in (there, here))
    return (was, now) if keys else None


def read(path: Path) -> dict:
    """kind, overrides and runs of one file. ValueError, one line: not of benchmarks.stability, or of two models."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lacks = lacking(content, ["kind", "overrides", "runs"])
        lacks = lacks or [key for run in content["runs"] or [None] for key in lacking(run, RUN)]
        problem = f"no {lacks[0]}" if lacks else None
    except (ValueError, TypeError) as error:  # not JSON, not text, or runs that are no list
        problem = str(error)
    if problem:
        raise ValueError(
            f"{path} is not what benchmarks.stability writes ({problem}): restore it, or give another file"
        )
    for run in content["runs"]:
        if found := changes(model(content["runs"][0]), model(run)):
            raise ValueError(f"{path} mixes runs of {found[0]} and {found[1]}: give each model a file of its own")
    return content


def read_all(root: Path = ROOT) -> dict[str, dict]:
    """The content of every recorded file by its stem."""
    return {path.stem: read(path) for path in sorted((Path(root) / "stability").glob("*.json"))}
