"""Measure trained SRFlows on sets of whole images, over the temperature of their samples.

python -m reproduce.temperatures srflow_bsds_x4/cpu-seed0 root=data/sr sets=[Set5,Set14,BSD100]
python -m reproduce.temperatures outputs/srflow_bsds_x4/RUN network=outputs/rrdb_bsds_x4/RUN

The temperature is the standard deviation of the latents. For each set the table has a line for
bicubic interpolation, one for a network that makes a single image, and one for each temperature.
PSNR, SSIM, LR-PSNR and LPIPS are those of the first of the samples of an image; the diversity is
that of all of them. The plot shows the figures over the temperature. docs/evaluation.md says how
each is defined. The training images of the model are not needed.

keys:
  network=           a run of rrdb_..., to compare with
  root=data/sr       the folder with the folders of the sets
  sets=[]            as in python -m reproduce.bicubic: empty for those of the known sets that exist
  temperatures=[0,0.5,0.8,0.9,1]
  samples=5          for each image, for the diversity; at temperature 0 one is enough
  alexnet_weights=   the file of LPIPS's network; without it LPIPS is not measured
  device=            cpu or cuda; by default a GPU if there is one
  out=temperatures   the folder of temperatures.json and temperatures.png
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import DictConfig
from torch import Tensor

from datamodules.bicubic import downscale, upscale
from datamodules.checks import expand_home
from datamodules.evaluation_sets import EvaluationSet, Hash
from lightning_modules.callbacks.image_quality import (
    ImageQuality,
    Measure,
    SuperResolved,
    levels,
)
from lightning_modules.quality.super_resolution import diversity
from lightning_modules.regression import RegressionModule
from lightning_modules.super_resolution import MOST_SAMPLES, SuperResolutionModule
from reproduce.bicubic import names_of, sets_of
from reproduce.command import command
from reproduce.config import ConfigError, arguments
from reproduce.model import StoredModel
from reproduce.model_command import (
    MODEL,
    at_least,
    device_of,
    opening,
    progress_bar,
    read_words,
    repeatable,
)
from reproduce.provenance import git_state
from reproduce.stored import read_stored
from reproduce.streams import say
from results import is_number
from results.blocks import Table, markdown
from results.files import portable, write
from results.metrics import QUANTITIES
from results.super_resolution import decimal, heading

DEFAULTS: dict[str, object] = {
    "network": "",
    "root": "data/sr",
    "sets": [],
    "temperatures": [0.0, 0.5, 0.8, 0.9, 1.0],
    "samples": 5,
    "alexnet_weights": "",
    "device": "",
    "out": "temperatures",
}
PLOTTED = ("psnr", "lr_psnr", "diversity", "lpips")
PIXELS = 110  # of an inch in the plot


class Enlarger(NamedTuple):
    """One line of the table for each set.

    model: what makes the images. temperature: of its samples; None for a model without samples.
    enlarge: a batch of one image, (high_res, index, low_res), to what the model makes of it.
    """

    model: str
    temperature: float | None
    enlarge: Callable[[list[Tensor]], SuperResolved]


def enlargers(
    flow: SuperResolutionModule,
    network: RegressionModule | None,
    temperatures: Sequence[float],
    n: int,
) -> list[Enlarger]:
    """All lines of a set: bicubic interpolation, the network, the flow at each temperature."""
    lines = [Enlarger("bicubic", None, functools.partial(interpolated, scale=flow.scale))]
    if network is not None:
        lines.append(Enlarger(network.model_name, None, network.super_resolved))
    for temperature in temperatures:
        samples = n if temperature > 0 else 1
        enlarge = functools.partial(sampled, flow, temperature, samples)
        lines.append(Enlarger(flow.model_name, temperature, enlarge))
    return lines


def interpolated(batch: list[Tensor], scale: int) -> SuperResolved:
    """What bicubic interpolation makes of a batch."""
    return SuperResolved(batch[2], batch[0], upscale(batch[2], scale)[None])


def sampled(
    flow: SuperResolutionModule, temperature: float, n: int, batch: list[Tensor]
) -> SuperResolved:
    """n samples of a flow for each image of a batch."""
    flow.temperature = temperature
    return flow.super_resolved(batch, n)


def measured(images: SuperResolved, measures: Mapping[str, Measure]) -> dict[str, float]:
    """The figures of one image; NaN if a sample has values that are not finite."""
    names = [*measures, *(["diversity"] if len(images.samples) > 1 else [])]
    if not images.samples.isfinite().all():
        return dict.fromkeys(names, math.nan)
    samples = levels(images.samples)
    high_res = levels(images.high_res)
    low_res = levels(images.low_res)
    figures = {
        name: measure(samples[0], high_res, low_res).item() for name, measure in measures.items()
    }
    if len(samples) > 1:
        figures["diversity"] = diversity(samples).item()
    return figures


def measure_set(
    images: EvaluationSet,
    lines: Sequence[Enlarger],
    measures: Mapping[str, Measure],
    device: str,
    bar: Tqdm,
) -> dict[str, Any]:
    """The part of a set in the file: its images, and the mean figures of every line."""
    values: list[list[dict[str, float]]] = [[] for _ in lines]
    digest = Hash()
    for index, image in enumerate(images):
        digest.add(image)
        low_res = downscale(image[None], images.scale)
        batch = [image[None].to(device), torch.tensor([index]), low_res.to(device)]
        for line, of_line in zip(lines, values, strict=True):
            of_line.append(measured(line.enlarge(batch), measures))
            bar.update()
    rows = [
        {"model": line.model, "temperature": line.temperature, "metrics": means(of_line)}
        for line, of_line in zip(lines, values, strict=True)
    ]
    return {"images": len(images), "sha256": digest.digest(), "rows": rows}


def means(values: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """The means over images; None for a figure that is not finite for one of them.

    >>> means([{"psnr": 20.0, "ssim": 0.5}, {"psnr": 30.0, "ssim": math.nan}])
    {'psnr': 25.0, 'ssim': None}
    """
    totals = {name: sum(one[name] for one in values) for name in values[0]}
    return {
        name: total / len(values) if math.isfinite(total) else None
        for name, total in totals.items()
    }


# ---------------------------------------------------------------------- what is written


def table(sets: Mapping[str, Any], metrics: Sequence[str]) -> Table:
    """The figures of all sets."""
    rows = []
    for name, of_set in sets.items():
        for row in of_set["rows"]:
            temperature = row["temperature"]
            cells = [decimal(metric, row["metrics"].get(metric)) for metric in metrics]
            place = "-" if temperature is None else f"{temperature:g}"
            rows.append([name, f"{of_set['images']}", row["model"], place, *cells])
    heads = [heading(metric) for metric in metrics]
    return Table(["set", "images", "model", "temperature", *heads], rows)


def plot(sets: Mapping[str, Any], metrics: Sequence[str]) -> bytes:
    """The figures over the temperature as PNG: a panel for each metric, a colour for each set.

    Models without a temperature are horizontal lines: bicubic interpolation dotted, a network
    dashed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(metrics), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, metric in zip(panels, metrics, strict=True):
        for number, (name, of_set) in enumerate(sets.items()):
            colour = f"C{number}"
            points = []
            for row in of_set["rows"]:
                value = row["metrics"].get(metric)
                if not is_number(value):
                    continue
                if row["temperature"] is not None:
                    points.append((row["temperature"], value))
                else:
                    style = ":" if row["model"] == "bicubic" else "--"
                    panel.axhline(value, color=colour, linestyle=style, linewidth=1)
            points.sort()
            panel.plot(*zip(*points, strict=True), color=colour, marker=".", label=name)
        panel.set(xlabel="temperature", title=heading(metric))
        panel.grid(alpha=0.3)
    panels[0].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=PIXELS)
    return stream.getvalue()


