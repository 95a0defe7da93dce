"""Enlarge images with a trained model of super-resolution.

python -m reproduce.upscale outputs/srflow_photos_x4/20261122-231500-ab12 photo.png out=enlarged
python -m reproduce.upscale srflow_bsds_x4/cpu-seed0 photos temperature=0.8 samples=3

The model is the folder of a run, an exported folder, a checkpoint, or the name of a recorded run,
of srflow_... or rrdb_.... Each image becomes as many times as high and wide as the model's scale.
The second word is a PNG, JPEG, WebP, BMP or TIFF file of any size, or a folder of them.

For photo.png a model of scale 4 writes

    photo_x4_1.png, ...   the enlarged images, as many as `samples`. RRDB makes one
    photo_x4_strip.png    a comparison: the image as it was, its bicubic enlargement, the one by
                          RRDB, the samples, and how much they differ from one another. A large
                          image is shown in part, where the first sample differs most from bicubic

Sample k is a function of the model, the image, the temperature, the seed and k. Large images are
computed in tiles that overlap, with common latents, and the command says by how many grey levels
the tiles differ where they overlap. It also prints the LR-PSNR: how well an enlarged image that is
reduced again agrees with the image that was given (datamodules/bicubic.py).

An image with transparent pixels gets its opacity enlarged bicubically. Grey images become colour
images. The colour profile is kept, and other information in a file, such as the place of a
photograph, is not. Files that are there already are replaced only if the same command has written
them, and images that are complete are left out.

keys:
  out=upscaled      the folder of the files
  temperature=0.9   the standard deviation of the latents: lower ones give smoother images that vary
                    less; the default is the one at which the model's recipe tests it
  samples=1         how many images are drawn for each
  seed=0            of the latents
  rrdb=MODEL        an RRDB for the strip; the default is the one whose encoder the model began with
  strip=true        whether the strip is written
  tile=512          the largest side of a tile, in pixels of the enlarged image; 0: no tiles
  overlap=96        of neighbouring tiles, in pixels of the enlarged image
  device=cpu        or cuda; the default is cuda where there is one
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import hashlib
import json
import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import DictConfig
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from datamodules.bicubic import downscale, upscale
from datamodules.checks import check_memory, expand_home, is_number
from datamodules.image_files import Picture, find_images, read_picture, shown
from lightning_modules.callbacks.png import write_png
from lightning_modules.callbacks.samples import NOT_FINITE
from lightning_modules.quality.super_resolution import as_uint8, low_res_psnr
from reproduce.command import command
from reproduce.comparison import detail, spread, spread_map, strip
from reproduce.config import ConfigError, arguments
from reproduce.enlargers import Enlarged, Enlarger, FlowEnlarger, enlarge, make_enlarger, tiles_of
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
from reproduce.stored import Stored, read_stored
from reproduce.streams import say

IMAGE = "IMAGE"
DEFAULTS: dict[str, object] = {
    "out": "upscaled",
    "temperature": None,
    "samples": 1,
    "seed": 0,
    "rrdb": "",
    "strip": True,
    "tile": 512,
    "overlap": 96,
    "device": "",
}
MOST_SAMPLES = 1000
STRIP = "strip"  # the end of the name of its file
TEXT = "paperflows"  # the name of the text in a PNG file that says how it was made
VALUE_BYTES = 5 * 4  # of a value of an enlarged image: its latent, and what is computed of it


class Source(NamedTuple):
    """An image file. name: its path below the folder that was given, without its ending."""

    path: Path
    name: str


class Task(NamedTuple):
    """What is done to every image.

    rrdb: the model of the strip, if there is one. settings: what decides a sample, besides the
    image and its number, for the PNG files. of_strip: what decides the strip in addition. options:
    those of the command. folder: of the files that are written.
    """

    enlarger: Enlarger
    rrdb: Enlarger | None
    settings: dict[str, Any]
    of_strip: dict[str, Any]
    options: DictConfig
    folder: Path

    def file(self, source: Source, end: int | str) -> Path:
        """The file of a sample, by its number from 1, or of the strip, by STRIP."""
        return self.folder / f"{source.name}_x{self.enlarger.scale}_{end}.png"

    def files(self, source: Source, digest: str) -> dict[Path, dict[str, Any]]:
        """All files of an image, with the settings that are written into them.

        digest: the SHA-256 of the image's own file.
        """
        settings = self.settings | {"image": digest}
        files = {
            self.file(source, number): settings | {"sample": number}
            for number in range(1, self.enlarger.n + 1)
        }
        if self.options.strip:
            files[self.file(source, STRIP)] = settings | self.of_strip
        return files


def sources_of(path: Path) -> list[Source]:
    """The image files that a path names: itself, or all in a folder.

    FileNotFoundError, ValueError or ConfigError, one line: there are none, or two have one name.
    """
    if path.is_dir():
        paths = find_images(path)
        names = [str(file.relative_to(path).with_suffix("")) for file in paths]
    elif path.exists():
        paths = [path]
        names = [path.stem]
    else:
        raise FileNotFoundError(f"there is no image {shown(path)}")
    first: dict[str, Path] = {}
    for file, name in zip(paths, names, strict=True):
        if name in first:
            raise ConfigError(
                f"{shown(first[name])} and {shown(file)} differ in their endings alone: "
                "rename one of them"
            )
        first[name] = file
    return [Source(file, name) for name, file in first.items()]


def settings_of(stored: Stored, enlarger: Enlarger, options: DictConfig) -> dict[str, Any]:
    """What decides the enlarged images of an image, for the PNG files."""
    settings: dict[str, Any] = {
        "experiment": stored.origin["experiment"],
        "weights": fingerprint(stored.weights),
        "scale": enlarger.scale,
        "tile": options.tile,
        "overlap": options.overlap,
    }
    if isinstance(enlarger, FlowEnlarger):
        settings |= {"temperature": float(enlarger.temperature), "seed": options.seed}
    return settings


def of_rrdb(name: str, stored: Stored, scale: int, device: str) -> Enlarger | None:
    """The RRDB of the strip: the one that is named, or the one that the model began with.

    None: there is none, which a line says if the model's own cannot be read. ConfigError,
    ValueError or FileNotFoundError, one line: the one that is named cannot be used.
    """
    own = stored.origin["config"].get("flow", {}).get("encoder_checkpoint")
    if not name and own is None:
        return None
    try:
        enlarger = make_enlarger(read_stored(name or own), name or own, device, 1, None, 0)
        if isinstance(enlarger, FlowEnlarger):
            raise ConfigError(f"rrdb={name or own} is of a flow: give a run of rrdb_...")
        if enlarger.scale != scale:
            raise ConfigError(f"rrdb={name or own} enlarges by {enlarger.scale}, not by {scale}")
    except (OSError, ValueError):
        if name:
            raise
        say(
            f"no RRDB in the strip, since {own}, which the encoder began with, cannot be used "
            "here: give rrdb=MODEL"
        )
        return None
    return enlarger


# ---------------------------------------------------------------------- one image


def upscale_image(task: Task, source: Source, bar: Tqdm) -> list[str]:
    """Enlarge an image and write its files; return the lines that tell of it.

    UnreadableImage, ValueError or ConfigError, one line: the image cannot be read, is too large, or
    the files cannot be written.
    """
    picture = read_picture(source.path)
    digest = hashlib.sha256(source.path.read_bytes()).hexdigest()
    files = task.files(source, digest)
    if are_written(files):
        return [f"{source.path}: its files are there already"]
    low_res = torch.from_numpy(picture.pixels)
    options = task.options
    check_size(task.enlarger, low_res)
    bar.total += len(tiles_of(task.enlarger, low_res, options.tile, options.overlap))
    enlarged = enlarge(task.enlarger, low_res, options.tile, options.overlap, bar)
    images = torch.cat([as_levels(image[None]) for image in enlarged.images])
    for number, image in enumerate(images, 1):
        path = task.file(source, number)
        write_image(path, image, picture, files[path])
    lines = [line_of(task, source, low_res, enlarged, images)]
    if options.strip:
        panels = panels_of(task, low_res, images)
        path = task.file(source, STRIP)
        write_picture(path, strip(panels), files[path])
        lines.append(f"{path}: {', '.join(panels)}")
    return lines


def check_size(enlarger: Enlarger, low_res: Tensor) -> None:
    """ValueError, one line: the enlarged images would not fit into memory."""
    height, width = (enlarger.scale * side for side in low_res.shape[1:])
    check_memory(
        f"samples={enlarger.n} of {width}x{height} pixels",
        VALUE_BYTES * enlarger.n * 3 * height * width,
    )


def are_written(files: dict[Path, dict[str, Any]]) -> bool:
    """Whether all files of an image are there, with the settings that belong to them.

    ConfigError, one line: one is there, but is not of this command.
    """
    existing = [path for path in files if path.exists()]
    for path in existing:
        if made_with(path) != files[path]:
            raise ConfigError(
                f"{shown(path)} is there already, and not of this command: give another out="
            )
    return len(existing) == len(files)


def made_with(path: Path) -> dict[str, Any] | None:
    """The settings in a PNG file that this command has written; None for any other."""
    try:
        with Image.open(path) as image:
            image.load()
            content = json.loads(image.info.get(TEXT, "null"))
    except (OSError, SyntaxError, ValueError):  # no file, or a damaged one
        return None
    return content if isinstance(content, dict) else None


def as_levels(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) as uint8, rounded and clipped; pixels that are not finite are magenta."""
    finite = images.isfinite().all(1, keepdim=True)
    levels = as_uint8(images.nan_to_num(0.0, 0.0, 0.0))
    return levels.where(finite, levels.new_tensor(NOT_FINITE).view(1, 3, 1, 1))


