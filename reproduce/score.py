"""Score image files with a trained model: bits per dimension, and how simple an image is.

python -m reproduce.score outputs/glow_photos/20261122-231500-ab12 photographs out=scores.csv
python -m reproduce.score glow_cifar10/cpu-seed0 photographs noise_samples=8

The model is the folder of a run, an exported folder, a checkpoint, or the name of a recorded run.
All PNG, JPEG, WebP, BMP and TIFF files below the folder are scored. An image is resized and cropped
to the size of the model, as data.name=folder does it. Columns of the table:
  file               path below the folder
  bits_per_dim       -log2 p(image) / D, the mean over the noise samples; the smaller, the more
                     likely the image is under the model. D is the number of pixels times channels
  standard_error     of that mean over the noise samples; empty for one noise sample
  png_bits_per_dim   the bits of a PNG file of the same resized image / D, a measure of how complex
                     the image is
  corrected          bits_per_dim - png_bits_per_dim: how unusual an image is beyond its complexity
                     (Serrà et al. 2020, arXiv 1909.11480). Without it simple images, such as a blue
                     sky, look likely under most models. Compare it between images of one size only
A file that cannot be read is named, and its row has nothing but the file.

The noise of an image depends on the seed and on its pixels, so other files do not change a score.
The table is written at the end, in one step. Until then the scores are kept in <out>.partial, so
the same command goes on where it was stopped.

keys:
  out=scores.csv   the table
  noise_samples=1  samples of the dequantisation noise for each image
  label=CLASS      the class of all images, by name or number, for a class-conditional flow;
                   without it each image is of the class that its folder is named after
  seed=0           of the noise
  batch_size=64    how many images are computed at once
  device=cpu       or cuda; the default is cuda where there is one
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import DictConfig
from PIL import Image

from datamodules.checks import expand_home
from datamodules.folder import printable
from datamodules.image_files import UnreadableImage, find_images, read_image
from reproduce.command import command
from reproduce.config import ConfigError, arguments
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
    "out": "scores.csv",
    "noise_samples": 1,
    "label": "",
    "seed": 0,
    "batch_size": 64,
    "device": "",
}
COLUMNS = ("file", "bits_per_dim", "standard_error", "png_bits_per_dim", "corrected")
COMPRESSORS: dict[str, dict[str, Any]] = {  # what Pillow is told; both are lossless
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True},
}
PARTIAL = ".partial"  # the ending of the file with the scores of an unfinished table
MANY = 10  # unreadable files are named one by one up to here, and then only counted


class Datum(NamedTuple):
    """An image to be scored. row: of the table. pixels: (C, H, W) uint8. label: None without."""

    row: int
    pixels: np.ndarray
    label: int | None

    @property
    def key(self) -> str:
        """The same for the same pixels and class."""
        return f"{hashlib.sha256(self.pixels.tobytes()).hexdigest()} {self.label}"


class Scores:
    """The bits per dimension of images, one number for each noise sample, by `Datum.key`.

    They are kept in a file, which a later command with the same settings reads. It is JSON, one
    line for the settings and one for each image. A line that was not written to its end is ignored.

    OSError: the file cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path = path
        self.values: dict[str, list[float]] = {}
        lines: list[str] = []
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        entries = [entry for entry in map(_entry, lines) if entry is not None]
        if entries[:1] == [settings]:
            for entry in entries[1:]:
                self.values |= cast("dict[str, list[float]]", entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [settings, *({key: value} for key, value in self.values.items())]
        write(path, "".join(f"{json.dumps(entry)}\n" for entry in entries))

    def add(self, values: dict[str, list[float]]) -> None:
        """Add scores, and write them into the file at once."""
        self.values |= values
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps({key: value})}\n" for key, value in values.items())


