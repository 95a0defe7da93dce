"""Pictures of a run of an image flow: what it draws and what its latents hold (Glow, arXiv 1807.03039, section 6).

python -m reproduce.pictures outputs/realnvp_cifar10/20261122-231500-ab12                   # all of them
python -m reproduce.pictures outputs/realnvp_cifar10/20261122-231500-ab12 attribute=cat n=5

They go into <run folder>/pictures/. Latents are eps, standard normal on every level under the model.
  temperature.png    rows: T = 0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1 (authors' grids), the same base samples in each;
                     columns: samples, or the classes of a class-conditional flow
  interpolation.png  rows: two test images and what lies between them, linear in eps of all levels (figure 5)
  levels.png         first row: test images; next: from only the coarsest level to all of them, the other eps 0; last:
                     from only the coarsest to all but the finest, the other eps drawn at temperature 0.7
  attributes.png     rows: the classes; a test image, in the middle, moved by -1.6 to 1.6 times mean(eps | class) -
                     mean(eps | not class) of training images (figure 6). It is of the class after the row's, so what
                     to the right turns into the row's class is of another. For data with labels.
  attributes-X.png   in its place with attribute=X: test images of other classes, all moved along X

keys: n=8 pictures a row, seed=0 of samples and of the choice of images, n_images=1000 training images for means,
attribute=CLASS, device=cpu or cuda (default: cuda where there is one), out=FOLDER, data.root=FOLDER of the images where
it is not the run's, data.download=true to fetch them
"""

import sys

sys.path.insert(0, sys.path[0].removesuffix("reproduce"))  # this clone's code, not an install's

import inspect
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import default_collate

from datamodules import DATA, make_data
from flows.base import FlowModel
from lightning_modules.callbacks.samples import finite_share, picture
from lightning_modules.density import drawn
from lightning_modules.noise import evaluation_input
from lightning_modules.precision import evaluation
from reproduce.command import command
from reproduce.config import ConfigError, arguments, merge, nearest, parse
from reproduce.run_folder import read_run

Latents = tuple[Tensor, ...]
DEFAULTS = {"n": 8, "seed": 0, "n_images": 1000, "attribute": None, "device": None, "out": None}
DEFAULTS |= {"data": {"root": None, "download": False}}
TEMPERATURES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # authors' code
STRENGTHS = 0.8 * torch.arange(-2, 3)  # to 1.6, in five steps, as in the authors' demo
N_PAIRS = 5  # rows of interpolation.png
N_CANDIDATES = 256  # test images among which those for attributes.png are looked for
CHUNK = 100  # images encoded at once


def move(eps: Latents, direction: Latents, strengths: Tensor) -> Latents:
    """eps + s * direction for every strength s. Levels: (...) to (len(strengths), ...)."""
    return tuple(
        torch.stack([z + s * d for s in strengths]) for z, d in zip(eps, direction, strict=True)
    )


def interpolate(eps_a: Latents, eps_b: Latents, n: int) -> Latents:
    """eps_a + w (eps_b - eps_a) for n weights w from 0 to 1 (authors' demo). Levels: (...) to (n, ...)."""
    return move(
        eps_a, tuple(b - a for a, b in zip(eps_a, eps_b, strict=True)), torch.linspace(0, 1, n)
    )


def attribute_direction(eps: Latents, labels: Tensor, cls: int) -> Latents:
    """mean(eps | cls) - mean(eps | not cls) (section 6). Levels: (N, ...) to (...). ValueError: one side is empty."""
    if (labels == cls).all() or (labels != cls).all():
        raise ValueError(
            f"all of {len(labels)} training images are of class {cls}, or none is: give more n_images"
        )
    return tuple(z[labels == cls].mean(0) - z[labels != cls].mean(0) for z in eps)


def keep_levels(eps: Latents, k: int, others: Latents | None = None) -> Latents:
    """The k coarsest levels, which are the last ones; the rest from `others`, or 0."""
    n_others = len(eps) - k
    others = others or tuple(torch.zeros_like(z) for z in eps)
    return (*others[:n_others], *eps[n_others:])