def line_of(task: Task, source: Source, low_res: Tensor, enlarged: Enlarged, images: Tensor) -> str:
    """What is told of the images of one image."""
    scale = task.enlarger.scale
    reduce = functools.partial(downscale, scale=scale)
    psnr = torch.cat([low_res_psnr(image[None], low_res[None], reduce) for image in images])
    height, width = images.shape[2:]
    first = task.file(source, 1)
    parts = [f"{first}: {width}x{height}, LR-PSNR {span(psnr)} dB"]
    if len(images) > 1:
        parts[0] = f"{first} and {len(images) - 1} more{parts[0].removeprefix(str(first))}"
        parts.append(f"spread {spread(images).mean().item():.2f} grey levels")
    if enlarged.n_tiles > 1:
        parts.append(
            f"{enlarged.n_tiles} tiles, which differ by {enlarged.difference:.3f} grey levels "
            "where they overlap"
        )
    share = enlarged.images.isfinite().all(1).float().mean().item()
    if share < 1:
        parts.append(
            f"only {min(share, 0.999):.1%} of the pixels are finite, and the others magenta: give "
            "a lower temperature"
        )
    return ", ".join(parts)


def span(values: Tensor) -> str:
    """The range of some values, with two digits.

    >>> span(torch.tensor([30.0, 31.5]))
    '30.00 to 31.50'
    """
    low = values.min().item()
    high = values.max().item()
    if f"{low:.2f}" == f"{high:.2f}":
        return f"{low:.2f}"
    return f"{low:.2f} to {high:.2f}"


