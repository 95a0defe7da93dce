"""The section of the recorded runs: numbers, command, curve, picture, settings and protocol."""

import shlex
from collections.abc import Mapping
from typing import Any

from results import own_decimals, printed
from results.blocks import Block, Bullets, Code, Drawing, Fold, Heading, Paragraph, Picture, Table
from results.curves import run_curve
from results.formats import (
    by_text,
    commit,
    count,
    fingerprint,
    fixed,
    machine_text,
    main_metrics,
    metrics,
    run_name,
    wall_time,
)
from results.groups import enlarges, load_call
from results.protocol import allowed_differences
from results.reading import Records, claims_of, counted_comparisons, ordered_runs

TITLE = "Runs"
TEXT = (
    "Only the curve `val` compares with a paper's number. The curve `train` is of training images "
    "with their flips and shifts: shifted images are smoother, so that they have fewer bits/dim."
)
FIGURES = ["metric", "ours", "paper", "gap", "status"]


def section(records: Records) -> list[Block]:
    """A part for each run, in the order of the tables; [] without runs."""
    runs = ordered_runs(records.runs, records.claims)
    if not runs:
        return []
    parts = [part for run in runs for part in run_part(run, records)]
    return [Heading(TITLE), Paragraph(TEXT), *parts]


def run_part(run: dict, records: Records) -> list[Block]:
    """One run: its figures, the command that repeats it, pictures, and the details in a fold."""
    claims = claims_of(run, records.claims)
    rows = figure_rows(run, records.claims)
    columns = FIGURES
    if not claims:
        columns = FIGURES[:2]
        rows = [row[:2] for row in rows]
    figures = Table(columns, rows, "Nothing was measured.")
    blocks: list[Block] = [Heading(run_name(run), 3), figures]
    blocks += [Paragraph(line) for line in not_measured(run)]
    blocks += [Code(command(run)), *pictures(run, claims, records)]
    details: list[Block] = [Paragraph(line) for line in detail_lines(run, claims)]
    details += protocol_of_metrics(run)
    blocks.append(Fold("Settings and protocol", details))
    if run.get("weights"):
        blocks += weights_blocks(run)
    return blocks


def figure_rows(run: dict, claims: dict) -> list[list[str]]:
    """A row for each main metric and each claim of a run, the claims first."""
    rows = []
    compared = counted_comparisons(run)
    for comparison in compared:
        claim = claims[comparison["claim"]]
        decimals = own_decimals(claim)
        ours = fixed(run["metrics"].get(comparison["metric"]), f".{decimals}f")
        gap = fixed(comparison["gap"], f"+.{decimals}f")
        paper = printed(claim["value"], claim)
        rows.append([comparison["metric"], ours, paper, gap, comparison["status"]])
    names = {comparison["metric"] for comparison in compared}
    others = [key for key in main_metrics(run) if key not in names]
    return rows + [[key, fixed(run["metrics"][key]), "-", "-", "-"] for key in others]


def not_measured(run: dict) -> list[str]:
    """A line for each reason why a run could not measure metrics, with their names."""
    not_measured = run.get("not_measured") or {}
    reasons = {key: text.removeprefix("since ") for key, text in sorted(not_measured.items())}
    return [f"Not measured: {names}, since {reason}" for reason, names in by_text(reasons).items()]


def command(run: dict) -> str:
    """The shell line that repeats a run: its overrides, else its preset and seed."""
    words = [f"seed={run['seed']}"]
    if run["preset"]:
        words = [f"preset={run['preset']}", *words]
    return shlex.join(
        ["python", f"reproduce/{run['experiment']}.py", *(run.get("overrides") or words)]
    )


def pictures(run: dict, claims: list[dict], records: Records) -> list[Block]:
    """The curve and the picture of a run."""
    name = run_name(run)
    curve = run_curve(run, claims, title="")
    blocks: list[Block] = [Paragraph("No curve was recorded.")]
    if curve is not None:
        blocks = [Drawing(curve, f"Curve of {name}", f"runs/{name}.svg")]
    if records.has(f"runs/{name}.png"):
        blocks.append(Picture(f"runs/{name}.png", f"Picture of {name}"))
    return blocks