def _entry(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def noise_keys(pixels: Sequence[np.ndarray], k: int) -> torch.Tensor:
    """The keys of the noise sample k of images, (N,) int64: functions of the pixels and k."""
    keys = []
    for image in pixels:
        digest = hashlib.sha256(f"{k} {image.shape}".encode() + image.tobytes()).digest()
        keys.append(int.from_bytes(digest[:8], "big") >> 1)
    return torch.tensor(keys, dtype=torch.int64)


def png_bits_per_dim(pixels: np.ndarray, n_bits: int) -> float:
    """The bits per dimension of a PNG file of an image, as `compressed_bits_per_dim`."""
    return compressed_bits_per_dim(pixels, n_bits, "png")


def compressed_bits_per_dim(pixels: np.ndarray, n_bits: int, compressor: str) -> float:
    """The bits of a losslessly compressed image, (C, H, W) uint8, for each of its C H W numbers.

    n_bits: the most significant bits of a pixel, which the model knows; the others become 0.
    compressor: one of COMPRESSORS.
    """
    kept = pixels >> (8 - n_bits) << (8 - n_bits)
    image = Image.fromarray(kept[0] if len(kept) == 1 else kept.transpose(1, 2, 0))
    stream = io.BytesIO()
    image.save(stream, **COMPRESSORS[compressor])
    return 8 * stream.tell() / pixels.size


def score(model: TrainedModel, data: Sequence[Datum], options: DictConfig) -> list[list[float]]:
    """The bits per dimension of images, for each image one number for each noise sample."""
    images = np.stack([datum.pixels for datum in data])
    labels = None
    if data[0].label is not None:
        labels = [cast("int", datum.label) for datum in data]
    samples = []
    for k in range(options.noise_samples):
        keys = noise_keys([datum.pixels for datum in data], k)
        samples.append(
            model.bits_per_dim(
                images, labels, seed=options.seed, batch_size=options.batch_size, keys=keys
            )
        )
    return torch.stack(samples, 1).tolist()


def labels_of(
    model: TrainedModel, name: str, folder: Path, paths: Sequence[Path], text: str
) -> list[int] | None:
    """The classes of files: of label=, or of the folders that they lie in; None without classes.

    name: of the model, for messages. text: the value of label=.
    ConfigError or ValueError, one line: a class is missing or unknown.
    """
    if text:
        return [model.label_of(text)] * len(paths)
    if not model.class_names:
        return None
    labels = []
    for path in paths:
        parents = reversed(path.relative_to(folder).parent.parts)
        names = [printable(part) for part in parents]
        own = [name for name in names if name in model.class_names]
        if not own:
            raise ConfigError(
                f"{name} is of a class-conditional flow, and {path} lies in no folder of a class: "
                f"name folders {', '.join(model.class_names)}, or give label="
            )
        labels.append(model.class_names.index(own[0]))
    return labels


def read(
    paths: Sequence[Path], labels: Sequence[int] | None, model: TrainedModel, bar: Tqdm
) -> Iterator[Datum]:
    """The images of files, without those that cannot be read, which are named above the bar."""
    channels, *size = model.shape
    n_unreadable = 0
    for row, path in enumerate(paths):
        try:
            pixels = read_image(path, cast("int", channels), cast("tuple[int, int]", tuple(size)))
        except UnreadableImage as error:
            n_unreadable += 1
            if n_unreadable <= MANY:
                bar.write(f"unreadable: {error}", file=sys.stderr)
            bar.update()
            continue
        yield Datum(row, pixels, None if labels is None else labels[row])
    if n_unreadable > MANY:
        bar.write(f"{n_unreadable - MANY} more files are unreadable", file=sys.stderr)


def batches(data: Iterable[Datum], size: int) -> Iterator[list[Datum]]:
    """Images in batches of a size; the last one may be smaller."""
    batch: list[Datum] = []
    for datum in data:
        batch.append(datum)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def row_of(file: str, values: Sequence[float], png: float) -> list[str]:
    """A row of the table.

    values: bits per dimension, one for each noise sample. png: bits per dimension of the PNG file.

    >>> row_of("a.png", [3.0, 4.0], png=2.5)
    ['a.png', '3.50000', '0.50000', '2.50000', '1.00000']
    """
    n = len(values)
    mean = math.fsum(values) / n
    error = ""
    if n > 1:
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
        error = f"{math.sqrt(variance / n):.5f}"
    return [file, f"{mean:.5f}", error, f"{png:.5f}", f"{mean - png:.5f}"]


def as_csv(rows: Iterable[Sequence[str]]) -> bytes:
    """A table with COLUMNS as its first row. Names of files that are no UTF-8 keep their bytes."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8", "surrogateescape")


def check_out(path: Path) -> None:
    """ConfigError, one line: the table's file cannot be replaced, or is something else."""
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder: give a file, as out=scores.csv")
    if not path.exists():
        return
    with path.open("rb") as file:
        first = file.readline(1000).decode("utf-8", "replace").strip()
    if first != ",".join(COLUMNS):
        raise ConfigError(f"{path} is no table of scores: give another out=")


def table(
    model: TrainedModel,
    folder: Path,
    paths: Sequence[Path],
    labels: Sequence[int] | None,
    options: DictConfig,
    scores: Scores,
) -> list[list[str]]:
    """A row for each file; that of a file that cannot be read has nothing but the file.

    scores: those that are known already; the others are added to it.
    """
    n_bits = cast("int", model.n_bits)
    rows = [[path.relative_to(folder).as_posix(), *[""] * 4] for path in paths]
    with progress_bar(len(paths), "images") as bar:
        for batch in batches(read(paths, labels, model, bar), options.batch_size):
            unknown = {datum.key: datum for datum in batch if datum.key not in scores.values}
            if unknown:
                values = score(model, list(unknown.values()), options)
                scores.add(dict(zip(unknown, values, strict=True)))
            for datum in batch:
                png = png_bits_per_dim(datum.pixels, n_bits)
                rows[datum.row] = row_of(rows[datum.row][0], scores.values[datum.key], png)
            bar.update(len(batch))
    return rows


def summary(rows: Sequence[Sequence[str]]) -> str:
    """How many images were scored, and the mean of their bits per dimension. ValueError: none."""
    values = [float(row[1]) for row in rows if row[1]]
    n_unreadable = len(rows) - len(values)
    if not values:
        raise ValueError(f"none of {n_unreadable} files can be read: give a folder of images")
    images = "1 image" if len(values) == 1 else f"{len(values)} images"
    text = f"{images}, mean {math.fsum(values) / len(values):.4f} bits/dim"
    n_not_finite = sum(not math.isfinite(value) for value in values)
    if n_not_finite:
        text += f"; the bits/dim of {n_not_finite} images are not finite"
    if n_unreadable == 1:
        text += "; 1 unreadable file has an empty row"
    elif n_unreadable:
        text += f"; {n_unreadable} unreadable files have an empty row"
    return text


def check_model(model: TrainedModel, name: str) -> None:
    """ConfigError, one line: the model is none of images of one size, with 1 or 3 channels."""
    if len(model.shape) != 3 or model.n_bits is None:
        raise ConfigError(f"{name} is not of a flow of images: only images are scored")
    if None in model.shape:
        raise ConfigError(f"{name} is of a flow of images of any size: use model.bits_per_dim")
    if model.shape[0] not in (1, 3):
        raise ConfigError(f"{name} is of images with {model.shape[0]} channels: use load(MODEL)")


@command
def main(argv: list[str] | None = None) -> None:
    """Score the images; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    [name, place], options = read_words(words, [MODEL, "FOLDER"], DEFAULTS)
    at_least(options, noise_samples=1, seed=0, batch_size=1)
    device = device_of(options.device)
    folder = expand_home("the folder of images", place)
    out = expand_home("out", options.out)
    check_out(out)
    paths = find_images(folder)
    model = load_model(name)
    check_model(model, name)
    labels = labels_of(model, name, folder, paths, options.label)
    settings = {
        "weights": fingerprint(model.stored.weights),
        "noise_samples": options.noise_samples,
        "seed": options.seed,
    }
    partial = out.with_name(f"{out.name}{PARTIAL}")
    with opening(partial):
        scores = Scores(partial, settings)
    model.to(device)
    with repeatable("the same command keeps what is scored, and goes on"):
        rows = table(model, folder, paths, labels, options, scores)
    if scores.values:
        write(out, as_csv(rows))
    partial.unlink(missing_ok=True)
    say(f"{out}: {summary(rows)}")


if __name__ == "__main__":
    main()
