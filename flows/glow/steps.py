"""Steps of flow: what Glow repeats K times a level (Kingma & Dhariwal 2018, section 3, figure 2a)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from flows.base import Compose, Flow
from flows.caching import once
from flows.coupling import AdditiveCoupling, SigmoidCoupling
from flows.glow.conditioner import GlowConditioner, dtype_of_products
from flows.glow.step import GlowStep
from flows.linear import ChannelPermutation, InvertibleConv1x1, matrices, multiply, volume
from flows.normalization import ActNorm
from flows.recompute import recomputed
from flows.transforms import in_transform, traced


class Steps(Compose):
    """K times an actnorm, a permutation of the channels, a coupling: the map that `Compose` makes, in fewer operations.

    Actnorm and permutation are one matrix product, and W, s and b of all steps are made at once:

        y = W ((x + b) s) = (W s) x + W (b s),    log_det = H W (ln|det W| + sum(ln s))

    The third flow of a step may be any flow; the context goes to it alone. Where all of them are couplings of this
    house with a `GlowConditioner`, a step's backward pass is written by hand (`GlowStep`): couplings and networks are
    then not called as modules, and their hooks do not run. Other flows, and networks that `FlowModel.compile` has
    compiled, are called as they are.
    recompute: only the input of a step, and its scales unless compiled, are kept for the backward pass.
    """

    recompute = False
    by_hand = True

    def __init__(
        self, steps: Iterable[tuple[ActNorm, ChannelPermutation | InvertibleConv1x1, Flow]]
    ) -> None:
        super().__init__(layer for step in steps for layer in step)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        if torch.jit.is_tracing() and torch.is_grad_enabled():
            raise RuntimeError(
                "torch.jit.trace takes a Glow under torch.no_grad() alone: trace it there, or use torch.export.export"
            )
        weights, biases, log_dets = once(self, "maps", self._maps)
        total = volume(log_dets.sum(), x)
        couplings = self._couplings()
        maps = zip(weights.to(x.dtype).unbind(), biases.to(x.dtype).unbind(), strict=True)
        if (
            self.by_hand
            and not traced()
            and not in_transform()
            and all(map(_has_gradients_by_hand, couplings))
        ):
            dtype = dtype_of_products(x)
            folded = once(
                self, "networks", lambda: GlowConditioner.fold([c.conditioner for c in couplings])
            )
            with torch.autocast(x.device.type, enabled=False):
                for coupling, (weight, bias), net in zip(couplings, maps, folded, strict=True):
                    x, log_det = GlowStep.apply(
                        coupling, dtype, self.recompute, x, weight, bias, *net
                    )
                    total = total + log_det
        else:
            for coupling, (weight, bias) in zip(couplings, maps, strict=True):
                x, log_det = recomputed(
                    _step, coupling, x, weight, bias, context, on=self.recompute
                )
                total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
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
        biases = torch.stack([norm.bias for norm in norms]).flatten(1).double()
        log_scales = (
            ActNorm.LOG_SCALE_FACTOR
            * torch.stack([norm.log_scale for norm in norms]).flatten(1).double()
        )
        return weights, log_scales.exp(), biases, log_dets + log_scales.sum(-1)


def _has_gradients_by_hand(coupling: Flow) -> bool:
    """Whether `GlowStep` computes what the coupling does: exact types, since a subclass may compute something else."""
    return (
        type(coupling) in (AdditiveCoupling, SigmoidCoupling)
        and type(coupling.conditioner) is GlowConditioner
    )


def _step(
    coupling: Flow, x: Tensor, weight: Tensor, bias: Tensor, context=None
) -> tuple[Tensor, Tensor]:
    return coupling(multiply(weight, x, bias), context)
