"""Means over images or other data."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


def image_mean() -> MeanMetric:
    """A mean over images that never waits for the device.

    It is exact even if ranks have unequal numbers of images; Lightning's `sync_dist` is not.

    >>> mean = image_mean()
    >>> mean.update(torch.tensor([1.0, 2.0]))
    >>> mean.update(torch.tensor([6.0]))
    >>> mean.compute().item()
    3.0
    """
    return MeanMetric(nan_strategy="disable")


class FiniteMean(Metric):
    """A mean over the images whose value is finite; NaN if there is none.

    It never waits for the device. torchmetrics' MeanMetric waits for it to leave out NaN, and with
    nan_strategy="disable", which does not wait, it ignores the weights that could leave it out.

    >>> mean = FiniteMean()
    >>> mean.update(torch.tensor([1.0, float("nan"), 3.0]))
    >>> mean.compute().item()
    2.0
    """

    total: Tensor
    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("n", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values, (B,), one for each image."""
        finite = values.isfinite()
        self.total += values.where(finite, 0).sum()
        self.n += finite.sum()

    def compute(self) -> Tensor:
        """The mean over all ranks, a scalar."""
        return self.total / self.n
