"""Crops of the colour photographs that ship inside scikit-image and scikit-learn: real images without a download."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.dequantization import UniformDequantizer
from datamodules.images import ImageArray
from datamodules.stateless import StatelessDataModule

# Columns of every photograph, as fractions of its width: the splits share no pixel.
REGIONS = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}


def photographs() -> list[np.ndarray]:
    """Seven photographs, (H, W, 3) uint8, from 300x451 to 500x741."""
    import skimage.data
    import sklearn.datasets

    names = ("astronaut", "chelsea", "coffee", "rocket")
    photos = [getattr(skimage.data, name)() for name in names] + [
        skimage.data.stereo_motorcycle()[0]
    ]
    return photos + sklearn.datasets.load_sample_images().images


def region(photo: np.ndarray, split: str) -> np.ndarray:
    """The columns of a photograph that belong to a split."""
    start, stop = (round(f * photo.shape[1]) for f in REGIONS[split])
    return photo[:, start:stop]


class Crops(Dataset):
    """n crops an epoch, size x size, uniform over all positions; each is a function of (seed, epoch, index).

    Items are (crop, index), with `labels` (crop, index, number of the photograph).
    """

    def __init__(
        self, photos: list[np.ndarray], n: int, size: int, seed: int, hflip: bool, labels: bool
    ) -> None:
        self.photos, self.n, self.size, self.seed, self.hflip, self.labels = (
            photos,
            n,
            size,
            seed,
            hflip,
            labels,
        )
        self.positions = np.array(
            [(p.shape[0] - size + 1) * (p.shape[1] - size + 1) for p in photos]
        )
        self._epoch: tuple[int, np.ndarray | None, np.ndarray | None] = (-1, None, None)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | tuple[Tensor, int, int]:
        epoch, index = key
        if self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])
            self._epoch = (
                epoch,
                rng.integers(self.positions.sum(), size=self.n),
                rng.random(self.n) < 0.5,
            )
        position = self._epoch[1][index]
        number = int(np.searchsorted(self.positions.cumsum(), position, side="right"))
        photo = self.photos[number]
        row, column = divmod(
            int(position - self.positions[:number].sum()), photo.shape[1] - self.size + 1
        )
        crop = photo[row : row + self.size, column : column + self.size]
        if self.hflip and self._epoch[2][index]:
            crop = crop[:, ::-1]
        image = torch.from_numpy(crop.transpose(2, 0, 1).copy())
        return (image, index, number) if self.labels else (image, index)


class Photos(StatelessDataModule):
    """The embedded default: no download, no network; splits are disjoint regions of the same photographs.

    size: of a crop in pixels. n_train, n_val, n_test: crops an epoch; those for val and test are always the same.
    n_bits: the most significant ones are kept. labels: batches also hold which photograph a crop is of.
    """

    n_classes = 7
    class_names = ("astronaut", "cat", "coffee", "rocket", "motorcycle", "china", "flower")

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
        if min(n_val, n_test) < 0:
            raise ValueError(
                f"data.n_val={n_val}, data.n_test={n_test}: numbers of crops are not negative"
            )
        self.shape, self.n_bits, self.dequantizer = (
            (3, size, size),
            n_bits,
            UniformDequantizer(n_bits),
        )
        self.sizes = {"train": n_train, "val": n_val, "test": n_test}
        self.size, self.hflip, self.labels = size, hflip, labels

    def setup(self, stage: str | None = None) -> None:
        photos = [
            photo >> (8 - self.n_bits) for photo in photographs()
        ]  # crops and flips move pixels only
        widest = min(region(p, split).shape[1] for p in photos for split in REGIONS)
        if not 1 <= self.size <= widest:
            raise ValueError(
                f"data.size={self.size} does not fit the photographs' regions: give 1 to {widest}"
            )
        parts = {split: [region(p, split) for p in photos] for split in REGIONS}
        self.train = Crops(
            parts["train"], self.sizes["train"], self.size, self.seed, self.hflip, self.labels
        )
        self.val, self.test = (
            self._fixed(parts[split], self.sizes[split]) for split in ("val", "test")
        )

    def _fixed(self, photos: list[np.ndarray], n: int) -> ImageArray:
        crops = Crops(photos, n, self.size, seed=0, hflip=False, labels=True)
        items = [crops[0, i] for i in range(n)]
        images = np.array([image.numpy() for image, *_ in items], np.uint8).reshape(n, *self.shape)
        return ImageArray(images, labels=[number for *_, number in items] if self.labels else None)