# ---------------------------------------------------------------------- the command


def flow_of(model: StoredModel, name: str) -> SuperResolutionModule:
    """The module of a trained SRFlow. ConfigError, one line: it is none."""
    if isinstance(model.objective, SuperResolutionModule):
        return model.objective
    raise ConfigError(f"{name} is of {model.experiment}: give a run of srflow_...")


def network_of(name: str, scale: int) -> RegressionModule | None:
    """The module of a trained network; None without a name.

    ConfigError, one line: it is no network that enlarges images, or has another scale.
    """
    if not name:
        return None
    model = StoredModel(read_stored(name))
    module = model.objective
    if not isinstance(module, RegressionModule):
        raise ConfigError(f"network={name} is of {model.experiment}: give a run of rrdb_...")
    if module.scale != scale:
        raise ConfigError(
            f"network={name} enlarges {module.scale} times, and the flow {scale} times: give one "
            "of the same scale"
        )
    return module


def measures_of(options: DictConfig, scale: int) -> dict[str, Measure]:
    """The measures of an image by the metric's name, as a run has them."""
    networks = {}
    if options.alexnet_weights:
        networks["alex"] = options.alexnet_weights
    return ImageQuality(scale, functools.partial(downscale, scale=scale), networks).measures


def check_temperatures(temperatures: Sequence[object]) -> list[float]:
    """The temperatures, in rising order. ConfigError: one is below 0, no number, or twice there."""
    values = [float(value) for value in temperatures if is_number(value) and value >= 0]
    if len(values) < len(temperatures) or len(set(values)) < len(values) or not values:
        raise ConfigError(
            f"temperatures={list(temperatures)}: give different numbers of at least 0, as "
            "temperatures=[0,0.8]"
        )
    return sorted(values)


