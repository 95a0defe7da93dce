"""Two moons: points in the plane, whose entropy is about ln(2 pi) + 1/2 ln(2 pi e noise^2) nats."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.checks import check_count, check_deviation, check_memory
from datamodules.samplers import check_batch_size
from datamodules.stateless import StatelessDataModule

POINT_BYTES = 64  # memory for a point while it is made, in float64, with its noise and copies


class Points(Dataset[tuple[Tensor, int]]):
    """Points in the plane, (N, 2). The item of key (epoch, index) is (point, index)."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        _, index = key
        return self.points[index], index


class TwoMoons(StatelessDataModule):
    """Points from scikit-learn's `make_moons`, not rescaled, float32.

    noise: the standard deviation around the two half circles of radius 1.
    n_train, n_val, n_test: the numbers of points; the splits are drawn independently.
    The other arguments are those of `StatelessDataModule`. Raises ValueError: a value is out of
    its range.
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
        check_deviation("data.noise", noise)
        check_count("data.n_train", n_train, least=1)
        check_count("data.n_val", n_val, least=0)
        check_count("data.n_test", n_test, least=1)
        check_memory(
            f"data.n_train={n_train} data.n_val={n_val} data.n_test={n_test}",
            POINT_BYTES * (n_train + n_val + n_test),
        )
        check_batch_size(batch_size, n_train)
        self.noise = noise
        self.sizes = {"train": n_train, "val": n_val, "test": n_test}

    def setup(self, stage: str | None = None) -> None:
        """Draw the three splits, each from a seed of its own."""
        from sklearn.datasets import make_moons

        for number, (split, n) in enumerate(self.sizes.items()):
            seed = (3 * self.seed + number) % 2**32  # scikit-learn takes no larger seeds
            points, _ = make_moons(max(n, 1), noise=self.noise, random_state=seed)
            setattr(self, split, Points(torch.from_numpy(points[:n]).float()))
