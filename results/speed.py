"""What our flows cost beside others: the page's section on the files of `python -m benchmarks`."""

import re
from pathlib import Path
from typing import Any

from results import ROOT, is_number
from results.checks import anything, check, flag, list_of, or_null, positive, record, text
from results.files import checked_json
from results.formats import commit, table

PEER = "normflows"  # as it comes, in float32: what ratios are over
TUNED = "normflows channels_last autocast"  # in bf16
COMPILED = "ours compiled"  # replayed as a CUDA graph, whose memory is not counted
STEP = "step_s"
SAMPLING = "sample_s_per_image"
KEPT = "activation_bytes_per_image"

ROW = record(
    {
        "model": text,
        "setting": check(lambda value: isinstance(value, str) and re.search(r"B[1-9]\d*$", value)),
        "dtype": text,
        STEP: or_null(positive),
        "floor_s": or_null(positive),
        SAMPLING: or_null(positive),
        KEPT: or_null(positive),
        "machine": text,
        "versions": record(),
        "rounds": positive,
        "commit": or_null(text),
        "dirty": flag,
    },
    optional={"apart": anything},
)
COLUMNS = [
    "setting",
    "dtype",
    "model",
    "step",
    "images/s",
    "over the convolutions alone",
    f"over {PEER}",
    "of its dtype",
    "sampling an image",
    f"over {PEER}",
    "kept for backward, an image",
    f"over {PEER}",
]
TEXT = f"""Medians of one run in which all models take turns, and ratios within it.

* Processes: where the table of a CPU does not say that each model had a process of its own, all
  were in one and shared the memory that it had freed. Ratios of the two kinds do not compare.
* The convolutions alone are those of the conditioners, forward and both gradients, in the same
  dtype.
* {PEER}: its Glow as it comes, in float32; in bf16 with channels_last and autocast around it.
* A step of Glow includes Adamax. Ours works on all weights at once; the peer's is PyTorch's, which
  takes them one after another.
* Sampling: our inverses are made once, before; the peer cannot keep its own.
* Float32 is without TF32. bf16 is timed where the hardware multiplies it.
* Memory is what the graph keeps for the backward pass, without the parameters.
* Compiled, on a GPU: as preset=gpu, which also replays the flow's passes as CUDA graphs. The
  convolutions alone are launched one by one."""


def form(rows: Any) -> list[str]:
    """What is missing or wrong in a file (`results.checks`).

    A compiled flow is the only one that may lack its memory.
    """
    places = list_of(ROW, at_least=1)(rows)
    if places:
        return places
    return [
        f"[{k}].{KEPT}"
        for k, row in enumerate(rows)
        if row[KEPT] is None and row["model"] != COMPILED
    ]


def read(path: Path) -> list[dict]:
    """The rows of one file. ValueError, one line: not of benchmarks."""
    damaged = "is not what `python -m benchmarks` writes ({problem}): write it again"
    unusable = damaged.replace("{problem}", "no usable {problem}")
    return checked_json(path, form, damaged, unusable)


def read_all(root: Path = ROOT) -> dict[str, list[dict]]:
    """The rows of every recorded file by its stem."""
    return {path.stem: read(path) for path in sorted((Path(root) / "benchmarks").glob("*.json"))}


def section(root: Path = ROOT) -> list[str]:
    """What flows cost: a table a file that `python -m benchmarks` wrote to results/benchmarks/."""
    lines = []
    for stem, rows in read_all(root).items():
        lines += [f"{origin(stem, rows)}:", ""]
        lines += table(COLUMNS, [cells(row, rows) for row in rows])
    if lines:
        return ["## Speed", "", TEXT, "", *lines]
    return []


def origin(stem: str, rows: list[dict]) -> str:
    """How, where and with what the rows of a file were measured; all of them agree in that."""
    row = rows[0]
    parts = [
        f"`python -m benchmarks {words(stem, rows)}`",
        row["machine"],
        *(f"{name} {version}" for name, version in row["versions"].items()),
        f"commit {commit(row)}",
        f"{row['rounds']} rounds",
    ]
    if row.get("apart"):
        parts.append("each model in a process of its own")
    return ", ".join(parts)


def words(stem: str, rows: list[dict]) -> str:
    """The arguments of `python -m benchmarks` that measure the rows of a file.

    stem: the file is named KIND.json or KIND-MACHINE.json.
    """
    parts = [stem.partition("-")[0]]
    settings = {row["setting"] for row in rows}
    if len(settings) == 1 and stem.startswith("glow-"):
        parts.append(f'"settings={settings.pop()}"')
    rounds = rows[0]["rounds"]
    if rounds != 7:
        parts.append(f"rounds={rounds}")
    return " ".join(parts)


def cells(row: dict, rows: list[dict]) -> list[str]:
    """The cells of COLUMNS.

    Ratios are over the peer at the same setting; those of the step also over the peer in the same
    dtype.
    """
    at_setting = {other["model"]: other for other in rows if other["setting"] == row["setting"]}
    peer = at_setting.get(PEER, {})
    same_dtype = at_setting.get({"float32": PEER}.get(row["dtype"], TUNED), {})
    return [
        row["setting"],
        row["dtype"],
        row["model"],
        written("{:.3f} s", row[STEP], "not measured"),
        images_per_second(row),
        ratio(row[STEP], row["floor_s"]),
        ratio(row[STEP], peer.get(STEP)),
        ratio(row[STEP], same_dtype.get(STEP)),
        written("{:.1f} ms", row[SAMPLING], "not measured", scale=1e3),
        ratio(row[SAMPLING], peer.get(SAMPLING)),
        written("{:.2f} MiB", row[KEPT], "-", scale=2**-20),
        ratio(row[KEPT], peer.get(KEPT), ".3f"),
    ]


def written(template: str, value: float | None, missing: str, scale: float = 1) -> str:
    """A number times its scale in a template, or the text for a missing one."""
    if is_number(value):
        return template.format(value * scale)
    return missing


def images_per_second(row: dict) -> str:
    """Training images a second. Those of a step are the number behind the last B of a setting."""
    if not is_number(row[STEP]):
        return "-"
    rate = int(row["setting"].rpartition("B")[2]) / row[STEP]
    if rate >= 100:
        return f"{rate:,.0f}"
    return f"{rate:.1f}"


def ratio(ours: float | None, other: float | None, form: str = ".2f") -> str:
    """Ours over another, `-` where one of them is missing."""
    if is_number(ours) and is_number(other):
        return format(ours / other, form)
    return "-"
