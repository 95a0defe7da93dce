"""Pictures of a trained image flow: samples, and images whose latents are changed.

They are those of Glow (Kingma & Dhariwal 2018, arXiv 1807.03039), section 6.

python -m reproduce.pictures outputs/realnvp_cifar10/20261122-231500-ab12      # all of them
python -m reproduce.pictures outputs/realnvp_cifar10/20261122-231500-ab12 attribute=cat n=5

The model is the folder of a run, an exported folder, a checkpoint, or the name of a recorded run.
The pictures go into its folder, or into pictures/ where it has none. Every row has a label on its
left. The latents of an image are called eps; under the model they are standard normal on every
level.
  temperature.png    a row for each temperature, 0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9 and 1 (as in the
                     authors' grids), with the same base samples in every row; columns: samples, or
                     the classes of a class-conditional flow. Without classes all samples at
                     temperature 0 are the same, and their row is left out
  interpolation.png  rows: two test images at the ends, and between them the images whose eps are
                     interpolated linearly on all levels (figure 5). Labels give the numbers of the
                     two images in the test split
  levels.png         first row: test images. Next rows: the same images from the eps of the coarsest
                     level, of the two coarsest, and so on up to all levels; the other eps are 0.
                     Last rows: the same with the other eps drawn at temperature 0.7
  attributes.png     for data with labels; a row for each class. Its direction is mean(eps | class)
                     - mean(eps | not class) of training images. In the middle is a test image of
                     the next class that has one; from left to right -1.6 to 1.6 times the direction
                     is added to its eps (figure 6)
  attributes-X.png   written instead with attribute=X: test images of other classes, all moved along
                     the direction of class X

keys: n=8 pictures in a row, seed=0 of samples and of the choice of images, n_images=1000 training
images for the means, attribute=CLASS, device=cpu or cuda (default: cuda where there is one),
out=FOLDER of the pictures, data.root=FOLDER of the images where it is not the run's,
data.download=true to fetch them
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import default_collate

from datamodules import DATA, make_data
from datamodules.checks import expand_home
from datamodules.stateless import StatelessDataModule
from flows.base import FlowModel
from lightning_modules.callbacks.png import write_png
from lightning_modules.callbacks.samples import as_array, finite_share, picture, shown
from lightning_modules.density import draw_samples
from lightning_modules.noise import evaluation_input
from lightning_modules.precision import evaluation
from reproduce.command import command
from reproduce.config import ConfigError, arguments, nearest
from reproduce.model import load_model
from reproduce.model_command import MODEL, at_least, device_of, read_words
from reproduce.streams import say

Latents = tuple[Tensor, ...]
Rows = slice | list[int]
DEFAULTS: dict[str, object] = {
    "n": 8,
    "seed": 0,
    "n_images": 1000,
    "attribute": "",
    "device": "",
    "out": "",
    "data": {"root": "", "download": False},
}
TEMPERATURES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # authors' code
STRENGTHS = 0.8 * torch.arange(-2, 3)  # to 1.6, in five steps, as in the authors' demo
N_PAIRS = 5  # rows of interpolation.png
N_CANDIDATES = 256  # test images from which those of attributes.png are chosen
CHUNK = 100  # images encoded at once
ALL_ROWS = slice(None)


class Drawing(NamedTuple):
    """What a picture shows: rows of images (N, C, H, W), a label for each row, and a caption."""

    rows: list[Tensor]
    labels: list[str]
    caption: str


class Chosen(NamedTuple):
    """Images of a split, (N, C, H, W), dequantised as in evaluation.

    labels: (N,), or None if the data have none. numbers: those of the images in the split.
    """

    x: Tensor
    labels: Tensor | None
    numbers: list[int]


def move(eps: Latents, direction: Latents, strengths: Tensor) -> Latents:
    """eps + s * direction for every strength s. Levels: (...) to (len(strengths), ...)."""
    levels = zip(eps, direction, strict=True)
    return tuple(torch.stack([z + s * d for s in strengths]) for z, d in levels)


def interpolate(eps_a: Latents, eps_b: Latents, n: int) -> Latents:
    """eps_a + w (eps_b - eps_a) for n weights w from 0 to 1, as in the authors' demo.

    Levels: (...) to (n, ...).
    """
    difference = tuple(b - a for a, b in zip(eps_a, eps_b, strict=True))
    return move(eps_a, difference, torch.linspace(0, 1, n))


def attribute_direction(eps: Latents, labels: Tensor, cls: int) -> Latents:
    """mean(eps | cls) - mean(eps | not cls), section 6. Levels: (N, ...) to (...).

    ValueError: one side is empty.
    """
    is_of_class = labels == cls
    if is_of_class.all() or not is_of_class.any():
        raise ValueError(
            f"all of {len(labels)} training images are of class {cls}, or none is: "
            "give more n_images"
        )
    return tuple(z[is_of_class].mean(0) - z[~is_of_class].mean(0) for z in eps)


def keep_levels(eps: Latents, k: int, others: Latents | None = None) -> Latents:
    """The k coarsest levels, which are the last ones; the rest from `others`, or 0."""
    n_others = len(eps) - k
    others = others or tuple(torch.zeros_like(z) for z in eps)
    return (*others[:n_others], *eps[n_others:])


class Run:
    """A trained flow and its data, which are read by `read_data` only.

    Labels are (B,) int64 on the CPU; None if the data have no labels.
    """

    def __init__(self, name: str, options: DictConfig) -> None:
        model = load_model(name)
        flow = model.flow
        origin = model.stored.origin
        if len(flow.shape) != 3:
            raise ConfigError(f"{name} is of a flow of points: there are pictures of images only")
        problem = _obstacle(flow, origin["parts"])
        if problem is not None:
            raise ConfigError(f"{name} is of a flow {problem}: there are no pictures of such yet")
        self.options = options
        self.flow = flow.to(options.device)
        config = origin["config"]
        self.noise_seed: int = config["eval"]["noise_seed"]
        self.data = _data_of(name, config, options)

    @property
    def n_bits(self) -> int:
        """Bits of the data's integers. Images that are real numbers are shown with 8."""
        return self.data.n_bits or 8

    def read_data(self) -> None:
        """Read the images; download them first if data.download=true and they are missing."""
        self.data.prepare_data()
        self.data.setup("test")

    def images(self, split: str, n: int) -> Chosen:
        """n images of a split (or all, if it has fewer), chosen by the seed."""
        images = getattr(self.data, split)
        if len(images) < 2:
            raise ValueError(f"{len(images)} images in the {split} split are too few for pictures")
        order = np.random.default_rng(self.options.seed).permutation(len(images))
        x, indices, *labels = default_collate([images[0, i] for i in order[:n].tolist()])
        if self.data.dequantizer is not None:
            x, _ = evaluation_input(self.data.dequantizer, x, indices, self.noise_seed)
        return Chosen(x, labels[0] if labels else None, indices.tolist())

    def labelled_images(self, split: str, n: int) -> tuple[Tensor, Tensor]:
        """As `images`. ValueError: the data have no labels."""
        x, labels, _ = self.images(split, n)
        if labels is None:
            raise ValueError(f"{type(self.data).__name__} has no labels")
        return x, labels

    def encode(self, x: Tensor, labels: Tensor | None) -> Latents:
        """Latents of images, a tuple of (B, *latent_shape) on the flow's device."""
        parts = []
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            latents, _ = self.flow(x[rows].to(self.options.device), self._context(labels, rows))
            parts.append(latents)
        return tuple(torch.cat(level) for level in zip(*parts, strict=True))

    def decode(self, eps: Latents, labels: Tensor | None, rows: Rows = ALL_ROWS) -> Tensor:
        """The images of latents, on the CPU. Their labels are the rows `rows` of `labels`."""
        images, _ = self.flow.inverse(eps, self._context(labels, rows))
        return images.cpu()

    def _context(self, labels: Tensor | None, rows: Rows) -> Tensor | None:
        if self.flow.n_classes is None or labels is None:
            return None
        return labels[rows].to(self.options.device)


