"""Whether an affine Glow stays finite: the files of `python -m benchmarks.stability`, without torch, for the page."""

from pathlib import Path
from typing import Any

from results import ROOT
from results.files import checked_json, lacking

MODEL = (
    "depth",
    "hidden_channels",
    "batch_size",
    "min_scale",
    "optim",
)  # equal in all runs of a file
RUN = [  # what a run has; min_scale, which not all have: see `model`
    *(
        "seed",
        "depth",
        "hidden_channels",
        "batch_size",
        "optim",
        "steps",
        "skipped_steps",
        "bpd",
        "highest_rise",
    ),
    *("round_trip_grey_levels", "finite_T0.7", "finite_T1", "commit", "dirty", "device"),
]


def model(run: dict) -> dict[str, Any]:
    """The values of MODEL with dotted keys; min_scale is 0, the authors', where a run was recorded without."""
    values = {"min_scale": 0.0} | {key: run[key] for key in MODEL if key in run}
    return values | {f"optim.{key}": value for key, value in values.pop("optim").items()}


def changes(old: dict, new: dict) -> tuple[str, str] | None:
    """What the two have otherwise, `depth=4` and `depth=8`; None where they agree."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    before, after = (" ".join(f"{key}={values.get(key)}" for key in keys) for values in (old, new))
    return (before, after) if keys else None


def read(path: Path) -> dict:
    """kind, overrides and runs of one file. ValueError, one line: not of benchmarks.stability, or of two models."""
    text = "is not what benchmarks.stability writes ({problem}): restore it, or give another file"
    content = checked_json(path, faults, damaged=text, unusable=text)
    for run in content["runs"]:
        if change := changes(model(content["runs"][0]), model(run)):
            raise ValueError(
                f"{path} mixes runs of {change[0]} and {change[1]}: give each model a file of its own"
            )
    return content


def faults(content: Any) -> list[str]:
    """`no KEY` for the first key that a file, or one of its runs, lacks."""
    keys = lacking(content, ["kind", "overrides", "runs"])
    keys = keys or ([] if isinstance(content["runs"], list) else ["runs"])
    keys = keys or [key for run in content["runs"] or [None] for key in lacking(run, RUN)]
    return [f"no {key}" for key in keys[:1]]


def read_all(root: Path = ROOT) -> dict[str, dict]:
    """The content of every recorded file by its stem."""
    return {path.stem: read(path) for path in sorted((Path(root) / "stability").glob("*.json"))}
