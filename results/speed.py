"""The page's section on speed and memory, from the files that `python -m benchmarks` writes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results import ROOT, is_number
from results.blocks import Block, Bullets, Fold, Heading, Paragraph, Table
from results.checks import anything, check, flag, list_of, or_null, positive, record, text
from results.files import NO_FILES, checked_json
from results.formats import commit, machine_text

TITLE = "Speed"
PEER = "normflows"  # without changes, in float32: the ratios are over its numbers
TUNED = "normflows channels_last autocast"  # in bf16
COMPILED = "ours compiled"  # and replayed as a CUDA graph, whose memory is not counted
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
    optional={"apart": anything, "date": text},  # date: in ISO 8601, of the measurement
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
SHORT = [
    "measured",
    "model",
    "dtype",
    "step",
    "images/s",
    "step over the peer's, same dtype",
    "sampling an image",
    "kept for backward, an image",
]
# The columns of SHORT after the model, by their names among COLUMNS.
SHORT_OF_COLUMNS = [
    "dtype",
    "step",
    "images/s",
    "of its dtype",
    "sampling an image",
    "kept for backward, an image",
]
TEXT = "All models take turns in one run. A table shows medians of it, and ratios within it."
NOTES = [
    "Processes: a table of a CPU says if each model had a process of its own. Otherwise all models "
    "were in one process and shared the memory that it had freed. Tables of the two kinds do not "
    "compare.",
    '"The convolutions alone" are those of the conditioners, forward and both gradients, in the '
    "same dtype: what a step cannot be faster than.",
    f"The peer is {PEER}: its Glow without changes, in float32; in bf16 with channels_last and "
    "under autocast.",
    "A step of Glow includes Adamax. Ours works on all weights at once; for the peer it is "
    "PyTorch's, which works on one weight after another.",
    "Sampling: our inverse matrices are computed once, before the time is taken; the peer computes "
    "its own in every call.",
    "float32 is without TF32. bf16 is timed only on hardware that multiplies bf16.",
    "Memory is what the graph keeps for the backward pass, without the parameters.",
    '"ours compiled", on a GPU, is the flow of preset=gpu, which also replays its passes as CUDA '
    "graphs. The convolutions alone are launched one by one.",
]


def form(rows: Any) -> list[str]:
    """The places of a file that are missing or wrong (`results.checks`).

    Only a compiled flow may lack its memory.
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
    """The rows of one file. ValueError, one line: `python -m benchmarks` has not written it."""
    damaged = "is not what `python -m benchmarks` writes ({problem}): write it again"
    unusable = damaged.replace("{problem}", "no usable {problem}")
    return checked_json(path, form, damaged, unusable)