@command
def main(argv: list[str] | None = None) -> Mapping[str, object] | None:
    """Measure, print the table, and return the content of the file."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return None
    [name], options = read_words(words, [MODEL], DEFAULTS)
    at_least(options, samples=1)
    if options.samples > MOST_SAMPLES:
        raise ConfigError(f"samples={options.samples}: give at most {MOST_SAMPLES}")
    temperatures = check_temperatures(options.temperatures)
    device = device_of(options.device)
    out = expand_home("out", options.out)
    model = StoredModel(read_stored(name))
    flow = flow_of(model, name)
    network = network_of(options.network, flow.scale)
    measures = measures_of(options, flow.scale)
    sets = sets_of(expand_home("root", options.root), names_of(options.sets), flow.scale)
    for module in filter(None, (flow, network)):
        module.to(torch.device(device))
    lines = enlargers(flow, network, temperatures, options.samples)
    with opening(out):
        out.mkdir(parents=True, exist_ok=True)
    parts = {}
    with (
        repeatable("nothing was written; the same command starts again"),
        progress_bar(len(lines) * sum(map(len, sets)), "images") as bar,
    ):
        for images in sets:
            parts[images.name] = measure_set(images, lines, measures, device, bar)
    recorded_commit, dirty = git_state()
    content = portable(
        {
            "model": name,
            "experiment": model.experiment,
            "scale": flow.scale,
            "samples": options.samples,
            "arguments": words,
            "sets": parts,
            "trained_by": model.commit,
            "commit": recorded_commit,
            "dirty": dirty,
        }
    )
    metrics = [metric for metric in (*measures, "diversity") if metric in QUANTITIES]
    shown = [metric for metric in PLOTTED if metric in metrics]
    if max(temperatures) == 0 or options.samples == 1:
        shown.remove("diversity")
    with opening(out):
        write(out / "temperatures.json", f"{json.dumps(content, indent=1)}\n")
        write(out / "temperatures.png", plot(parts, shown))
    paths = [out / "temperatures.json", out / "temperatures.png"]
    say(*markdown([table(parts, metrics)])[:-1], *paths)
    return content


if __name__ == "__main__":
    main()
