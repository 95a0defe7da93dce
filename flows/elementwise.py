"""Bijections that act on each dimension alone."""

import math

from torch import Tensor
from torch.nn import functional as F

from flows.base import Flow, no_log_det


class Shift(Flow):
    """y = x + offset; log_det is 0. Glow subtracts 1/2 from its data (authors' code).

    >>> import torch
    >>> Shift(-0.5)(torch.tensor([[0.5, 1.0]]))
    (tensor([[0.0000, 0.5000]]), tensor([0.]))
    """

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x + self.offset, no_log_det(x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z - self.offset, no_log_det(z)


class Logit(Flow):
    """y = logit(p), p = alpha + (1 - 2 alpha) x, for x in [0, 1] (Dinh et al. 2017, section 4.1).

    The paper prints logit(alpha + (1 - alpha) x), which is infinite at x = 1. The published numbers
    came from the authors' code, which is symmetric (`data_constraint` .9); it is followed here.
    dy/dx = (1 - 2 alpha) / (p (1 - p)), hence

        log_det = sum softplus(y) + softplus(-y) + ln(1 - 2 alpha)

    >>> import torch
    >>> y, log_det = Logit(alpha=0.05)(torch.tensor([[0.5]]))
    >>> y, log_det  # ln(4 * 0.9)
    (tensor([[0.]]), tensor([1.2809]))

    alpha: from 0 to less than 1/2, else ValueError.
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(
                f"flow.alpha={alpha} leaves no interval to take the logit on: "
                "give 0 to less than 0.5"
            )
        self.alpha = alpha

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = (self.alpha + (1 - 2 * self.alpha) * x).logit()
        return y, self._log_det(y)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (z.sigmoid() - self.alpha) / (1 - 2 * self.alpha), -self._log_det(z)

    def _log_det(self, y: Tensor) -> Tensor:
        return (F.softplus(y) + F.softplus(-y) + math.log(1 - 2 * self.alpha)).flatten(1).sum(1)
