"""From integers to reals: a flow needs a density, and pixels have none."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Dequantizer(nn.Module, ABC):
    """Integers q become x in [0, 1), whose density bounds the probability of q from below.

        x = (q + u) / 2^n_bits, u ~ q(u | q, context),    log P(q) >= E[log p(x) - log q(u | q, context)]

    with p the density of q + u, in units of a bin (Theis et al. 2016; Ho et al. 2019, Flow++). The
    module that a dequantiser is handed to owns its parameters: they are trained, clipped, averaged, saved and loaded
    with the flow's. Subclasses implement `forward`, and declare two things.

    noise: "uniform" on [0, 1) or "normal": what `forward` wants, drawn by whoever calls it.
    kind: what a flow's figure says of the integers. "exact": uniform noise, the density is that of the data as they
    are compared everywhere. "bound": q(u | q) is learned, and the figure a variational bound. "noisy": the noise
    leaves the bin, and the figure bounds nothing (`KINDS` in results/metrics.py).

    n_bits: the integers are 0 .. 2^n_bits - 1. ValueError: not 1 to 8.
    """

    noise = "uniform"
    kind = "exact"

    def __init__(self, n_bits: int) -> None:
        super().__init__()
        if not isinstance(n_bits, int) or not 1 <= n_bits <= 8:
            raise ValueError(f"data.n_bits={n_bits} does not fit integers of 8 bits: give 1 to 8")
        self.n_bits = n_bits

    @abstractmethod
    def forward(self, q: Tensor, noise: Tensor, context=None) -> tuple[Tensor, Tensor]:
        """x and log_weight, both of the noise's dtype, also where training autocasts what a network computes.

        q: (B, *shape) uint8. noise: (B, *shape), float. context: what the flow is conditioned on, or None.
        x: (B, *shape) in [0, 1), of the noise's dtype. log_weight: (B,), -log q(x - q | q, context) in nats, the base
        density of the noise included and with x - q in units of a bin: 0 for uniform noise. log p(x) + log_weight is
        then the integrand of the bound, of which n_bits - (log p(x) + log_weight) / (D ln 2) are bits per dimension.
        """

    def initialize(self, q: Tensor, noise: Tensor, context=None) -> None:
        """Set what depends on data (`ActNorm`) from a first batch, where there is such a part."""


class UniformDequantizer(Dequantizer):
    """x = (q + u) / 2^n_bits with u ~ U[0, 1) (Uria et al. 2013; Theis et al. 2016)."""

    def forward(self, q: Tensor, noise: Tensor, context=None) -> tuple[Tensor, Tensor]:
        """As `Dequantizer.forward`; noise is u, and log_weight is 0."""
        return below_one((q.to(noise.dtype) + noise) / 2**self.n_bits), noise.new_zeros(len(q))


def below_one(x: Tensor) -> Tensor:
    """x with 1 as the largest number below it: float32 rounds 255 + u up to 256 about once in 2^17."""
    return x.clamp(max=1 - torch.finfo(x.dtype).eps / 2)
