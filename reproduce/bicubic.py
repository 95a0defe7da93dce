"""Measure bicubic interpolation as a super-resolution model, on sets of whole images.

python -m reproduce.bicubic root=data/sr sets=[Set5,BSD100] scale=4
python -m reproduce.bicubic root=data/sr scale=8 out=results/super_resolution/bicubic-x8.json

The model has no parameters, and its figures are published: this is a check of the metrics, and the
line that every super-resolution model has to be above. An image is cropped, right and below, to
multiples of the scale, reduced and enlarged again, as by MATLAB's imresize.

Sets are folders below the root: Set5, Set14, BSD100 (or BSDS500/val, which has the same images),
Kodak24, DIV2K_valid_HR, and any other folder of images by its name. The table that is printed has
the published figures in brackets. docs/evaluation.md says how each metric is defined.

keys:
  root=data/sr       the folder with the folders of the sets
  sets=[]            the sets; empty: those of the five above that are there
  scale=4            a whole number of at least 2
  definitions=true   also measure by the other definitions of PSNR and SSIM that are in use, which
                     takes several times as long
  out=bicubic.json   the figures
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from omegaconf import ListConfig
from torch import Tensor
from torch.nn import functional as F

from datamodules.bicubic import downscale, upscale
from datamodules.checks import expand_home
from datamodules.evaluation_sets import KNOWN, EvaluationSet, Hash
from datamodules.image_files import check_folder, has_grey_levels, shown
from lightning_modules.callbacks.image_quality import facts_of
from lightning_modules.quality.super_resolution import (
    LEVELS,
    UNIFORM,
    low_res_psnr,
    luma,
    psnr_rgb,
    psnr_y,
    ssim_rgb_uniform,
    ssim_y_gaussian,
)
from reproduce.command import command
from reproduce.config import ConfigError, arguments
from reproduce.model_command import at_least, opening, progress_bar, read_words, repeatable
from reproduce.provenance import git_state
from reproduce.streams import say
from results import super_resolution
from results.blocks import markdown
from results.files import portable, write
from results.super_resolution import METRICS

DEFAULTS: dict[str, object] = {
    "root": "data/sr",
    "sets": [],
    "scale": 4,
    "definitions": True,
    "out": "bicubic.json",
}
PACKAGES = ("torch", "numpy", "pillow", "scikit-image")
RESIZING = "bicubic as MATLAB's imresize, rounded once"
Values = dict[str, dict[str, float]]  # a definition -> "psnr" and "ssim"


def protocol(scale: int) -> dict[str, dict[str, Any]]:
    """What each metric depends on."""
    facts = {f"test/{name}": facts_of(scale)[name] for name in METRICS}
    facts["test/lr_psnr"] |= {"reduction": RESIZING}
    return facts


def logged(image: Tensor, reference: Tensor, low_res: Tensor, scale: int) -> Values:
    """The figures of one image by the definitions that are logged: those of METRICS.

    image: the super-resolved one, reference: the true one, (1, 3, H, W) uint8. low_res: the
    reduced one.
    """
    reduce = functools.partial(downscale, scale=scale)
    return {
        "rgb": {
            "psnr": psnr_rgb(image, reference).item(),
            "ssim": ssim_rgb_uniform(image, reference).item(),
        },
        "y": {
            "psnr": psnr_y(image, reference, scale).item(),
            "ssim": ssim_y_gaussian(image, reference, scale).item(),
        },
        "lr": {"psnr": low_res_psnr(image, low_res, reduce).item()},
    }


def others(image: Tensor, reference: Tensor, low_res: Tensor, scale: int, is_grey: bool) -> Values:
    """The figures of one image by the other keys of `results.super_resolution.DEFINITIONS`.

    The arguments are those of `logged`. is_grey: whether the file of `reference` has grey levels.
    "rgb/pooled" is not here, since it is none of one image.
    """
    reduce = functools.partial(downscale, scale=scale)
    reduce_by_axis = functools.partial(downscale, scale=scale, rounding="axis")
    reduce_unmirrored = functools.partial(unmirrored, scale=scale)
    low_res_by_axis = reduce_by_axis(reference)
    by_axis = upscale(low_res_by_axis, scale, rounding="axis")
    floored = upscale(low_res.double(), scale).floor().clamp(0, LEVELS).to(torch.uint8)
    inner = functools.partial(within, border=scale)
    y = inner(luma(image))
    true_y = inner(luma(reference))
    matlab = rounded_half_up(own_luma(by_axis, is_grey))
    true_matlab = rounded_half_up(own_luma(reference, is_grey))
    luma_first = rounded_half_up(upscale(downscale(true_matlab, scale), scale))
    return {
        "rgb/floor": compare(floored, reference, gaussian=False),
        "rgb/axis": compare(by_axis, reference, gaussian=False),
        "rgb/gaussian": compare(inner(image), inner(reference)),
        "y/whole": compare(luma(image), luma(reference)),
        "y/uniform": compare(y, true_y, gaussian=False),
        "y/grey": compare(inner(own_luma(image, is_grey)), inner(own_luma(reference, is_grey))),
        "y/matlab": compare(inner(matlab), inner(true_matlab)),
        "y/luma_first": compare(inner(luma_first), inner(true_matlab)),
        "lr/floor": {"psnr": low_res_psnr(floored, low_res, reduce).item()},
        "lr/axis": {"psnr": low_res_psnr(by_axis, low_res_by_axis, reduce_by_axis).item()},
        "lr/unmirrored": {"psnr": low_res_psnr(image, low_res, reduce_unmirrored).item()},
    }


def own_luma(images: Tensor, is_grey: bool) -> Tensor:
    """The luma of images in colour, and the levels of grey ones: (B, 1, H, W), float64."""
    if is_grey:
        return images[:, :1].double()
    return luma(images)


def rounded_half_up(values: Tensor) -> Tensor:
    """Values as grey levels, as MATLAB rounds: float64, from 0 to 255."""
    return (values + 0.5).floor().clamp(0, LEVELS)


def within(images: Tensor, border: int) -> Tensor:
    """Images (B, C, H, W) without a border of some pixels."""
    return images[:, :, border:-border, border:-border]


def unmirrored(images: Tensor, scale: int) -> Tensor:
    """uint8 images reduced by PyTorch's antialiased filter alone."""
    size = (images.shape[2] // scale, images.shape[3] // scale)
    values = F.interpolate(images.double(), size, mode="bicubic", antialias=True)
    return rounded_half_up(values).to(torch.uint8)


def compare(image: Tensor, reference: Tensor, gaussian: bool = True) -> dict[str, float]:
    """PSNR and SSIM of one image, (1, C, H, W), by scikit-image, with grey levels to 255.

    gaussian: the window of SSIM as in `ssim_y_gaussian`; else as in `ssim_rgb_uniform`.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    arrays = (reference[0].double().numpy(), image[0].double().numpy())
    settings: dict[str, float] = {"win_size": UNIFORM}
    if gaussian:
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    with np.errstate(divide="ignore"):  # equal images: the PSNR is infinite
        psnr = peak_signal_noise_ratio(*arrays, data_range=LEVELS)
    return {
        "psnr": float(psnr),
        "ssim": float(
            structural_similarity(*arrays, channel_axis=0, data_range=LEVELS, **settings)
        ),
    }


def measure(images: EvaluationSet, definitions: bool, bar: Tqdm) -> dict[str, object]:
    """The figures of a set as its part of the file. definitions: whether by all definitions.

    ValueError, one line: an image cannot be read or is too small.
    """
    scale = images.scale
    values: list[Values] = []
    squares = 0.0
    n_values = 0
    digest = Hash()
    for path, reference in zip(images.paths, images, strict=True):
        digest.add(reference)
        reference = reference[None]
        low_res = downscale(reference, scale)
        image = upscale(low_res, scale)
        try:
            one = logged(image, reference, low_res, scale)
        except ValueError as error:
            raise ValueError(
                f"{shown(path)} is too small for scale={scale} ({error}): take it away, or give a "
                "smaller scale="
            ) from error
        if definitions:
            one |= others(image, reference, low_res, scale, has_grey_levels(path))
        values.append(one)
        squares += (image.double() - reference.double()).square().sum().item()
        n_values += image.numel()
        bar.update()
    means = averaged(values)
    metrics = {
        "test/psnr": means["rgb"]["psnr"],
        "test/ssim": means["rgb"]["ssim"],
        "test/psnr_y": means["y"]["psnr"],
        "test/ssim_y": means["y"]["ssim"],
        "test/lr_psnr": means["lr"]["psnr"],
    }
    if definitions:
        pooled = math.inf if squares == 0 else 10 * math.log10(LEVELS**2 * n_values / squares)
        means["rgb/pooled"] = {"psnr": pooled}
    return {
        "images": len(values),
        "sha256": digest.digest(),
        "metrics": metrics,
        "definitions": means if definitions else {},
    }


def averaged(values: Sequence[Values]) -> Values:
    """The means over images.

    >>> averaged([{"rgb": {"psnr": 20.0}}, {"rgb": {"psnr": 30.0}}])
    {'rgb': {'psnr': 25.0}}
    """
    return {
        key: {name: math.fsum(one[key][name] for one in values) / len(values) for name in parts}
        for key, parts in values[0].items()
    }


def sets_of(root: Path, names: Sequence[str], scale: int) -> list[EvaluationSet]:
    """The sets to measure: those of some names, or those of KNOWN that are there.

    FileNotFoundError, ValueError or ConfigError, one line: a set cannot be used, or none is there.
    """
    try:
        check_folder(root)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}: give root=FOLDER, the folder with the sets' folders") from None
    if names:
        return [EvaluationSet(root, name, scale) for name in dict.fromkeys(names)]
    sets = []
    missing = []
    for name in KNOWN:
        try:
            sets.append(EvaluationSet(root, name, scale))
        except FileNotFoundError as error:
            missing.append(f"not measured: {error}")
    if not sets:
        raise ConfigError(
            f"root={root} has none of the folders {', '.join(KNOWN)}: give another root=, or "
            "sets=[FOLDER] for other folders in it"
        )
    for line in missing:
        print(line, file=sys.stderr)
    return sets


def names_of(value: object) -> list[str]:
    """The names in sets=, which may be a list, or one word with commas.

    >>> names_of("Set5,Set14"), names_of(["Set5"]), names_of(None), names_of(2020)
    (['Set5', 'Set14'], ['Set5'], [], ['2020'])
    """
    if value is None:
        return []
    if isinstance(value, list | ListConfig):
        return [str(name) for name in value]
    return [name for name in str(value).split(",") if name]


def check_out(path: Path) -> None:
    """ConfigError, one line: the file cannot be replaced, or is something else."""
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder: give a file, as out=bicubic.json")
    if path.exists():
        try:
            super_resolution.read(path)
        except ValueError as error:
            raise ConfigError(f"{path} is no file of this command: give another out=") from error


@command
def main(argv: list[str] | None = None) -> Mapping[str, object] | None:
    """Measure the sets, print the table, and return the content of the file."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return None
    _, options = read_words(words, [], DEFAULTS)
    at_least(options, scale=2)
    root = expand_home("root", options.root)
    out = expand_home("out", options.out)
    check_out(out)
    sets = sets_of(root, names_of(options.sets), options.scale)
    with opening(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    measured = {}
    with (
        repeatable("nothing was written; the same command starts again"),
        progress_bar(sum(map(len, sets)), "images") as bar,
    ):
        for images in sets:
            measured[images.name] = measure(images, options.definitions, bar)
    recorded_commit, dirty = git_state()
    content = portable(
        {
            "model": "bicubic",
            "scale": options.scale,
            "arguments": words,
            "sets": measured,
            "protocol": protocol(options.scale),
            "commit": recorded_commit,
            "dirty": dirty,
            "versions": {name: metadata.version(name) for name in PACKAGES},
        }
    )
    with opening(out):
        write(out, f"{json.dumps(content, indent=1)}\n")
    say(*markdown([super_resolution.figures([content])])[:-1], f"{out}: written")
    return content


if __name__ == "__main__":
    main()
