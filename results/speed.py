"""What our flows cost beside others: the files of `python -m benchmarks`, without torch, for the page."""

import re
from pathlib import Path
from typing import Any

from results import ROOT, is_number
from results.files import checked_json, lacking

ROW = [
    *(
        "model",
        "setting",
        "dtype",
        "step_s",
        "floor_s",
        "sample_s_per_image",
        "activation_bytes_per_image",
    ),
    *("machine", "versions", "rounds", "commit", "dirty"),
]
PEER = "normflows"  # as it comes, in float32: what ratios are over
TUNED = "normflows channels_last autocast"  # in bf16
COMPILED = "ours compiled"  # and replayed as a CUDA graph, whose memory is not counted
STEP, SAMPLING, KEPT = "step_s", "sample_s_per_image", "activation_bytes_per_image"


def read(path: Path) -> list[dict]:
    """The rows of one file. ValueError, one line: not of benchmarks."""
    text = "is not what `python -m benchmarks` writes ({problem}): write it again"
    return checked_json(path, faults, damaged=text, unusable=text)


def faults(rows: Any) -> list[str]:
    """`no KEY` for the first key that a row lacks, or whose value is of no use."""
    keys = [
        key
        for row in (rows if isinstance(rows, list) and rows else [None])
        for key in lacking(row, ROW)
    ]
    keys = keys or ["setting" for row in rows if not re.search(r"B[1-9]\d*$", str(row["setting"]))]
    keys = keys or [KEPT for row in rows if not is_number(row[KEPT]) and row["model"] != COMPILED]
    return [f"no {key}" for key in keys[:1]]


def read_all(root: Path = ROOT) -> dict[str, list[dict]]:
    """The rows of every recorded file by its stem."""
    return {path.stem: read(path) for path in sorted((Path(root) / "benchmarks").glob("*.json"))}


def cells(row: dict, rows: list[dict]) -> list[str]:
    """Setting, dtype, model; step, images/s, over the floor and the peers; sampling and memory over the peer's."""
    beside = {other["model"]: other for other in rows if other["setting"] == row["setting"]}
    peer = beside.get(PEER, {})
    same_dtype = beside.get(PEER if row["dtype"] == "float32" else TUNED, {})
    return [
        row["setting"],
        row["dtype"],
        row["model"],
        f"{row[STEP]:.3f} s" if is_number(row[STEP]) else "not measured",
        images(batch(row) / row[STEP]) if is_number(row[STEP]) else "-",
        ratio(row[STEP], row["floor_s"]),
        ratio(row[STEP], peer.get(STEP)),
        ratio(row[STEP], same_dtype.get(STEP)),
        f"{1e3 * row[SAMPLING]:.1f} ms" if is_number(row[SAMPLING]) else "not measured",
        ratio(row[SAMPLING], peer.get(SAMPLING)),
        f"{row[KEPT] / 2**20:.2f} MiB" if is_number(row[KEPT]) else "-",
        ratio(row[KEPT], peer.get(KEPT), ".3f"),
    ]


def words(stem: str, rows: list[dict]) -> str:
    """What follows `python -m benchmarks` to measure the rows of a file, named KIND.json or KIND-MACHINE.json."""
    settings = {row["setting"] for row in rows}
    setting = (
        [f'"settings={settings.pop()}"'] if len(settings) == 1 and stem.startswith("glow-") else []
    )
    rounds = [f"rounds={rows[0]['rounds']}"] if rows[0]["rounds"] != 7 else []
    return " ".join([stem.partition("-")[0], *setting, *rounds])


def batch(row: dict) -> int:
    """Images of a step: the number behind the last B of a setting."""
    return int(row["setting"].rpartition("B")[2])


def images(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def ratio(ours: float | None, other: float | None, form: str = ".2f") -> str:
    return format(ours / other, form) if is_number(ours) and is_number(other) and other else "-"