def _obstacle(flow: FlowModel, parts: list[str]) -> str | None:
    """Why no pictures of a flow can be drawn here, as words after `a flow`; None: they can."""
    if flow.conditioned_on is not None and flow.n_classes is None:
        return "given something else than a class"
    if flow.noise_shape is not None:
        return "whose log-determinant is an estimate"
    if "dequantizer" in parts:
        return "with a learned dequantiser"
    return None


def _data_of(model: str, config: dict, options: DictConfig) -> StatelessDataModule:
    """The data of a run, with labels if they have any, and changed as `options.data` says.

    ConfigError: the data set has no such key, or its images have several sizes.
    """
    name = config["data"]["name"]
    changes = {key: value for key, value in options.data.items() if value}
    parameters = inspect.signature(DATA[name]).parameters
    unknown = sorted(changes.keys() - parameters)
    if unknown:
        raise ConfigError(
            f"data.{unknown[0]} is no key of {name}, the data of {model}: leave it out"
        )
    has_classes = config["data"].get("labels") or getattr(DATA[name], "n_classes", None)
    settings = {"download": False, "labels": bool(has_classes)} | changes
    known = {key: value for key, value in settings.items() if key in parameters}
    data = make_data(seed=config["seed"], **{**config["data"], **known})
    if None in data.shape:
        raise ConfigError(
            f"{model} has data of several sizes: give data.size=, where its data set has that key"
        )
    return data


