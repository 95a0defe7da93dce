"""The section of the records: how soon validation on CIFAR-10 reached given bits/dim."""

from collections.abc import Mapping
from typing import Any

from results import is_number
from results.blocks import Block, Code, Heading, Paragraph, Table, anchor
from results.formats import commit, count, machine_text, run_name, wall_time
from results.groups import chosen
from results.reading import Records

TITLE = "Time to target"
DATA = "cifar10"
METRIC = "val/bpd"
TARGETS = (4.00, 3.70, 3.49, 3.39, 3.35)  # bits/dim; the last are Real NVP's, and near Glow's
COLUMNS = ["run", "hardware", "precision", "commit", *(f"{target:.2f}" for target in TARGETS)]
TEXT = (
    "CIFAR-10, 8 bits: the training images seen, and the time since the run began, at the first "
    "validation at or below a number of bits/dim. The validation images are split off the training "
    "images. A run is validated from time to time only, so it may have been there a little earlier."
    " Runs that started from trained weights are left out."
)
HOW = (
    "To enter a run of yours, check it, record it, and open a pull request with the files that the "
    "second command writes. The reviewer checks the entry with the first command, too. Runs with "
    "other models, other hardware and other code are welcome as long as that check passes."
)
COMMANDS = """python -m reproduce.verify outputs/<experiment>/<run>
python -m results add outputs/<experiment>/<run>"""


def section(records: Records) -> list[Block]:
    """A row for each run that reached a target, the lowest target first; [] without one."""
    entries = [(reached(run), run) for run in records.runs if is_entry(run)]
    entries = [(times, run) for times, run in entries if times]
    if not entries:
        return []
    entries.sort(key=lambda entry: (*record(entry[0]), run_name(entry[1])))
    rows = [cells(times, run) for times, run in entries]
    how: list[Block] = [Paragraph(HOW), Code(COMMANDS)]
    return [Heading(TITLE), Paragraph(TEXT), Table(COLUMNS, rows), *how]


def is_entry(run: Mapping[str, Any]) -> bool:
    """Whether a run was trained on the 8-bit images of CIFAR-10, from random weights."""
    data = run["config"].get("data") or {}
    is_of_data = data.get("name") == DATA and data.get("n_bits", 8) == 8
    return is_of_data and run.get("init_from") is None


def reached(run: Mapping[str, Any]) -> dict[float, Mapping[str, Any]]:
    """For each target that a run reached, the first row of its curve with such a validation."""
    rows = [row for row in run.get("curve") or [] if is_number(row.get(METRIC))]
    rows = [row for row in rows if is_number(row.get("images")) and is_number(row.get("seconds"))]
    firsts = {}
    for target in TARGETS:
        first = next((row for row in rows if row[METRIC] <= target), None)
        if first is not None:
            firsts[target] = first
    return firsts


def record(times: Mapping[float, Mapping[str, Any]]) -> tuple[float, float]:
    """What sorts entries: the lowest target that was reached, then the seconds it took."""
    lowest = min(times)
    return lowest, times[lowest]["seconds"]


def cells(times: Mapping[float, Mapping[str, Any]], run: dict) -> list[str]:
    """The cells of COLUMNS for a run."""
    link = f"[{run_name(run)}](#{anchor(run_name(run))})"
    settings = chosen([run])
    name = f"{link} {settings}".strip()
    trainer = run["config"].get("trainer") or {}
    if trainer.get("limit_val_batches") is not None:
        name += " (validated on a part of the split)"
    reaches = [reach(times.get(target)) for target in TARGETS]
    return [name, machine_text(run["device"]), run["precision"], commit(run), *reaches]


def reach(row: Mapping[str, Any] | None) -> str:
    """`405 k images, 1.4 h`; `-` where a target was not reached."""
    if row is None:
        return "-"
    return f"{count(row['images'])} images, {wall_time(row['seconds'])}"
