"""NIQE: how far an image's statistics are from those of photographs (Mittal et al. 2013).

It needs no true image. The model of photographs is the authors' (release of 2012), from 125 of
them. Its parameters are not part of this repository: they come with the package of the extra
`naturalness`.

Other implementations give other values where an image has flat regions. There the difference of a
pixel and its neighbourhood is zero, but rounding makes it a tiny number of either sign, and NIQE
takes the mean over positive and over negative numbers. Here such a difference is zero. With that,
the published value of an image by the authors' code in MATLAB is met within 1e-6.
"""

import hashlib
import io
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import correlate1d
from scipy.special import gamma
from torch import Tensor

from lightning_modules.quality.super_resolution import luma

PACKAGE = "iqa-torch"  # has the parameters, and nothing of it is imported
FILE = "iqa/niqe/niqe_pris_params.npz"
SHA256 = "2a7c182a68c9e7f1b2e2e5ec723279d6f65d912b6fcaf37eb2bf03d7367c4296"
VERSION = "1.2.1"

BLOCK = 96  # the side of a block, in pixels; the parameters are of this size
LEAST_BLOCKS = 2  # for a covariance
RADIUS = 3  # of the Gaussian window, in pixels
SIGMA = 7 / 6  # its standard deviation
FLAT = 1e-9  # a smaller difference of grey levels is rounding: the true ones are far larger
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # right, below, and on both diagonals
FEATURES = 36  # of a block: 18 at each of two sizes
SHAPES = np.arange(0.2, 10.001, 0.001)  # of a generalized Gaussian, among which one is chosen
RATIOS = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))  # E|x|^2 / E[x^2]


class ParametersMissing(Exception):
    """The parameters of NIQE are not installed. The message is one line."""


class Photographs(NamedTuple):
    """The features of blocks of photographs: their mean, (36,), and covariance, (36, 36)."""

    mean: np.ndarray
    covariance: np.ndarray