def temperature(run: Run) -> Drawing:
    """A row for each temperature, and the shares of samples whose every value is finite."""
    n = run.flow.n_classes or run.options.n
    rows = {}
    shares = []
    for value in TEMPERATURES:
        samples = draw_samples(run.flow, n, value, run.options.seed, run.data.shape)
        if samples is None:  # not of a flow of the kinds that `Run` takes
            raise ValueError(f"{type(run.flow).__name__} draws nothing without a context")
        rows[f"T={value:g}"] = samples
        shares.append(f"{finite_share(samples):.0%} at T={value:g}")
    rows = shown(rows)
    caption = f"finite of {n} samples: {', '.join(shares)}"
    return Drawing(list(rows.values()), list(rows), caption)


def interpolation(run: Run) -> Drawing:
    """A row for each pair of test images.

    A class-conditional flow has the first image's class in a row's first half, then the second's.
    """
    x, labels, numbers = run.images("test", 2 * N_PAIRS)
    eps = run.encode(x, labels)
    n = run.options.n
    rows = []
    names = []
    for i in range(0, len(x) - 1, 2):
        first = tuple(z[i] for z in eps)
        second = tuple(z[i + 1] for z in eps)
        owners = [i] * (n - n // 2) + [i + 1] * (n // 2)
        rows.append(run.decode(interpolate(first, second, n), labels, owners))
        names.append(f"image {numbers[i]} to {numbers[i + 1]}")
    return Drawing(rows, names, f"{len(rows)} pairs of test images")


def levels(run: Run) -> Drawing:
    """The rows of levels.png: the images, then the images from some of their levels.

    First the eps of the other levels are 0, then they are drawn at temperature 0.7.
    """
    x, labels, _ = run.images("test", run.options.n)
    eps = run.encode(x, labels)
    generator = torch.Generator().manual_seed(run.options.seed)
    shapes = run.flow.latent_shapes(run.data.shape)
    others = run.flow.base.sample(len(x), shapes, 0.7, generator, eps[0])
    n = len(eps)
    latents = [keep_levels(eps, k) for k in range(1, n + 1)]
    latents += [keep_levels(eps, k, others) for k in range(1, n)]
    rows = [x, *(run.decode(z, labels) for z in latents)]
    names = ["image", *(f"{k} of {n} levels" for k in range(1, n + 1))]
    names += [f"{k} of {n}, rest T=0.7" for k in range(1, n)]
    return Drawing(rows, names, f"test images from 1 to {n} levels")


def attributes(run: Run, names: Sequence[str], cls: int | None) -> Drawing:
    """A row for each moved image, whose label names its class and the direction's.

    The flow encodes and decodes each image with the image's own label.

    Args:
        run: the flow and its data.
        names: the names of the classes.
        cls: the class along whose direction images are moved; None: each class in turn.
    """
    x_train, labels_train = run.labelled_images("train", run.options.n_images)
    x, labels = run.labelled_images("test", N_CANDIDATES)
    eps_train = run.encode(x_train, labels_train)
    eps = run.encode(x, labels)
    labels_train = labels_train.to(run.options.device)
    rows = []
    changes = []
    for i, target in _moves(labels, len(names), cls, run.options.n):
        direction = attribute_direction(eps_train, labels_train, target)
        moved = move(tuple(z[i] for z in eps), direction, STRENGTHS)
        rows.append(run.decode(moved, labels, [i] * len(STRENGTHS)))
        changes.append(f"{names[int(labels[i])]} to {names[target]}")
    return Drawing(rows, changes, ", ".join(changes))


def _moves(labels: Tensor, n_classes: int, cls: int | None, n: int) -> list[tuple[int, int]]:
    """Which image is moved along which class: pairs of an index into `labels`, and a class.

    For one class these are the first n images of other classes. Else each class gets an image of
    the next class that has one; the first class follows the last.
    """
    own = labels.numpy()
    if cls is not None:
        others = np.flatnonzero(own != cls)[:n]
        return [(i, cls) for i in others.tolist()]
    distances = [(own - target - 1) % n_classes for target in range(n_classes)]
    return [(int(np.argmin(steps)), target) for target, steps in enumerate(distances)]


def read_options(words: list[str]) -> tuple[str, DictConfig]:
    """Read the command line: the model, then key=value. ConfigError: a mistake in them."""
    [name], options = read_words(words, [MODEL], DEFAULTS)
    at_least(options, n=2, n_images=2, seed=0)
    options.device = device_of(options.device)
    folder = expand_home("the model", name)
    out = folder / "pictures" if folder.is_dir() else "pictures"
    options.out = str(expand_home("out", options.out or out))
    return name, options


def write(path: Path, drawing: Drawing, n_bits: int) -> None:
    """Write one picture, and print its path with its caption."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(as_array(picture(drawing.rows, n_bits, drawing.labels)))
    write_png(path, lambda stream: image.save(stream, "PNG", optimize=True))
    say(f"{path}: {drawing.caption}")


@command
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Draw and write all pictures; one line and exit code 1 for a mistake or missing data."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    name, options = read_options(words)
    run = Run(name, options)
    names = list(run.data.class_names or [])
    attribute = options.attribute
    if attribute and names and attribute not in names:
        raise ConfigError(
            f"attribute={attribute} is not known{nearest(attribute, names)}: "
            f"give {', '.join(names)}"
        )
    out = Path(options.out)
    with evaluation(options.device):
        write(out / "temperature.png", temperature(run), run.n_bits)
        run.read_data()
        write(out / "interpolation.png", interpolation(run), run.n_bits)
        write(out / "levels.png", levels(run), run.n_bits)
        if not names:
            say(f"{type(run.data).__name__} has no labels: no attributes.png")
        elif not attribute:
            write(out / "attributes.png", attributes(run, names, None), run.n_bits)
        else:
            path = out / f"attributes-{attribute}.png"
            write(path, attributes(run, names, names.index(attribute)), run.n_bits)


if __name__ == "__main__":
    main()
