"""Draw samples of a trained model as numbered PNG files.

python -m reproduce.sample outputs/glow_cifar10/20261122-231500-ab12 n=1000 out=samples
python -m reproduce.sample glow_cifar10/cpu-seed0 n=64 temperature=0.7 out=samples

The model is the folder of a run, an exported folder, a checkpoint, or the name of a recorded run.
The files are 000000.png, 000001.png and so on; grid.png shows the first ones together. Sample
number i depends on the model, the temperature, the class, the seed and i alone: the same command
draws the same images, and a larger n adds to them. Files that are there already are kept, so a
command that was stopped goes on where it was; damaged ones are drawn again. samples.json records
the settings, and a folder with samples of other settings is refused.

The command prints how many samples are finite. A flow can have a good likelihood although its
inverse overflows. Pixels that are not finite are magenta, and white in grey images.

keys:
  n=16             how many samples
  temperature=1.0  what the standard deviation of the latents is multiplied with: lower
                   temperatures give smoother and less varied images
  label=CLASS      the class of all samples, by name or number, for a class-conditional flow;
                   without it sample i is of class i modulo the number of classes
  seed=0           of the latents
  out=samples      the folder of the files
  batch_size=64    how many samples are computed at once
  device=cpu       or cuda; the default is cuda where there is one
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import os
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from datamodules.checks import expand_home
from lightning_modules.callbacks.png import write_png
from lightning_modules.callbacks.samples import as_array, as_levels, picture
from reproduce.command import command
from reproduce.config import ConfigError, arguments
from reproduce.kinds import argument_text
from reproduce.model import TrainedModel, load_model
from reproduce.model_command import (
    MODEL,
    at_least,
    device_of,
    fingerprint,
    opening,
    progress_bar,
    read_words,
    repeatable,
)
from reproduce.streams import say
from results.files import write

DEFAULTS: dict[str, object] = {
    "n": 16,
    "temperature": 1.0,
    "label": "",
    "seed": 0,
    "out": "samples",
    "batch_size": 64,
    "device": "",
}
RECORD = "samples.json"  # the settings of the samples in a folder
GRID = "grid.png"
COLUMNS = 8  # of the grid
MOST_SHOWN = 64  # samples in the grid
NOT_FINITE = "not finite"  # the comment in a PNG file of a sample with such pixels


def file_of(folder: Path, number: int) -> Path:
    """The file of a sample, by its number.

    >>> file_of(Path("samples"), 12).as_posix()
    'samples/000012.png'
    """
    return folder / f"{number:06d}.png"


def settings_of(model: TrainedModel, options: DictConfig, label: int | None) -> dict[str, Any]:
    """What decides the samples of a folder, for its RECORD."""
    settings: dict[str, Any] = {
        "experiment": model.experiment,
        "weights": fingerprint(model.stored.weights),
        "temperature": options.temperature,
        "seed": options.seed,
    }
    if label is not None:
        settings["label"] = model.class_names[label]
    return settings


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of samples and its RECORD, or check that it has samples of these settings.

    ConfigError, one line: it has other files or samples of other settings, or cannot be written.
    """
    path = folder / RECORD
    if not path.is_file():
        if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ConfigError(f"{folder} holds other files than samples: give another out=")
        with opening(folder):
            write(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        earlier = None
    if not isinstance(earlier, dict):
        raise ConfigError(f"{path} is damaged: give another out=")
    if earlier.get("weights") != settings["weights"]:
        raise ConfigError(f"{folder} holds samples of another model: give another out=")
    different = [
        f"{key}={argument_text(earlier.get(key))}"
        for key in sorted(earlier | settings)
        if earlier.get(key) != settings.get(key)
    ]
    if different:
        raise ConfigError(
            f"{folder} holds samples with {' '.join(different)}: say the same, or give another out="
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder} cannot be written: give another out=")


def write_samples(
    model: TrainedModel, options: DictConfig, label: int | None, folder: Path
) -> None:
    """Draw the samples whose files are missing or damaged.

    All samples of a batch are drawn even if only some are missing: the batch that a sample is
    computed in can move the last digits of its pixels.
    """
    with progress_bar(options.n, "samples") as bar:
        for start in range(0, options.n, options.batch_size):
            size = min(options.batch_size, options.n - start)
            missing = [i for i in range(size) if not is_whole(file_of(folder, start + i))]
            if missing:
                samples = model.draw(
                    size,
                    options.temperature,
                    label,
                    options.seed,
                    first=start,
                    batch_size=options.batch_size,
                )
                for i in missing:
                    write_sample(file_of(folder, start + i), samples[i], model.n_bits or 8)
            bar.update(size)


def is_whole(path: Path) -> bool:
    """Whether there is a file of a sample that can be read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # no file, or a damaged one
        return False
    return True


def write_sample(path: Path, sample: Tensor, n_bits: int) -> None:
    """Write one sample, (C, H, W), in one step; the file says if it has pixels that are not finite.

    n_bits: of the integers that the flow models.
    """
    levels = as_levels(sample[None], n_bits)[0]
    comment = PngInfo()
    if not sample.isfinite().all():
        comment.add_text("Comment", NOT_FINITE)
    pixels = as_array(levels) if len(levels) == 3 else levels[0].numpy()
    image = Image.fromarray(pixels)
    write_png(path, lambda stream: image.save(stream, "PNG", pnginfo=comment))


def n_finite(folder: Path, n: int) -> int:
    """How many of the first n samples of a folder are finite, as their files say."""
    count = 0
    for number in range(n):
        with Image.open(file_of(folder, number)) as image:
            count += image.info.get("Comment") != NOT_FINITE
    return count


def shares(finite: int, n: int) -> str:
    """How many of n samples are finite, in words, and what helps if not all of them are.

    >>> shares(16, 16)
    '100% of them finite'
    >>> shares(999, 1000)[:30]
    '99.9% of them finite (1 is not'
    """
    if finite == n:
        return "100% of them finite"
    share = min(finite / n, 0.999)
    verb = "is" if n - finite == 1 else "are"
    return (
        f"{share:.1%} of them finite ({n - finite} {verb} not, with magenta pixels: give a lower "
        "temperature)"
    )


def write_grid(folder: Path, n: int, temperature: float, classes: tuple[str, ...]) -> None:
    """Write the first samples of a folder as one picture, from their files.

    classes: the names of the classes that take turns, which get a row each; else one name for all
    samples, or none.
    """
    text = f"T={temperature:g}"
    shown = range(min(n, MOST_SHOWN))
    rows = [list(shown[i : i + COLUMNS]) for i in shown[::COLUMNS]]
    labels = [", ".join([*classes[:1], text]), *[""] * (len(rows) - 1)]
    if len(classes) > 1:
        columns = min(max(n // len(classes), 1), COLUMNS)
        count = min(n, len(classes))
        rows = [[i + k * len(classes) for k in range(columns)] for i in range(count)]
        labels = list(classes[:count])
    images = [torch.stack([pixels(file_of(folder, i)) for i in row]) / 256 for row in rows]
    image = Image.fromarray(as_array(picture(images, 8, labels)))
    write_png(folder / GRID, lambda stream: image.save(stream, "PNG", optimize=True))


def pixels(path: Path) -> Tensor:
    """The image of a file, (C, H, W) uint8, with one channel or three."""
    with Image.open(path) as image:
        array = np.array(image)
    if array.ndim == 2:
        return torch.from_numpy(array)[None]
    return torch.from_numpy(array).permute(2, 0, 1)


def classes_shown(model: TrainedModel, label: int | None) -> tuple[str, ...]:
    """The names of the classes that the samples are of, in turn; () without classes."""
    if label is None:
        return model.class_names
    return (model.class_names[label],)


@command
def main(argv: list[str] | None = None) -> None:
    """Draw the samples; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    [name], options = read_words(words, [MODEL], DEFAULTS)
    at_least(options, n=1, temperature=0, seed=0, batch_size=1)
    device = device_of(options.device)
    folder = expand_home("out", options.out)
    model = load_model(name)
    if len(model.shape) != 3:
        raise ConfigError(f"{name} is of a flow of points: only samples of images are written")
    label = model.label_of(options.label) if options.label else None
    open_folder(folder, settings_of(model, options, label))
    model.to(device)
    with repeatable("the same command keeps what is drawn, and goes on"):
        write_samples(model, options, label, folder)
        write_grid(folder, options.n, options.temperature, classes_shown(model, label))
    say(f"{folder}: {options.n} samples, {shares(n_finite(folder, options.n), options.n)}")
    say(folder / GRID)


if __name__ == "__main__":
    main()
