"""From integers to reals: a flow needs a density, and pixels have none."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UniformDequantizer:
    """x = (q + u) / 2^n_bits with u ~ U[0, 1) (Uria et al. 2013; Theis et al. 2016).

    A plain callable, so that a module may be deep-copied (EMA) without its data. Clamped below 1, since float32
    rounds 255 + u up to 256 about once in 2^17.
    """

    n_bits: int

    def __post_init__(self) -> None:
        if not isinstance(self.n_bits, int) or not 1 <= self.n_bits <= 8:
            raise ValueError(f"data.n_bits={self.n_bits} does not fit integers of 8 bits: give 1 to 8")

    def __call__(self, q: Tensor, u: Tensor) -> Tensor:
        """q: (B, C, H, W) uint8, 0 .. 2^n_bits - 1. u: the same shape, float, in [0, 1). Returns x in [0, 1)."""
        x = (q.to(u.dtype) + u) / 2**self.n_bits
        return x.clamp(max=1 - torch.finfo(u.dtype).eps / 2)