class Niqe:
    """The distance of an image's blocks from those of photographs; lower is more natural.

    Each block of 96 x 96 pixels has 36 features: the shape and the widths of the distribution of
    its locally normalized luma, and of products of neighbours, at full and at half size. With the
    mean m and covariance S over blocks, and the photographs' m' and S',

      NIQE^2 = (m - m')^T ((S + S') / 2)^-1 (m - m').

    halve: the function that halves the sides of an image, (1, 1, H, W) float64: by bicubic
        interpolation with antialiasing, as MATLAB's imresize.
    Raises ParametersMissing.
    """

    def __init__(self, halve: Callable[[Tensor], Tensor]) -> None:
        self.halve = halve
        self.photographs = read_parameters()

    @property
    def protocol(self) -> dict[str, str | int]:
        """What the figure depends on."""
        return {
            "definition": "NIQE, release of 2012",
            "implementation": "paperflows",
            "luma": "ITU-R BT.601, 16 to 235, rounded",
            "crop": 0,
            "block": f"{BLOCK} x {BLOCK}",
            "parameters_sha256": SHA256,
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """NIQE of uint8 images, (B, 3, H, W): (B,) float64 on their device.

        Pixels at the right and at the lower border that do not fill a block are left out. Raises
        ValueError: the images are not uint8 of this shape, are too small, or one is flat.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images have to be uint8 (B, 3, H, W), but are {images.dtype} "
                f"{tuple(images.shape)}"
            )
        height = images.shape[2]
        width = images.shape[3]
        if (height // BLOCK) * (width // BLOCK) < LEAST_BLOCKS:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for NIQE: give at least "
                f"{BLOCK} x {LEAST_BLOCKS * BLOCK}"
            )
        levels = (luma(images) + 0.5).floor().cpu()
        values = [self.of_luma(level) for level in levels.split(1)]
        return torch.tensor(values, dtype=torch.float64, device=images.device)

    def of_luma(self, levels: Tensor) -> float:
        """NIQE of one image by its luma, (1, 1, H, W) float64. Raises ValueError: it is flat."""
        rows = levels.shape[2] // BLOCK
        columns = levels.shape[3] // BLOCK
        whole = levels[:, :, : rows * BLOCK, : columns * BLOCK]
        half = self.halve(whole)
        features = np.hstack(
            [
                features_of(whole[0, 0].numpy(), BLOCK),
                features_of(half[0, 0].numpy(), BLOCK // 2),
            ]
        )
        complete = features[np.isfinite(features).all(1)]
        if len(complete) < LEAST_BLOCKS:
            raise ValueError(
                f"an image has fewer than {LEAST_BLOCKS} blocks with any texture, so NIQE has no "
                "covariance"
            )
        # As the authors do: of an incomplete block, the mean takes what there is, and the
        # covariance nothing.
        difference = np.nanmean(features, axis=0) - self.photographs.mean
        covariance = (np.cov(complete, rowvar=False) + self.photographs.covariance) / 2
        return math.sqrt(difference @ np.linalg.solve(covariance, difference))


def read_parameters() -> Photographs:
    """The published parameters, from the installed package's file. Raises ParametersMissing."""
    advice = f"run pip install {PACKAGE}=={VERSION}"
    try:
        path = metadata.distribution(PACKAGE).locate_file(FILE)
        content = Path(str(path)).read_bytes()
    except (metadata.PackageNotFoundError, OSError):
        raise ParametersMissing(f"the parameters of NIQE are not installed: {advice}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ParametersMissing(
            f"the file {FILE} of {PACKAGE} has the SHA-256 {found[:8]}, and the published one "
            f"{SHA256[:8]}: {advice}"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return Photographs(file["mu_pris_param"].reshape(FEATURES), file["cov_pris_param"])


def features_of(levels: np.ndarray, side: int) -> np.ndarray:
    """The features of each block of one image: (blocks, 18), with NaN where a block is flat.

    levels: the luma, (H, W) float64, of which H and W are multiples of `side`.
    """
    normalized = locally_normalized(levels)
    rows = np.split(normalized, levels.shape[0] // side)
    blocks = [block for row in rows for block in np.split(row, levels.shape[1] // side, axis=1)]
    return np.array([features_of_block(block) for block in blocks])


def locally_normalized(levels: np.ndarray) -> np.ndarray:
    """(x - mean) / (deviation + 1) by a Gaussian window of 7 x 7 pixels; a border is repeated."""
    mean = smoothed(levels)
    deviation = np.sqrt(np.abs(smoothed(levels**2) - mean**2))
    difference = levels - mean
    difference[np.abs(difference) < FLAT] = 0
    return difference / (deviation + 1)


def smoothed(levels: np.ndarray) -> np.ndarray:
    """An image, (H, W), smoothed by the Gaussian window."""
    offsets = np.arange(-RADIUS, RADIUS + 1)
    window = np.exp(-(offsets**2) / (2 * SIGMA**2))
    window /= window.sum()
    along = correlate1d(levels, window, axis=0, mode="nearest")
    return correlate1d(along, window, axis=1, mode="nearest")


def features_of_block(block: np.ndarray) -> list[float]:
    """The 18 features of a block of normalized luma at one size.

    A neighbour beyond the block is the pixel at its opposite side, as in the authors' code.
    """
    shape, left, right = generalized_gaussian(block)
    features = [shape, (left + right) / 2]
    for neighbour in NEIGHBOURS:
        shape, left, right = generalized_gaussian(block * np.roll(block, neighbour, axis=(0, 1)))
        mean = (right - left) * gamma(2 / shape) / gamma(1 / shape)
        features += [shape, mean, left, right]
    return features


def generalized_gaussian(values: np.ndarray) -> tuple[float, float, float]:
    """The shape and both widths of an asymmetric generalized Gaussian, by its moments.

    A width is NaN if no value has its sign. Then the shape is the first of `SHAPES`, as it is in
    the authors' code. Equation 5 and following of the paper.
    """
    left = root_mean_square(values[values < 0])
    right = root_mean_square(values[values > 0])
    if math.isnan(left + right):
        shape = float(SHAPES[0])
    else:
        asymmetry = left / right
        ratio = np.abs(values).mean() ** 2 / (values**2).mean()
        ratio *= (asymmetry**3 + 1) * (asymmetry + 1) / (asymmetry**2 + 1) ** 2
        shape = float(SHAPES[np.argmin((RATIOS - ratio) ** 2)])
    width = math.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * width, right * width


def root_mean_square(values: np.ndarray) -> float:
    """NaN if there are no values."""
    if not values.size:
        return math.nan
    return math.sqrt((values**2).mean())