class Run:
    """A trained flow and its data, not yet read. `labels` are (B,) int64 on the CPU, None where the data have none."""

    def __init__(self, folder: Path, options: DictConfig) -> None:
        flow, origin = read_run(folder)
        if len(flow.shape) != 3:
            raise ConfigError(f"{folder} is of a flow of points: there are pictures of images only")
        if problem := _not_drawn(flow, origin["parts"]):
            raise ConfigError(f"{folder} is of a flow {problem}: there are no pictures of such yet")
        self.options, self.flow, config = options, flow.to(options.device), origin["config"]
        name, overrides = (
            config["data"]["name"],
            {key: value for key, value in options.data.items() if value},
        )
        parameters = inspect.signature(DATA[name]).parameters
        if unknown := sorted(overrides.keys() - parameters):
            raise ConfigError(
                f"data.{unknown[0]} is no key of {name}, the data of {folder}: leave it out"
            )
        defaults = {
            key: value
            for key, value in {"download": False, "labels": True}.items()
            if key in parameters
        }
        self.data = make_data(seed=config["seed"], **{**config["data"], **defaults, **overrides})
        self.noise_seed = config["eval"]["noise_seed"]
        if None in self.data.shape:
            raise ConfigError(
                f"{folder} has data of several sizes: give data.size=, where its data set has that key"
            )

    def images(self, split: str, n: int) -> tuple[Tensor, Tensor | None]:
        """x, n images (or all there are) chosen by the seed, dequantised as in evaluation, and labels."""
        images = getattr(self.data, split)
        if len(images) < 2:
            raise ValueError(f"{len(images)} images in the {split} split are too few for pictures")
        order = np.random.default_rng(self.options.seed).permutation(len(images))
        q, index, *labels = default_collate([images[0, i] for i in order[:n].tolist()])
        x, _ = evaluation_input(self.data.dequantizer, q, index, self.noise_seed)
        return x, labels[0] if labels else None

    def encode(self, x: Tensor, labels: Tensor | None) -> Latents:
        """Latents of images, a tuple of (B, *latent_shape) on the flow's device."""
        chunks = [slice(i, i + CHUNK) for i in range(0, len(x), CHUNK)]
        parts = [
            self.flow(x[c].to(self.options.device), self._context(labels, c))[0] for c in chunks
        ]
        return tuple(torch.cat(level) for level in zip(*parts, strict=True))

    def decode(self, eps: Latents, labels: Tensor | None, rows=slice(None)) -> Tensor:
        """Images of latents, on the CPU; `rows` of `labels` are theirs."""
        return self.flow.inverse(eps, self._context(labels, rows))[0].cpu()

    def _context(self, labels: Tensor | None, rows) -> Tensor | None:
        return None if self.flow.n_classes is None else labels[rows].to(self.options.device)


def _not_drawn(flow: FlowModel, parts: list[str]) -> str | None:
    """What is special about a flow that the pictures here do not know, in words; None: nothing."""
    if flow.conditioned_on is not None and flow.n_classes is None:
        return "given something else than a class"
    if flow.noise_shape is not None:
        return "whose log-determinant is an estimate"
    return "with a learned dequantiser" if "dequantizer" in parts else None


def temperature(run: Run) -> tuple[list[Tensor], str]:
    """A row a temperature, and the shares of samples whose every value is finite."""
    n = run.options.n if run.flow.n_classes is None else run.flow.n_classes
    rows = [drawn(run.flow, n, t, run.options.seed, run.data.shape) for t in TEMPERATURES]
    shares = ", ".join(
        f"{finite_share(row):.0%} at T={t:g}" for row, t in zip(rows, TEMPERATURES, strict=True)
    )
    return rows, f"finite of {len(rows[0])} samples: {shares}"


