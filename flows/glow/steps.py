"""The K steps of flow in a level of Glow (section 3, figure 2a)."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from flows.base import Compose, Flow
from flows.caching import once
from flows.coupling import AdditiveCoupling
from flows.glow.conditioner import GlowConditioner, dtype_of_products
from flows.glow.step import GlowStep, has_gradients_by_hand, network
from flows.linear import ChannelPermutation, InvertibleConv1x1, matrices, multiply, volume
from flows.normalization import ActNorm
from flows.recompute import recomputed
from flows.transforms import in_trace, in_transform

# An actnorm, a permutation of the channels, a coupling.
Step = tuple[ActNorm, ChannelPermutation | InvertibleConv1x1, Flow]


class Steps(Compose):
    """K steps, each an actnorm, a permutation of the channels and a coupling.

    The map is that of `Compose` with these layers, in fewer operations. Actnorm and permutation are
    one matrix product, and the W, s and b of all steps are computed together:

        y = W ((x + b) s) = (W s) x + W (b s),    log_det = height width (ln|det W| + sum(ln s))

    The third flow of a step may be any flow; only it gets the context. If all of them are an
    `AdditiveCoupling` or a `SigmoidCoupling` with a `GlowConditioner`, the backward pass of a step
    is written by hand (`GlowStep`). Couplings and networks are then not called as modules, so their
    hooks do not run. Other flows, and networks that `FlowModel.compile` has compiled, are called.

    If the attribute `recompute` is true, a step keeps only its input for the backward pass (and,
    unless it is compiled, the scales of its coupling).

    >>> from flows.coupling import SigmoidCoupling
    >>> coupling = SigmoidCoupling(GlowConditioner(2, 4, hidden_channels=8, edges=True))
    >>> steps = Steps([(ActNorm(4), InvertibleConv1x1(4), coupling)])
    >>> y, log_det = steps(torch.rand(2, 4, 6, 6))
    >>> y.shape, log_det.shape
    (torch.Size([2, 4, 6, 6]), torch.Size([2]))
    """

    recompute = False
    by_hand = True

    def __init__(self, steps: Iterable[Step]) -> None:
        super().__init__(layer for step in steps for layer in step)
        factors = {cast(ActNorm, norm).log_scale_factor for norm in list(self.layers)[::3]}
        if len(factors) != 1:
            raise ValueError(f"all actnorms of Steps need one log_scale_factor, not {factors}")
        (self._log_scale_factor,) = factors

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.jit.is_tracing() and torch.is_grad_enabled():
            raise RuntimeError(
                "torch.jit.trace can trace a Glow only under torch.no_grad(): "
                "trace it there, or use torch.export.export"
            )
        weights, biases, log_dets = once(self, "maps", self._maps)
        maps = list(zip(weights.to(x.dtype).unbind(), biases.to(x.dtype).unbind(), strict=True))
        total = volume(log_dets.sum(), x)
        couplings = self._couplings()
        by_hand = self.by_hand and not in_trace() and not in_transform()
        if by_hand and all(map(self.has_gradients_by_hand, couplings)):
            return self._forward_by_hand(x, total, maps, context)
        for coupling, (weight, bias) in zip(couplings, maps, strict=True):
            x, log_det = recomputed(
                _step, coupling, x, weight, bias, context, enabled=self.recompute
            )
            total = total + log_det
        return x, total

    def has_gradients_by_hand(self, coupling: Flow) -> bool:
        """Whether `_forward_by_hand` can compute the third flow of a step."""
        return has_gradients_by_hand(coupling)

    def _forward_by_hand(
        self,
        x: Tensor,
        total: Tensor,
        maps: list[tuple[Tensor, Tensor]],
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the hand-written backward pass (`GlowStep`).

        total: the log_det of all actnorms and permutations. maps: the matrix and the bias of each
        step's actnorm and permutation.
        """
        dtype = dtype_of_products(x)
        couplings = cast(list[AdditiveCoupling], self._couplings())
        networks = once(
            self, "networks", lambda: GlowConditioner.fold(list(map(network, couplings)))
        )
        with torch.autocast(x.device.type, enabled=False):
            for coupling, (weight, bias), net in zip(couplings, maps, networks, strict=True):
                x, log_det = GlowStep.apply(coupling, dtype, self.recompute, x, weight, bias, *net)
                total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, biases, log_dets = once(self, "inverse maps", self._inverse_maps)
        total = volume(-log_dets.sum(), z)
        steps = zip(weights.to(z.dtype), biases.to(z.dtype), self._couplings(), strict=True)
        for weight, bias, coupling in reversed(list(steps)):
            z, log_det = coupling.inverse(z, context)
            z = multiply(weight, z, bias)
            total = total + log_det
        return z, total

    def _couplings(self) -> list[Flow]:
        return list(self.layers)[2::3]

    def _maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """W s, W (b s) and ln|det| per pixel of each step: (K, C, C), (K, C), (K,); float64."""
        weights, scales, biases, log_dets = self._parts()
        scaled_weights = weights * scales[:, None]
        return scaled_weights, (weights @ (biases * scales)[..., None])[..., 0], log_dets

    def _inverse_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """W^-1 / s and -b of the inverse x = (W^-1 y) / s - b, and the same ln|det| as `_maps`."""
        weights, scales, biases, log_dets = self._parts()
        return torch.linalg.inv(weights) / scales[..., None], -biases, log_dets

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W, s, b and ln|det| per pixel of each step: (K, C, C), (K, C), (K, C), (K,); float64."""
        layers = list(self.layers)
        norms = cast(list[ActNorm], layers[::3])
        permutations = cast(list[ChannelPermutation | InvertibleConv1x1], layers[1::3])
        weights, log_dets = matrices(permutations)
        biases = torch.stack([norm.bias for norm in norms]).flatten(1).double()
        log_scales = torch.stack([norm.log_scale for norm in norms]).flatten(1).double()
        log_scales = self._log_scale_factor * log_scales
        return weights, log_scales.exp(), biases, log_dets + log_scales.sum(-1)


def _step(
    coupling: Flow, x: Tensor, weight: Tensor, bias: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply the coupling to W x + b."""
    return coupling(multiply(weight, x, bias), context)
