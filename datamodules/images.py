"""Images whose augmentation is a function of (seed, epoch, index).

`ImageFiles` is the base class of the data sets that are read from official files.
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.checks import check_count, check_share, expand_home
from datamodules.dequantization import UniformDequantizer
from datamodules.samplers import check_batch_size
from datamodules.stateless import StatelessDataModule

SPLIT_SEED = 0  # the validation split is the same in every run, whatever the run's seed
Item = tuple[Tensor, int] | tuple[Tensor, int, int]  # image, index and, with labels, the label


class Draws(NamedTuple):
    """The random numbers of one epoch, for N images.

    flips: (N,) bool, whether an image is mirrored. shifts: (N, 2), in pixels down and to the right.
    """

    epoch: int
    flips: np.ndarray
    shifts: np.ndarray


class Images(Protocol):
    """N images, of which the item k is (C, H, W), uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int, /) -> np.ndarray: ...


class ImageArray(Dataset[Item]):
    """Images. The item of key (epoch, index) is (image, index), or (image, index, label).

    images: N images, (C, H, W), uint8: an array, or what reads them from a file. The image of an
        item is (C, H, W), uint8, from 0 to 2^n_bits - 1.
    seed: the seed of flips and shifts.
    hflip: whether half of the images are mirrored.
    shift: the largest shift along each axis, as a share of the side.
    n_bits: how many bits of a pixel are kept, the most significant ones. The others are dropped
        after the shift, which interpolates 8-bit values (openai/glow).
    labels: the classes, (N,), or None.
    """

    def __init__(
        self,
        images: Images,
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
        pixels = self._pixels(epoch, index)
        if self.shift:
            pixels = shift_image(pixels, draws.shifts[index])
        image = torch.from_numpy(pixels >> (8 - self.n_bits))
        if self.hflip and draws.flips[index]:
            image = image.flip(-1)
        if self.labels is None:
            return image, index
        return image, index, int(self.labels[index])

    def unaugmented(self) -> Self:
        """The same images without flips and shifts."""
        data = copy.copy(self)
        data.hflip = False
        data.shift = 0.0
        return data

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        """An image before it is shifted and mirrored, (C, H, W). It may depend on the epoch."""
        return self.images[index]

    def _draws_of(self, epoch: int) -> Draws:
        """The random numbers of an epoch: flips and shifts, each from its own generator."""
        if self._draws is None or self._draws.epoch != epoch:
            flips = np.random.default_rng([self.seed, epoch, 1]).random(len(self)) < 0.5
            shares = np.random.default_rng([self.seed, epoch, 2]).uniform(
                -self.shift, self.shift, (len(self), 2)
            )
            self._draws = Draws(epoch, flips, shares * self.images[0].shape[-2:])
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


class ImageFiles(StatelessDataModule):
    """The base class of labelled images that are read from official files into memory.

    A subclass declares `shape`, `n_images`, `n_classes` and `class_names`, obtains the files in
    `_obtain`, and reads them in `_read_images`.

    root: the folder that contains the files. `~` is the home folder.
    n_val: how many training images are held out for validation. This split is our own, since the
        data sets have none. 0 for a final run on all training images.
    hflip: whether half of the training images are mirrored.
    download: whether to fetch the official files where they are missing.
    n_bits: how many bits of a pixel are kept, the most significant ones.
    shift: the largest shift along each axis in training, as a share of the side (openai/glow,
        --dal 1: 0.1).
    labels: whether batches are (image, index, label), where the label is an index of `class_names`.
    The other arguments are those of `StatelessDataModule`. Raises ValueError: a value is out of
    its range.
    """

    n_images: int  # for training and validation
    n_bits: int

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        n_val: int,
        hflip: bool,
        download: bool,
        num_workers: int,
        micro_batch: int | None,
        seed: int,
        n_bits: int,
        shift: float,
        labels: bool,
    ) -> None:
        super().__init__(batch_size, micro_batch, num_workers, seed)
        self.dequantizer = UniformDequantizer(n_bits)
        check_share("data.shift", shift)
        check_batch_size(batch_size, self.n_images)
        check_count("data.n_val", n_val, least=0, most=self.n_images - batch_size)
        self.root = expand_home("data.root", root)
        self.n_val = n_val
        self.hflip = hflip
        self.download = download
        self.n_bits = n_bits
        self.shift = shift
        self.labels = labels

    @abstractmethod
    def _read_images(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The images of a split, "train" or "test", (N, C, H, W) uint8, and their classes, (N,).

        "train" also holds the images for validation. Raises FileNotFoundError: a file is missing.
        Raises ValueError: a file is damaged.
        """

    def _order(self, n: int) -> np.ndarray:
        """The numbers of the n training images, those for validation first, (n,)."""
        return np.random.default_rng(SPLIT_SEED).permutation(n)

    def setup(self, stage: str | None = None) -> None:
        """Read all images into memory, once.

        Raises FileNotFoundError: a file is missing. Raises ValueError: a file is damaged.
        """
        if hasattr(self, "test"):
            return
        self._raise_problems()
        images, labels = self._read_images("train")
        order = self._order(len(images))
        val = np.sort(order[: self.n_val])
        train = np.sort(order[self.n_val :])
        self.train = ImageArray(
            images[train],
            seed=self.seed,
            hflip=self.hflip,
            shift=self.shift,
            n_bits=self.n_bits,
            labels=self._labels_if_used(labels[train]),
        )
        self.val = self._evaluation_set(images[val], labels[val])
        self.test = self._evaluation_set(*self._read_images("test"))

    def _evaluation_set(self, images: np.ndarray, labels: np.ndarray) -> ImageArray:
        """A data set of images that are not augmented."""
        return ImageArray(images, n_bits=self.n_bits, labels=self._labels_if_used(labels))

    def _labels_if_used(self, labels: np.ndarray) -> np.ndarray | None:
        return labels if self.labels else None