def interpolation(run: Run) -> tuple[list[Tensor], str]:
    """A row a pair. A class-conditional flow has the first image's class in its first half, then the second's."""
    (x, labels), n = run.images("test", 2 * N_PAIRS), run.options.n
    eps, rows = run.encode(x, labels), []
    for i in range(0, len(x) - 1, 2):
        between = interpolate(tuple(z[i] for z in eps), tuple(z[i + 1] for z in eps), n)
        rows.append(run.decode(between, labels, [i] * (n - n // 2) + [i + 1] * (n // 2)))
    return rows, f"{len(rows)} pairs of test images"


def levels(run: Run) -> tuple[list[Tensor], str]:
    """The images; from the coarsest level alone to all, the rest 0; the same with the rest drawn, but for all."""
    x, labels = run.images("test", run.options.n)
    eps, generator = run.encode(x, labels), torch.Generator().manual_seed(run.options.seed)
    others = run.flow.base.sample(
        len(x), run.flow.latent_shapes(run.data.shape), 0.7, generator, eps[0]
    )
    latents = [keep_levels(eps, k) for k in range(1, len(eps) + 1)]
    latents += [keep_levels(eps, k, others) for k in range(1, len(eps))]
    return [
        x,
        *(run.decode(z, labels) for z in latents),
    ], f"test images from 1 to {len(eps)} levels"


def attributes(run: Run, cls: int | None) -> tuple[list[Tensor], str]:
    """A row an image, and what becomes what. Directions are found, and followed, under each image's own label."""
    (x_train, labels), (x, own) = (
        run.images("train", run.options.n_images),
        run.images("test", N_CANDIDATES),
    )
    eps_train, eps, names, rows = (
        run.encode(x_train, labels),
        run.encode(x, own),
        run.data.class_names,
        [],
    )
    if cls is None:  # classes after the row's: the nearest one that an image here is of
        moves = [(int(np.argmin((own.numpy() - c - 1) % len(names))), c) for c in range(len(names))]
    else:
        moves = [(i, cls) for i in (own != cls).nonzero()[: run.options.n, 0].tolist()]
    for i, c in moves:
        direction = attribute_direction(eps_train, labels.to(run.options.device), c)
        rows.append(
            run.decode(
                move(tuple(z[i] for z in eps), direction, STRENGTHS), own, [i] * len(STRENGTHS)
            )
        )
    return rows, ", ".join(f"{names[own[i]]} to {names[c]}" for i, c in moves)


def read_options(words: list[str]) -> tuple[Path, DictConfig]:
    """The run folder and the keys behind it. ConfigError: a mistake in them."""
    if not words or not Path(words[0]).is_dir():
        raise ConfigError(
            f"{words[0] if words else 'nothing'} is no run's folder: give outputs/<experiment>/<run id>"
        )
    options = merge(OmegaConf.create(DEFAULTS), parse(words[1:]), [])
    if min(options.n, options.n_images) < 2 or options.seed < 0:
        raise ConfigError("n and n_images must be at least 2, and seed at least 0")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    options.device = options.device or devices[0]
    if options.device not in devices:
        raise ConfigError(f"device={options.device} is not here: give {' or '.join(devices)}")
    return Path(words[0]), options


def write(path: Path, rows: list[Tensor], caption: str, n_bits: int) -> None:
    """One picture, and a line that says what it shows."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(rows, n_bits).permute(1, 2, 0).numpy()).save(path, optimize=True)
    print(f"{path}: {caption}", flush=True)


@command
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Draw and write; one line and exit code 1 for a user's mistake, also where the run's data are missing."""
    if {"--help", "-h"} & set(words := arguments(argv)):
        return print(__doc__.strip())
    folder, options = read_options(words)
    run, attribute, out = (
        Run(folder, options),
        options.attribute,
        Path(str(options.out or folder / "pictures")),
    )
    if attribute is not None and attribute not in (names := run.data.class_names or [attribute]):
        raise ConfigError(
            f"attribute={attribute} is not known{nearest(str(attribute), names)}: give {', '.join(names)}"
        )
    n_bits = run.data.n_bits
    with evaluation(options.device):
        write(out / "temperature.png", *temperature(run), n_bits)
        run.data.prepare_data()
        run.data.setup()
        write(out / "interpolation.png", *interpolation(run), n_bits)
        write(out / "levels.png", *levels(run), n_bits)
        if names := run.data.class_names:
            name = "attributes.png" if attribute is None else f"attributes-{attribute}.png"
            write(
                out / name,
                *attributes(run, None if attribute is None else names.index(attribute)),
                n_bits,
            )
        else:
            print(f"{type(run.data).__name__} has no labels: no attributes.png")


if __name__ == "__main__":
    main()
