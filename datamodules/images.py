"""Images in memory, augmented as functions of (seed, epoch, index)."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


class ImageArray(Dataset):
    """8-bit images (N, C, H, W), uint8; item (epoch, index) is (image of n_bits, index) or (image, index, label).

    hflip: half of the images are mirrored. shift: the largest shift along each axis, as a share of the side. n_bits:
    the most significant ones are kept, after the shift, which interpolates 8 bits (openai/glow). labels: (N,) or None.
    """

    def __init__(
        self,
        images: np.ndarray,
        seed: int = 0,
        hflip: bool = False,
        shift=0.0,
        n_bits=8,
        labels=None,
    ) -> None:
        self.images, self.seed, self.hflip, self.shift, self.n_bits = (
            images,
            seed,
            hflip,
            shift,
            n_bits,
        )
        self.labels = labels
        self._draws: tuple[int, np.ndarray | None, np.ndarray | None] = (-1, None, None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | tuple[Tensor, int, int]:
        epoch, index = key
        flips, shifts = self._drawn(epoch)
        image = shifted(self.images[index], shifts[index]) if self.shift else self.images[index]
        image = torch.from_numpy(image >> (8 - self.n_bits))
        image = image.flip(-1) if self.hflip and flips[index] else image
        return (image, index) if self.labels is None else (image, index, int(self.labels[index]))

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether to flip (N,) and how far to shift (N, 2) in pixels, from two streams: neither moves the other."""
        if self._draws[0] != epoch:
            flips = np.random.default_rng([self.seed, epoch, 1]).random(len(self)) < 0.5
            shares = np.random.default_rng([self.seed, epoch, 2]).uniform(
                -self.shift, self.shift, (len(self), 2)
            )
            self._draws = (epoch, flips, shares * self.images.shape[-2:])
        return self._draws[1:]


def shifted(image: np.ndarray, by: np.ndarray) -> np.ndarray:
    """An image (C, H, W) uint8, moved `by` pixels (down, right): linear interpolation, edges repeated, floor.

    As openai/glow's --dal 1 (keras 2.2.0, then `x_to_uint8`). Interpolation returns float32, as theirs does: the
    weights' sum may fall short of 1 by 1e-16, and floor would take a level off even areas in float64.
    """
    from scipy.ndimage import shift

    planes = [
        shift(plane, by, np.float32, order=1, mode="nearest") for plane in image
    ]  # half the time of one 3-D call
    return np.stack(planes).astype(np.uint8)  # floors what is not negative