def read_all(root: Path = ROOT) -> dict[str, list[dict]]:
    """The rows of every recorded file by its stem."""
    return {path.stem: read(path) for path in sorted((Path(root) / "benchmarks").glob("*.json"))}


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section: a part for each kind of machine; [] without files in results/benchmarks/.

    A part has one table, of the newest measurement of each setting. All columns of all
    measurements are behind it.
    """
    files = read_all(root)
    if not files:
        return []
    by_machine: dict[str, dict[str, list[dict]]] = {}
    for stem, rows in files.items():
        by_machine.setdefault(machine_class(rows[0]["machine"]), {})[stem] = rows
    blocks: list[Block] = [
        Heading(TITLE),
        Paragraph(TEXT),
        Fold("How to read it", [Bullets(NOTES)]),
    ]
    for machine, measured in by_machine.items():
        blocks += machine_part(machine, measured)
    return blocks


def machine_part(machine: str, files: Mapping[str, list[dict]]) -> list[Block]:
    """The newest measurements on one kind of machine, and all of them in a fold."""
    latest = newest(files)
    shown = [stem for stem in files if stem in latest.values()]
    rows = [
        short_cells(row, stem, files[stem])
        for stem in shown
        for row in files[stem]
        if row[STEP] is not None and latest[(kind_of(stem), row["setting"])] == stem
    ]
    older = len(files) - len(shown)
    words = f"All columns of these {len(shown)} measurements"
    if older:
        words += f", and {older} older"
    whole: list[Block] = []
    for stem in [*shown, *(stem for stem in files if stem not in shown)]:
        whole += [Paragraph(f"{origin(stem, files[stem])}:"), whole_table(files[stem])]
    table = Table(SHORT, rows, "Nothing was timed.")
    return [Heading(machine, 3), table, Fold(words, whole)]


def machine_class(machine: str) -> str:
    """A machine without the number of its threads.

    >>> machine_class("AMD EPYC, 2 threads")
    'AMD EPYC'
    """
    return machine.partition(",")[0]


def newest(files: Mapping[str, list[dict]]) -> dict[tuple[str, str], str]:
    """For each kind and setting that was measured, the newest file.

    A file without a date is older than those with one.
    """
    by_date = sorted(files, key=lambda stem: (files[stem][0].get("date", ""), stem))
    return {(kind_of(stem), row["setting"]): stem for stem in by_date for row in files[stem]}


def kind_of(stem: str) -> str:
    """What was measured: a file is named KIND.json or KIND-MACHINE.json."""
    return stem.partition("-")[0]


def short_cells(row: dict, stem: str, rows: Sequence[dict]) -> list[str]:
    """The cells of SHORT for one row."""
    cell = dict(zip(COLUMNS, cells(row, rows), strict=False))
    threads = machine_text(row["machine"]).partition(", ")[2]
    measured = ", ".join(filter(None, [f"{kind_of(stem)} {row['setting']}", threads]))
    return [measured, row["model"], *(cell[name] for name in SHORT_OF_COLUMNS)]


def whole_table(rows: Sequence[dict]) -> Table:
    """All columns of the rows of one file."""
    return Table(COLUMNS, [cells(row, rows) for row in rows])


def origin(stem: str, rows: list[dict]) -> str:
    """How, where and with what the rows of a file were measured, which is the same for all rows."""
    row = rows[0]
    parts = [
        f"`python -m benchmarks {words(stem, rows)}`",
        machine_text(row["machine"]),
        *(f"{name} {version}" for name, version in row["versions"].items()),
        f"commit {commit(row)}",
        f"{row['rounds']} rounds",
    ]
    if row.get("apart"):
        parts.append("each model in a process of its own")
    return ", ".join(parts)


def words(stem: str, rows: list[dict]) -> str:
    """The arguments of `python -m benchmarks` that measure the rows of a file.

    stem: see `kind_of`.
    """
    parts = [kind_of(stem)]
    settings = {row["setting"] for row in rows}
    if len(settings) == 1 and stem.startswith("glow-"):
        parts.append(f'"settings={settings.pop()}"')
    rounds = rows[0]["rounds"]
    if rounds != 7:
        parts.append(f"rounds={rounds}")
    return " ".join(parts)


def cells(row: dict, rows: Sequence[dict]) -> list[str]:
    """The cells of COLUMNS for one row.

    Ratios are over the peer at the same setting; for the step also over the peer in the same dtype.
    """
    at_setting = {other["model"]: other for other in rows if other["setting"] == row["setting"]}
    peer = at_setting.get(PEER, {})
    same_dtype = at_setting.get({"float32": PEER}.get(row["dtype"], TUNED), {})
    return [
        row["setting"],
        row["dtype"],
        row["model"],
        formatted("{:.3f} s", row[STEP], "not measured"),
        images_per_second(row),
        ratio(row[STEP], row["floor_s"]),
        ratio(row[STEP], peer.get(STEP)),
        ratio(row[STEP], same_dtype.get(STEP)),
        formatted("{:.1f} ms", row[SAMPLING], "not measured", scale=1e3),
        ratio(row[SAMPLING], peer.get(SAMPLING)),
        formatted("{:.2f} MiB", row[KEPT], "-", scale=2**-20),
        ratio(row[KEPT], peer.get(KEPT), ".3f"),
    ]


def formatted(template: str, value: float | None, missing: str, scale: float = 1) -> str:
    """A number times its scale in a template, or the text for a missing one."""
    if is_number(value):
        return template.format(value * scale)
    return missing


def images_per_second(row: dict) -> str:
    """Training images per second. The number after the last B of a setting is that of a step."""
    if not is_number(row[STEP]):
        return "-"
    rate = int(row["setting"].rpartition("B")[2]) / row[STEP]
    if rate >= 100:
        return f"{rate:,.0f}"
    return f"{rate:.1f}"


def ratio(ours: float | None, other: float | None, form: str = ".2f") -> str:
    """Our number over another one; `-` if one of them is missing."""
    if is_number(ours) and is_number(other):
        return format(ours / other, form)
    return "-"
