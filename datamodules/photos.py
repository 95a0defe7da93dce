"""Crops of the colour photographs that scikit-image and scikit-learn contain.

They are real images that need no download.
"""

import copy
from typing import NamedTuple, Self

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.checks import check_count, check_memory, is_whole
from datamodules.dequantization import UniformDequantizer
from datamodules.images import ImageArray, Item
from datamodules.samplers import check_batch_size
from datamodules.stateless import StatelessDataModule

# The columns of every photograph in each split, as fractions of its width. No pixel is in two.
REGIONS = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
LARGEST_SIZE = 67  # width in pixels of the narrowest region: the validation region of the cat
DRAW_BYTES = 32  # memory for a training crop: its place in the order, its position and its flip
NAMES = ("astronaut", "cat", "coffee", "rocket", "motorcycle", "china", "flower")


def photographs() -> list[np.ndarray]:
    """Read the seven photographs of NAMES: (H, W, 3), uint8, from 300x451 to 500x741."""
    import skimage.data
    import sklearn.datasets

    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos = [getattr(skimage.data, name)() for name in names]
    photos.append(skimage.data.stereo_motorcycle()[0])
    return photos + sklearn.datasets.load_sample_images().images


def region(photo: np.ndarray, split: str) -> np.ndarray:
    """The columns of a photograph (H, W, 3) that belong to a split, a key of REGIONS.

    >>> region(np.zeros((300, 100, 3)), "val").shape
    (300, 15, 3)
    """
    start, stop = (round(fraction * photo.shape[1]) for fraction in REGIONS[split])
    return photo[:, start:stop]


class Draws(NamedTuple):
    """The random numbers of one epoch, for n crops.

    positions: (n,), the position of each crop, as a number that counts all positions in all
    photographs. flips: (n,) bool, whether a crop is mirrored.
    """

    epoch: int
    positions: np.ndarray
    flips: np.ndarray


class Crops(Dataset[Item]):
    """n random crops per epoch, size x size, uniform over all positions in the photographs.

    The item of key (epoch, index) is (crop, index), or with `labels` (crop, index, number of the
    photograph). A crop, (3, size, size), uint8, is a function of (seed, epoch, index).

    photos: arrays (H, W, 3), uint8. hflip: whether half of the crops are mirrored.
    """

    def __init__(
        self, photos: list[np.ndarray], n: int, size: int, seed: int, hflip: bool, labels: bool
    ) -> None:
        self.photos = photos
        self.n = n
        self.size = size
        self.seed = seed
        self.hflip = hflip
        self.labels = labels
        self.positions = np.array(
            [(p.shape[0] - size + 1) * (p.shape[1] - size + 1) for p in photos]
        )
        self._draws: Draws | None = None

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        draws = self._draws_of(epoch)
        number, row, column = self._place(int(draws.positions[index]))
        crop = self.photos[number][row : row + self.size, column : column + self.size]
        if self.hflip and draws.flips[index]:
            crop = crop[:, ::-1]
        image = torch.from_numpy(crop.transpose(2, 0, 1).copy())
        if self.labels:
            return image, index, number
        return image, index

    def unaugmented(self) -> Self:
        """The same crops, none of which is mirrored."""
        data = copy.copy(self)
        data.hflip = False
        return data

    def _draws_of(self, epoch: int) -> Draws:
        if self._draws is None or self._draws.epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])
            positions = rng.integers(self.positions.sum(), size=self.n)
            self._draws = Draws(epoch, positions, rng.random(self.n) < 0.5)
        return self._draws

    def _place(self, position: int) -> tuple[int, int, int]:
        """The number of the photograph, the row and the column of a position."""
        number = int(np.searchsorted(self.positions.cumsum(), position, side="right"))
        columns = self.photos[number].shape[1] - self.size + 1
        row, column = divmod(position - int(self.positions[:number].sum()), columns)
        return number, row, column


class Photos(StatelessDataModule):
    """Random crops of seven photographs; the splits are disjoint regions of the same photographs.

    size: the side of a crop, in pixels.
    n_train, n_val, n_test: the numbers of crops per epoch. The crops for validation and test are
        the same in every epoch and for every seed.
    hflip: whether half of the training crops are mirrored.
    n_bits: how many bits of a pixel are kept, the most significant ones.
    labels: whether batches also contain the number of the photograph of each crop.
    The other arguments are those of `StatelessDataModule`. Raises ValueError: a value is out of
    its range.
    """

    n_bits: int
    n_classes = len(NAMES)
    class_names = NAMES

    def __init__(
        self,
        batch_size: int,
        size: int = 32,
        n_train: int = 10_000,
        n_val: int = 500,
        n_test: int = 1000,
        hflip: bool = True,
        num_workers: int = 0,
        micro_batch: int | None = None,
        seed: int = 0,
        n_bits: int = 8,
        labels: bool = False,
    ) -> None:
        super().__init__(batch_size, micro_batch, num_workers, seed)
        self.dequantizer = UniformDequantizer(n_bits)
        check_size(size, LARGEST_SIZE)
        check_count("data.n_train", n_train, least=1)
        check_count("data.n_val", n_val, least=0)
        check_count("data.n_test", n_test, least=1)
        crop_bytes = 3 * size**2
        check_memory(
            f"data.n_train={n_train} data.n_val={n_val} data.n_test={n_test}",
            DRAW_BYTES * n_train + 2 * crop_bytes * (n_val + n_test),
        )
        check_batch_size(batch_size, n_train)
        self.shape = (3, size, size)
        self.n_bits = n_bits
        self.sizes = {"train": n_train, "val": n_val, "test": n_test}
        self.size = size
        self.hflip = hflip
        self.labels = labels

    def setup(self, stage: str | None = None) -> None:
        """Read the photographs, and cut out the crops of validation and test."""
        # Bits can be dropped before cropping, since crops and flips do not change any pixel.
        photos = [photo >> (8 - self.n_bits) for photo in photographs()]
        parts = {split: [region(photo, split) for photo in photos] for split in REGIONS}
        check_size(self.size, min(part.shape[1] for split in REGIONS for part in parts[split]))
        self.train = Crops(
            parts["train"], self.sizes["train"], self.size, self.seed, self.hflip, self.labels
        )
        self.val = self._evaluation_set(parts["val"], self.sizes["val"])
        self.test = self._evaluation_set(parts["test"], self.sizes["test"])

    def _evaluation_set(self, photos: list[np.ndarray], n: int) -> ImageArray:
        """A data set in memory of n crops of `photos`, the same for every seed."""
        crops = Crops(photos, n, self.size, seed=0, hflip=False, labels=True)
        images = np.empty((n, *self.shape), np.uint8)
        numbers = np.empty(n, int)
        for index in range(n):
            image, _, *labels = crops[0, index]
            images[index] = image.numpy()
            numbers[index] = labels[0]
        return ImageArray(images, labels=numbers if self.labels else None)


def check_size(size: int, largest: int) -> None:
    """Refuse a crop size that does not fit the regions of the photographs. Raises ValueError."""
    if not is_whole(size) or not 1 <= size <= largest:
        raise ValueError(
            f"data.size={size} does not fit the regions of the photographs: give 1 to {largest}"
        )
