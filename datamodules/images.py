"""Images in memory, whose augmentation is a function of (seed, epoch, index)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Item = tuple[Tensor, int] | tuple[Tensor, int, int]  # image, index and, with labels, the label


class Draws(NamedTuple):
    """The random numbers of one epoch, for N images.

    flips: (N,) bool, whether an image is mirrored. shifts: (N, 2), in pixels down and to the right.
    """

    epoch: int
    flips: np.ndarray
    shifts: np.ndarray


class ImageArray(Dataset[Item]):
    """Images in memory. The item of key (epoch, index) is (image, index), or (image, index, label).

    images: (N, C, H, W), uint8. The image of an item is (C, H, W), uint8, from 0 to 2^n_bits - 1.
    seed: the seed of flips and shifts.
    hflip: whether half of the images are mirrored.
    shift: the largest shift along each axis, as a share of the side.
    n_bits: how many bits of a pixel are kept, the most significant ones. The others are dropped
        after the shift, which interpolates 8-bit values (openai/glow).
    labels: the classes, (N,), or None.
    """

    def __init__(
        self,
        images: np.ndarray,
        seed: int = 0,
        hflip: bool = False,
        shift: float = 0.0,
        n_bits: int = 8,
        labels: np.ndarray | Sequence[int] | None = None,
    ) -> None:
        self.images = images
        self.seed = seed
        self.hflip = hflip
        self.shift = shift
        self.n_bits = n_bits
        self.labels = labels
        self._draws: Draws | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        draws = self._draws_of(epoch)
        pixels = self.images[index]
        if self.shift:
            pixels = shift_image(pixels, draws.shifts[index])
        image = torch.from_numpy(pixels >> (8 - self.n_bits))
        if self.hflip and draws.flips[index]:
            image = image.flip(-1)
        if self.labels is None:
            return image, index
        return image, index, int(self.labels[index])

    def _draws_of(self, epoch: int) -> Draws:
        """The random numbers of an epoch: flips and shifts, each from its own generator."""
        if self._draws is None or self._draws.epoch != epoch:
            flips = np.random.default_rng([self.seed, epoch, 1]).random(len(self)) < 0.5
            shares = np.random.default_rng([self.seed, epoch, 2]).uniform(
                -self.shift, self.shift, (len(self), 2)
            )
            self._draws = Draws(epoch, flips, shares * self.images.shape[-2:])
        return self._draws


def shift_image(image: np.ndarray, offset: np.ndarray | tuple[float, float]) -> np.ndarray:
    """Shift an image, (C, H, W) uint8, by `offset` = (down, right) pixels.

    As with `--dal 1` of openai/glow (keras 2.2.0, then `x_to_uint8`), values are interpolated
    linearly, the border is repeated, and fractions are cut off. The interpolation returns float32,
    as theirs does: in float64 the interpolation weights may add up to 1 - 1e-16, and cutting off
    fractions would then lower uniform areas by one level.

    >>> shift_image(np.array([[[0, 100, 200]]], dtype=np.uint8), offset=(0, 1)).tolist()
    [[[0, 0, 100]]]
    """
    from scipy.ndimage import shift

    # Shifting each channel separately takes half the time of one three-dimensional call.
    channels = [shift(channel, offset, np.float32, order=1, mode="nearest") for channel in image]
    return np.stack(channels).astype(np.uint8)
