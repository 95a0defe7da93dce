"""Means over images."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


def image_mean() -> MeanMetric:
    """A mean over images, exact with uneven ranks (Lightning's `sync_dist` is not); never waits for the device."""
    return MeanMetric(nan_strategy="disable")


class FiniteMean(Metric):
    """A mean over those images whose value is finite; never waits for the device. NaN where there was none.

    torchmetrics' MeanMetric leaves NaN out only after asking the device, and without asking it ignores weights.
    """

    total: Tensor
    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("n", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """values: (B,), one an image."""
        finite = values.isfinite()
        self.total += values.where(finite, 0).sum()
        self.n += finite.sum()

    def compute(self) -> Tensor:
        return self.total / self.n
