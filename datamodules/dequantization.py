"""Dequantisation: real numbers from integers, since a flow models the density of real numbers."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.checks import is_whole


class Dequantizer(nn.Module, ABC):
    """Turns integers q into x in [0, 1), whose density bounds the probability of q from below.

        x = (q + u) / 2^n_bits,    u in [0, 1)^D,    u ~ r(u | q, context),
        log P(q) >= E[log p(x) - D n_bits ln 2 - log r(u | q, context)]

    Here p is the density of x in [0, 1]^D, so that log p(x) - D n_bits ln 2 is that of q + u (Theis
    et al. 2016; Ho et al. 2019, Flow++, who write q(u | x) for r). The parameters of a dequantiser,
    if it has any, belong to the objective that it is passed to: they are trained, clipped,
    averaged, saved and loaded together with the flow's.

    A subclass implements `forward` and declares two things:

    noise: which noise `forward` takes, "uniform" on [0, 1) or "normal". The caller draws it.
    kind: what the reported likelihood says about the integers. "exact": the noise is uniform, and
        the likelihood is the density of the dequantised data, which papers compare. "bound":
        r(u | q) is learned, and the likelihood is a variational bound. "noisy": q + u leaves the
        bin of q, and the likelihood is not a bound (`KINDS` in results/metrics.py).

    n_bits: the integers are 0 .. 2^n_bits - 1. Raises ValueError: it is not 1 to 8.
    """

    noise: Literal["uniform", "normal"] = "uniform"
    kind: str = "exact"

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        if not is_whole(n_bits) or not 1 <= n_bits <= 8:
            raise ValueError(f"data.n_bits={n_bits} does not fit 8-bit integers: give 1 to 8")
        self.n_bits = n_bits

    @abstractmethod
    def forward(
        self, q: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x and log_weight, both in the dtype of the noise, even under autocast.

        q: (B, *shape), uint8. noise: (B, *shape), floating point. context: what the flow is
        conditioned on, (B, ...), or None.

        x: (B, *shape), in [0, 1). log_weight: (B,), -log r(u | q, context) in nats, where
        u = 2^n_bits x - q; 0 for uniform noise. The bits per dimension are then
        n_bits - (log p(x) + log_weight) / (D ln 2).
        """

    def initialize(self, q: Tensor, noise: Tensor, context: Tensor | None = None) -> None:
        """Set the parts that depend on data (`ActNorm`) from a first batch, if there are any.

        The arguments are those of `forward`.
        """


class UniformDequantizer(Dequantizer):
    """Adds uniform noise: x = (q + u) / 2^n_bits with u ~ U[0, 1).

    Uria et al. 2013; Theis et al. 2016.

    >>> q = torch.tensor([0, 1, 255], dtype=torch.uint8)
    >>> x, log_weight = UniformDequantizer(n_bits=8)(q, noise=torch.tensor([0.0, 0.5, 0.75]))
    >>> (256 * x).tolist()
    [0.0, 1.5, 255.75]
    >>> log_weight.tolist()
    [0.0, 0.0, 0.0]
    """

    def forward(
        self, q: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return x and zeros; the arguments are those of `Dequantizer.forward`, noise is u."""
        x = below_one((q.to(noise.dtype) + noise) / 2**self.n_bits)
        return x, noise.new_zeros(len(q))


def below_one(x: Tensor) -> Tensor:
    """Return x with every 1 replaced by the largest number below it.

    float32 rounds 255 + u up to 256 for about one u in 2^17.
    """
    return x.clamp(max=1 - torch.finfo(x.dtype).eps / 2)
