"""Pictures of what SRFlow's latents can do: images that are changed, and made plausible again.

They are the image manipulations of the paper (Lugmayr et al. 2020, arXiv 2006.14200), and the
functions behind them are in flows/srflow/latents.py.

python -m reproduce.latent_space outputs/srflow_bsds_x4/20261127-201500-ab12
python -m reproduce.latent_space outputs/srflow_bsds_x4/20261127-201500-ab12 images=photos noise=30

MODEL is an SRFlow: the folder of a run, an exported or imported folder, a checkpoint, or the name
of a recorded run. Each picture has a column for each image, whose middle is taken, and each row has
a label on its left. Low-resolution images are made by bicubic interpolation, as in training.
  restoration.png    noise is added to the images. Then: the images from the latents of these,
                     normalised in one of three ways (all latents together, over positions, over
                     channels), and restored: over positions, then over channels
  resampling.png     the images, with the region; the same with the latents of the region drawn
                     anew, three times; and where these differ
  transfer.png       the region of the next image is pasted in; then content transfer, which makes
                     it agree with the low-resolution image of the first one
  harmonization.png  the same, made to agree with the low-resolution image of the composite
  style.png          the images from their low-resolution image and the latents of the next image

A single image is followed by its mirror image. One line for each picture has figures: PSNR to the
image, LR-PSNR (both images reduced) to the low-resolution image, in dB, means over images.

keys: images=FILE or FOLDER (default: photographs inside scikit-image and scikit-learn), n=4 of
them, side=160 pixels at most, region=[ROW,COLUMN,HEIGHT,WIDTH] in pixels (default: the middle),
noise=20 grey levels, temperature= (default: that of the model's test), seed=0, device=cpu or cuda
(default: cuda where there is one), out=FOLDER of the pictures (default: latent_space in the folder
of the model)
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import math
from typing import NamedTuple

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from datamodules.bicubic import downscale, upscale
from datamodules.checks import expand_home, is_whole
from datamodules.image_files import find_images, read_whole
from datamodules.photos import photographs
from flows.caching import cached
from flows.checks import check_temperature
from flows.srflow import SRFlow
from flows.srflow import latents as space
from lightning_modules.precision import evaluation
from lightning_modules.quality.super_resolution import as_uint8, low_res_psnr, psnr_rgb
from reproduce.command import command
from reproduce.config import ConfigError, arguments
from reproduce.model import load_model
from reproduce.model_command import MODEL, at_least, device_of, read_words
from reproduce.pictures import Drawing, write
from reproduce.streams import say

DEFAULTS: dict[str, object] = {
    "images": "",
    "n": 4,
    "side": 160,
    "region": [],
    "noise": 20.0,
    "temperature": None,
    "seed": 0,
    "device": "",
    "out": "",
}
LEVELS = 255
N_BITS = 8
N_DRAWS = 3  # rows of resampling.png
GAIN = 4  # of the picture of differences
FRAME = (1.0, 0.0, 1.0)  # the colour of the frame around the region


class Lab(NamedTuple):
    """A flow with images to change, and the settings.

    images: (N, 3, H, W) in [0, 1], on the device of the flow. others: the images that are pasted
    in. mask: (1, 1, H, W), true in the region. noise: in grey levels.
    """

    flow: SRFlow
    images: Tensor
    others: Tensor
    mask: Tensor
    noise: float
    temperature: float
    seed: int

    def generator(self, number: int = 0) -> torch.Generator:
        """A generator that depends on the seed and a number."""
        return torch.Generator().manual_seed(1000 * self.seed + number)

    def reduce(self, images: Tensor) -> Tensor:
        """The low-resolution images, in grey levels over 255, as the flow has seen them."""
        return downscale(whole_levels(images), self.flow.scale).to(images) / LEVELS

    def bicubic(self, images: Tensor) -> Tensor:
        """Images that are reduced and enlarged by bicubic interpolation."""
        low_res = downscale(whole_levels(images), self.flow.scale)
        return upscale(low_res, self.flow.scale).to(images) / LEVELS

    def psnr(self, images: Tensor, references: Tensor) -> float:
        """The mean PSNR in dB; NaN where images are not finite."""
        if not images.isfinite().all():
            return math.nan
        return psnr_rgb(as_uint8(images), as_uint8(references)).mean().item()

    def low_res_psnr(self, images: Tensor, references: Tensor) -> float:
        """The mean PSNR in dB of the reduced images; NaN where images are not finite."""
        if not images.isfinite().all():
            return math.nan
        low_res = downscale(whole_levels(references), self.flow.scale)
        values = low_res_psnr(
            as_uint8(images), low_res, lambda high_res: downscale(high_res, self.flow.scale)
        )
        return values.mean().item()


def whole_levels(images: Tensor) -> Tensor:
    """Images as uint8; values that are not finite are 0."""
    return as_uint8(images.nan_to_num(0.0, 0.0, 0.0))


# ---------------------------------------------------------------------- the pictures


def restoration(lab: Lab) -> Drawing:
    """Noise, what each normalisation makes of it, and the restored images."""
    noise = torch.randn(lab.images.shape, generator=lab.generator()).to(lab.images)
    degraded = whole_levels(lab.images + lab.noise / LEVELS * noise) / LEVELS
    encoding = lab.flow.encode_context(lab.reduce(degraded))
    latents = space.encode(lab.flow, degraded, encoding)
    rows = {"image": lab.images, "noisy": degraded, "bicubic": lab.bicubic(degraded)}
    for groups in ("global", "spatial", "local"):
        new = space.normalized(latents, groups, lab.temperature, lab.generator(1))
        rows[groups] = space.decode(lab.flow, new, encoding)
    rows["restored"] = space.restored(
        lab.flow, degraded, lab.reduce, lab.temperature, lab.generator(2)
    )
    figures = [f"{name} {lab.psnr(row, lab.images):.2f}" for name, row in rows.items()][1:]
    return drawing(rows, f"PSNR: {', '.join(figures)}")


def resampling(lab: Lab) -> Drawing:
    """The images with the latents of a region drawn anew, and where the draws differ."""
    low_res = lab.flow.encode_context(lab.reduce(lab.images))
    draws = [
        space.resampled(lab.flow, lab.images, low_res, lab.mask, lab.temperature, lab.generator(i))
        for i in range(N_DRAWS)
    ]
    spread = torch.stack(draws).std(0)
    rows = {"image": framed(lab.images, lab.mask)}
    rows |= {f"drawn {i}": draw for i, draw in enumerate(draws, start=1)}
    rows[f"{GAIN}x spread"] = (GAIN * spread).clamp(max=1)
    levels = LEVELS * spread.mean(1, keepdim=True)
    inside = levels[lab.mask.expand_as(levels)].mean().item()
    outside = levels[~lab.mask.expand_as(levels)].mean().item()
    caption = (
        f"spread of {N_DRAWS} draws: {inside:.2f} grey levels in the region, {outside:.2f} outside"
    )
    return drawing(rows, caption)


def transfer(lab: Lab) -> Drawing:
    """The region of the next image, made to agree with the low-resolution image."""
    pasted = torch.where(lab.mask, lab.others, lab.images)
    result = space.transferred(
        lab.flow,
        pasted,
        lab.reduce(lab.images),
        lab.mask,
        lab.temperature,
        lab.generator(),
    )
    rows = {"image": lab.images, "next": lab.others, "pasted": pasted, "transferred": result}
    caption = (
        f"LR-PSNR to the image: {lab.low_res_psnr(pasted, lab.images):.2f} pasted, "
        f"{lab.low_res_psnr(result, lab.images):.2f} transferred"
    )
    return drawing(rows, caption)


def harmonization(lab: Lab) -> Drawing:
    """The region of the next image, with the texture that the flow expects there."""
    pasted = torch.where(lab.mask, lab.others, lab.images)
    result = space.harmonized(
        lab.flow, pasted, lab.reduce, lab.mask, lab.temperature, lab.generator()
    )
    rows = {"image": lab.images, "pasted": pasted, "harmonised": result}
    caption = (
        f"LR-PSNR to the composite: {lab.low_res_psnr(result, pasted):.2f}; "
        f"PSNR to it: {lab.psnr(result, pasted):.2f}"
    )
    return drawing(rows, caption)


def style(lab: Lab) -> Drawing:
    """The low-resolution images with the latents of the next image."""
    result = space.styled(lab.flow, lab.others, lab.reduce(lab.others), lab.reduce(lab.images))
    rows = {
        "bicubic": lab.bicubic(lab.images),
        "next": lab.others,
        "styled": result,
        "image": lab.images,
    }
    return drawing(rows, f"LR-PSNR to the image: {lab.low_res_psnr(result, lab.images):.2f}")


PICTURES = {
    "restoration": restoration,
    "resampling": resampling,
    "transfer": transfer,
    "harmonization": harmonization,
    "style": style,
}


def drawing(rows: dict[str, Tensor], caption: str) -> Drawing:
    return Drawing([row.cpu() for row in rows.values()], list(rows), caption)


def framed(images: Tensor, mask: Tensor) -> Tensor:
    """The images with a frame, one pixel wide, inside of the border of the region."""
    inner = -torch.nn.functional.max_pool2d(-mask.to(images), 3, stride=1, padding=1)
    is_frame = mask & (inner == 0)
    colour = images.new_tensor(FRAME).view(1, 3, 1, 1)
    return torch.where(is_frame, colour, images)


# ---------------------------------------------------------------------- what is drawn


def chosen_images(options: DictConfig, multiple: int) -> Tensor:
    """The middle of n images, (N, 3, H, W) in [0, 1], of the largest size that all of them have.

    multiple: of the sides. ConfigError or ValueError, one line: an image is too small, or cannot
    be read.
    """
    if options.images:
        path = expand_home("images", options.images)
        paths = [path] if path.is_file() else find_images(path)
        arrays = [read_whole(each, 3) for each in paths[: options.n]]
        names = [str(each) for each in paths]
    else:
        arrays = [photo.transpose(2, 0, 1) for photo in photographs()[: options.n]]
        names = ["a photograph"] * len(arrays)
    sides = [min(options.side, *(array.shape[axis] for array in arrays)) for axis in (1, 2)]
    height, width = (side // multiple * multiple for side in sides)
    if not height or not width:
        smallest = min(range(len(arrays)), key=lambda i: min(arrays[i].shape[1:]))
        raise ConfigError(
            f"{names[smallest]} is {arrays[smallest].shape[1]}x{arrays[smallest].shape[2]} and "
            f"side={options.side}: this flow needs images of at least {multiple}x{multiple} pixels"
        )
    parts = []
    for array in arrays:
        top = (array.shape[1] - height) // 2
        left = (array.shape[2] - width) // 2
        part = array[:, top : top + height, left : left + width]
        parts.append(torch.from_numpy(part.copy()))
    return torch.stack(parts).float() / LEVELS


def region_of(options: DictConfig, size: tuple[int, int]) -> Tensor:
    """The mask of region=, (1, 1, H, W). ConfigError: the images, of `size`, have no such region.

    The default is the middle, of half the height and half the width.
    """
    height, width = size
    numbers = list(options.region) if isinstance(options.region, list | ListConfig) else []
    if options.region == []:
        numbers = [height // 4, width // 4, height // 2, width // 2]
    fits = len(numbers) == 4 and all(map(is_whole, numbers)) and min(numbers) >= 0
    if fits:
        top, left, rows, columns = numbers
        fits = 0 < rows <= height - top and 0 < columns <= width - left
    if not fits:
        raise ConfigError(
            f"region={options.region}: give [ROW,COLUMN,HEIGHT,WIDTH] within {height}x{width}, as "
            f"region=[0,0,{height // 2},{width // 2}]"
        )
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool)
    mask[..., top : top + rows, left : left + columns] = True
    return mask


def lab_of(name: str, options: DictConfig) -> Lab:
    """The flow and the images. ConfigError, one line: a mistake in the settings."""
    model = load_model(name)
    if not isinstance(model.flow, SRFlow):
        raise ConfigError(
            f"{name} is a {type(model.flow).__name__}: these pictures are of an SRFlow; "
            "python -m reproduce.pictures draws those of other flows"
        )
    flow = model.to(options.device).flow
    assert isinstance(flow, SRFlow)
    images = chosen_images(options, max(2**flow.n_levels, flow.scale))
    mask = region_of(options, (images.shape[2], images.shape[3]))
    others = images.roll(-1, 0)
    if len(images) == 1:
        others = images.flip(3)
    device = torch.device(options.device)
    temperature = options.temperature
    if temperature is None:
        temperature = model.config.eval.temperature
    check_temperature(temperature)
    return Lab(
        flow,
        images.to(device),
        others.to(device),
        mask.to(device),
        options.noise,
        temperature,
        options.seed,
    )


def read_options(words: list[str]) -> tuple[str, DictConfig]:
    """Read the command line: the model, then key=value. ConfigError: a mistake in them."""
    [name], options = read_words(words, [MODEL], DEFAULTS)
    at_least(options, n=1, side=1, noise=0, seed=0)
    options.device = device_of(options.device)
    folder = expand_home("the model", name)
    out = folder / "latent_space" if folder.is_dir() else "latent_space"
    options.out = str(expand_home("out", options.out or out))
    return name, options


@command
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Draw and write all pictures; one line and exit code 1 for a mistake."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return
    name, options = read_options(words)
    lab = lab_of(name, options)
    with evaluation(options.device), cached(lab.flow):
        for kind, draw in PICTURES.items():
            write(Path(options.out) / f"{kind}.png", draw(lab), N_BITS)


if __name__ == "__main__":
    main()
