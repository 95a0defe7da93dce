"""Two moons: points in the plane whose entropy is known, about ln(2 pi) + 1/2 ln(2 pi e noise^2) nats."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.stateless import StatelessDataModule


class Points(Dataset):
    """Item (epoch, index) is (point, index)."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.points[key[1]], key[1]


class TwoMoons(StatelessDataModule):
    """scikit-learn's `make_moons` in raw coordinates, float32; the splits are drawn apart.

    noise: standard deviation around the two half circles of radius 1.
    """

    shape = (2,)

    def __init__(
        self,
        batch_size: int,
        noise: float = 0.05,
        n_train: int = 50_000,
        n_val: int = 5000,
        n_test: int = 10_000,
        num_workers: int = 0,
        micro_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, micro_batch, num_workers, seed)
        self.noise, self.sizes = noise, {"train": n_train, "val": n_val, "test": n_test}

    def setup(self, stage: str | None = None) -> None:
        from sklearn.datasets import make_moons

        for number, (split, n) in enumerate(self.sizes.items()):
            points, _ = make_moons(max(n, 1), noise=self.noise, random_state=3 * self.seed + number)
            setattr(self, split, Points(torch.from_numpy(points[:n]).float()))