def panels_of(task: Task, low_res: Tensor, images: Tensor) -> dict[str, Tensor]:
    """The images of a strip by their titles, each (3, height, width) uint8."""
    scale = task.enlarger.scale
    bicubic = upscale(low_res[None], scale)[0]
    rows, columns = detail(images[0], bicubic)
    large = low_res.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    panels = {"low resolution": large, "bicubic": bicubic}
    if task.rrdb is not None:
        made = enlarge(task.rrdb, low_res, task.options.tile, task.options.overlap)
        panels["RRDB"] = as_levels(made.images)[0]
    if isinstance(task.enlarger, FlowEnlarger):
        temperature = f"T={task.enlarger.temperature:g}"
        for number, image in enumerate(images, 1):
            panels[f"sample {number}, {temperature}"] = image
    else:
        panels["RRDB"] = images[0]
    panels = {title: panel[:, rows, columns] for title, panel in panels.items()}
    if len(images) > 1:
        values, top = spread_map(spread(images)[rows, columns])
        panels[f"spread, 0 to {top:.1f} levels"] = values
    return panels


def write_image(path: Path, image: Tensor, picture: Picture, settings: dict[str, Any]) -> None:
    """Write an enlarged image, (3, H, W) uint8, with the opacity of the image that was given."""
    pixels = image
    if picture.opacity is not None:
        opacity = torch.from_numpy(picture.opacity)
        scale = image.shape[1] // opacity.shape[1]
        pixels = torch.cat([image, upscale(opacity[None], scale)[0]])
    content = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    write_picture(path, content, settings, picture.profile)


def write_picture(
    path: Path, image: Image.Image, settings: dict[str, Any], profile: bytes | None = None
) -> None:
    """Write a PNG file in one step, with the settings as a text. profile: its ICC profile.

    ConfigError, one line: it cannot be written.
    """
    text = PngInfo()
    text.add_itxt(TEXT, json.dumps(settings))
    with opening(path):
        write_png(
            path,
            lambda stream: image.save(stream, "PNG", pnginfo=text, icc_profile=profile),
        )


@command
def main(argv: list[str] | None = None) -> None:
    """Enlarge the images; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    [name, image], options = read_words(words, [MODEL, IMAGE], DEFAULTS)
    at_least(options, samples=1, seed=0, tile=0, overlap=0)
    if options.samples > MOST_SAMPLES:
        raise ConfigError(f"samples={options.samples} is out of range: give at most {MOST_SAMPLES}")
    temperature = options.temperature
    if temperature is not None and not (is_number(temperature) and 0 <= temperature < math.inf):
        raise ConfigError(f"temperature={temperature} is out of range: give a number of at least 0")
    if options.tile and options.tile < 2 * options.overlap:
        raise ConfigError(
            f"tile={options.tile} is less than twice overlap={options.overlap}: give a larger tile"
        )
    device = device_of(options.device)
    sources = sources_of(expand_home("the image", image))
    stored = read_stored(name)
    enlarger = make_enlarger(stored, name, device, options.samples, temperature, options.seed)
    rrdb = None
    if options.strip and isinstance(enlarger, FlowEnlarger):
        rrdb = of_rrdb(options.rrdb, stored, enlarger.scale, device)
    settings = settings_of(stored, enlarger, options)
    of_strip: dict[str, object] = {"samples": enlarger.n, "rrdb": None}
    if rrdb is not None:
        of_strip["rrdb"] = fingerprint(rrdb.network.state_dict())
    folder = expand_home("out", options.out)
    task = Task(enlarger, rrdb, settings, of_strip, options, folder)
    with (
        repeatable("the same command goes on with the images that are missing"),
        progress_bar(0, "tiles") as bar,
    ):
        for source in sources:
            lines = upscale_image(task, source, bar)
            with bar.external_write_mode(file=sys.stdout):
                say(*lines)


if __name__ == "__main__":
    main()