def detail_lines(run: dict, claims: list[dict]) -> list[str]:
    """Sentences on the run, on the tested weights, and on where it started and ended."""
    lines = [f"Run: {'; '.join(settings(run))}."]
    if run.get("tested"):
        lines.append(f"Tested: {'; '.join(tested_weights(run))}.")
    lines += protocol_lines(claims)
    allowed = list(dict.fromkeys(d for claim in claims for d in allowed_differences(claim, run)))
    if allowed:
        lines.append(f"Differs from it, without keeping the two apart: {'; '.join(allowed)}.")
    if run.get("init_from"):
        lines.append(f"Started from: {origin(run['init_from'])}.")
    lines += [f"Extended: {earlier_end(end)}." for end in run.get("extended") or []]
    labels = {"Suspect": "suspect", "W&B": "wandb_url"}
    return lines + [f"{label}: {run[key]}" for label, key in labels.items() if run.get(key)]


def settings(run: dict) -> list[str]:
    """The settings of a run: its size, its images, and the machine."""
    keys = ("seed", "n_train", "images", "precision", "tf32", "deterministic")
    parts = [*(f"{key} {run[key]}" for key in keys), f"device {machine_text(run['device'])}"]
    if run.get("parameters"):
        parts = [f"{run['parameters']:,} parameters", *parts]
    if fingerprint(run):
        parts.append(f"data.sha256 {fingerprint(run)}")
    return [*parts, f"commit {commit(run)}", wall_time(run["seconds"])]


def tested_weights(run: dict) -> list[str]:
    """Which weights were tested, and what cut the training or the validation short."""
    weights = run["tested"]
    choice = {"best": "best by validation"}.get(weights["chosen"], "the last")
    trainer = run["config"].get("trainer") or {}
    limits = [
        f"{key} {trainer[key]}"
        for key in ("limit_val_batches", "limit_test_batches", "max_time")
        if trainer.get(key) is not None
    ]
    return [f"{weights['weights']} weights of step {weights['step']} ({choice})", *limits]


def protocol_lines(claims: list[dict]) -> list[str]:
    """The protocols of a run's claims; if they differ, each with the metrics it is for."""
    by_protocol: dict[str, list[str]] = {}
    for claim in claims:
        by_protocol.setdefault(facts(claim["protocol"]), []).append(claim["metric"])
    if len(by_protocol) == 1:
        return [f"The paper's protocol: {next(iter(by_protocol))}."]
    return [
        f"The paper's protocol for {', '.join(names)}: {protocol}."
        for protocol, names in by_protocol.items()
    ]


def protocol_of_metrics(run: dict) -> list[Block]:
    """What the run's own metrics depend on, as it was recorded."""
    protocols = run.get("protocol") or {}
    items = [f"{key}: {facts(protocol)}" for key, protocol in sorted(protocols.items())]
    if items:
        return [Paragraph("How this run measured:"), Bullets(items)]
    return []


def facts(protocol: Mapping[str, Any]) -> str:
    """A protocol as text: `n_bits 8; noise_samples 1`."""
    return "; ".join(f"{key} {value}" for key, value in protocol.items())


def origin(start: dict) -> str:
    """The trained weights from which a run started."""
    parts = [start["experiment"], f"commit {commit(start)}", f"sha256 {start['sha256'][:12]}"]
    return f"the weights of {start['model']} ({'; '.join(parts)})"


def earlier_end(end: dict) -> str:
    """Where a run had ended before it was trained on, and what it measured there."""
    parts = [
        metrics(end) or "nothing measured",
        f"{count(end['images'])} images",
        wall_time(end["seconds"]),
        f"commit {commit(end)}",
        end["date"].partition("T")[0],
    ]
    return f"this run had ended at step {end['steps']} ({'; '.join(parts)}) and was trained on"


def code_for_weights(run: dict) -> Code:
    """How a run's weights are used."""
    if enlarges(run):
        return Code(load_call(run))
    return Code(f"from reproduce import load\n\nmodel = {load_call(run)}", "python")


def weights_blocks(run: dict) -> list[Block]:
    """How a run's weights are loaded, and the file in which they are."""
    weights = run["weights"]
    size = f"{weights['bytes'] / 1e6:.1f} MB"
    file = f"[{weights['file']}]({weights['file']})"
    return [
        Paragraph(f"Weights: {file}, {size}, {weights['dtype']}."),
        code_for_weights(run),
    ]
