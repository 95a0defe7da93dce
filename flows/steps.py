"""Steps of flow: what Glow repeats K times a level (Kingma & Dhariwal 2018, section 3, figure 2a)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from flows.base import Compose
from flows.caching import once
from flows.coupling import AdditiveCoupling
from flows.linear import ChannelPermutation, InvertibleConv1x1, matrices, multiply, volume
from flows.normalization import ActNorm
from flows.recompute import recomputed


class Steps(Compose):
    """K times an actnorm, a permutation of the channels, a coupling: the map that `Compose` makes, in fewer operations.

    Actnorm and permutation are one matrix product, and W, s and b of all steps are made at once:

        y = W ((x + b) s) = (W s) x + W (b s),    log_det = H W (ln|det W| + sum(ln s))

    So is, in `forward`, what the networks, `GlowConditioner`s of one shape, make of their actnorms (fold_together).
    recompute: of a step only its input, and what its network gave unless that is compiled, are kept for the backward
    pass (`flows/recompute.py`).
    """

    recompute = False
    fold_together = True

    def __init__(
        self, steps: Iterable[tuple[ActNorm, ChannelPermutation | InvertibleConv1x1, AdditiveCoupling]]
    ) -> None:
        super().__init__(layer for step in steps for layer in step)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        weights, biases, log_dets = once(self, "maps", self._maps)
        total = volume(log_dets.sum(), x)
        steps = zip(weights.to(x.dtype), biases.to(x.dtype), self._couplings(), self._folded(), strict=True)
        for weight, bias, coupling, folded in steps:
            x, log_det = recomputed(_step, coupling, x, weight, bias, folded, on=self.recompute)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        weights, biases, log_dets = once(self, "inverse maps", self._inverse_maps)
        total = volume(-log_dets.sum(), z)
        steps = zip(weights.to(z.dtype), biases.to(z.dtype), self._couplings(), strict=True)
        for weight, bias, coupling in reversed(list(steps)):
            z, log_det = coupling.inverse(z)
            z = multiply(weight, z, bias)
            total = total + log_det
        return z, total

    def _couplings(self) -> list[AdditiveCoupling]:
        return list(self.layers)[2::3]

    def _folded(self) -> list[tuple[Tensor, ...] | None]:
        """What the networks of all steps are given; nothing where it would be kept for the backward pass."""
        nets = [coupling.conditioner for coupling in self._couplings()]
        if self.recompute or not self.fold_together:
            return [None] * len(nets)
        return once(self, "networks", lambda: nets[0].fold(nets))

    def _maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """W s, W (b s) and ln|det| at a pixel of every step: (K, C, C), (K, C), (K,); float64."""
        weights, scales, biases, log_dets = self._parts()
        return weights * scales[:, None], (weights @ (biases * scales)[..., None])[..., 0], log_dets

    def _inverse_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """x = (W^-1 y) / s - b: W^-1 / s and -b; the log-determinants are those of `_maps`."""
        weights, scales, biases, log_dets = self._parts()
        return torch.linalg.inv(weights) / scales[..., None], -biases, log_dets

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norms, permutations = list(self.layers)[::3], list(self.layers)[1::3]
        weights, log_dets = matrices(permutations)
        biases = torch.stack([norm.bias.flatten() for norm in norms]).double()
        log_scales = ActNorm.LOG_SCALE_FACTOR * torch.stack([norm.log_scale.flatten() for norm in norms]).double()
        return weights, log_scales.exp(), biases, log_dets + log_scales.sum(-1)


def _step(coupling: AdditiveCoupling, x: Tensor, weight: Tensor, bias: Tensor, folded) -> tuple[Tensor, Tensor]:
    return coupling(multiply(weight, x, bias), folded=folded)
