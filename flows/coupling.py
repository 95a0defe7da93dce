"""Couplings: one part of x is kept and decides how the other part is scaled and shifted."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import Flow, no_log_det
from flows.masks import as_mask
from flows.recompute import recomputed


class AffineCoupling(Flow):
    """y = (x + t) exp(s) on the changed part, y = x on the kept one; s = a tanh(raw), t and raw from the kept part.

    Dinh et al. 2017, section 3.2, write x exp(s) + t; the authors' code shifts first, a reparametrisation of the
    same maps (t exp(s) for t), and wins. `log_scale_factor` is a, one learned scalar a coupling.

    conditioner: maps the kept part and the context to (shift, raw log-scale). norm: an optional flow on the changed
    part, after the affine map (`CouplingBatchNorm`). recompute: the conditioner keeps only its inputs for the backward
    pass.
    """

    recompute = False

    def __init__(
        self, conditioner: nn.Module, log_scale_factor: float, norm: Flow | None = None
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.log_scale_factor = nn.Parameter(torch.tensor(log_scale_factor))
        self.norm = norm

    def _shift_and_log_scale(self, kept: Tensor, context=None) -> tuple[Tensor, Tensor]:
        shift, raw = recomputed(
            nn.Module.__call__, self.conditioner, kept, context, on=self.recompute
        )
        return shift, self.log_scale_factor * torch.tanh(raw)

    def _forward(
        self, x: Tensor, shift: Tensor, log_scale: Tensor, context=None
    ) -> tuple[Tensor, Tensor]:
        y, log_det = (x + shift) * torch.exp(log_scale), log_scale.flatten(1).sum(1)
        if self.norm is None:
            return y, log_det
        y, norm_log_det = self.norm(y, context)
        return y, log_det + norm_log_det

    def _inverse(
        self, y: Tensor, shift: Tensor, log_scale: Tensor, context=None
    ) -> tuple[Tensor, Tensor]:
        log_det = no_log_det(y)
        if self.norm is not None:
            y, log_det = self.norm.inverse(y, context)
        return y * torch.exp(-log_scale) - shift, log_det - log_scale.flatten(1).sum(1)


class MaskedCoupling(AffineCoupling):
    """The kept part is where `mask` is 1 (checkerboards of images, single coordinates of points); section 3.4.

    mask: 0 and 1, broadcast over the batch: a tensor, (D,) for points, or a module that gives the mask for x
    (`Checkerboard` for images of any size). Only the changed dimensions enter the log-determinant: summing s over the
    kept ones too, as a well-known notebook does, is wrong by sum(mask * s).
    """

    def __init__(
        self,
        mask: Tensor | nn.Module,
        conditioner: nn.Module,
        log_scale_factor=0.0,
        norm: Flow | None = None,
    ) -> None:
        super().__init__(conditioner, log_scale_factor, norm)
        self.mask = as_mask(mask)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return self._forward(x, *self._masked(x, context), context)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, *self._masked(z, context), context)

    def _masked(self, x: Tensor, context) -> tuple[Tensor, Tensor]:
        mask = self.mask(x)
        shift, log_scale = self._shift_and_log_scale(x * mask, context)
        return shift * (1 - mask), log_scale * (1 - mask)


class ChannelCoupling(AffineCoupling):
    """The kept part is one half of the channels: the first, or the second if `swap`."""

    def __init__(
        self, conditioner: nn.Module, swap: bool, log_scale_factor=1.0, norm: Flow | None = None
    ) -> None:
        super().__init__(conditioner, log_scale_factor, norm)
        self.swap = swap

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(x)
        changed, log_det = self._forward(
            changed, *self._shift_and_log_scale(kept, context), context
        )
        return self._join(kept, changed), log_det

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(z)
        changed, log_det = self._inverse(
            changed, *self._shift_and_log_scale(kept, context), context
        )
        return self._join(kept, changed), log_det

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.swap else (first, second)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([changed, kept] if self.swap else [kept, changed], dim=1)


class AdditiveCoupling(Flow):
    """y2 = x2 + t(x1), y1 = x1; log_det is 0 (Dinh et al. 2014, section 3.2).

    conditioner: maps the first half of the channels and the context to t, (B, C/2, H, W); its `initialize(x, context)`
    is called where it has one.
    """

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, dim=1)
        changed, log_det, _ = self.change(changed, self.conditioner(kept, context))
        return torch.cat([kept, changed], dim=1), log_det

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        kept, changed = z.chunk(2, dim=1)
        changed, log_det = self.change_back(changed, self.conditioner(kept, context))
        return torch.cat([kept, changed], dim=1), log_det

    def initialize(self, x: Tensor, context=None) -> Tensor:
        if hasattr(self.conditioner, "initialize"):
            self.conditioner.initialize(x.chunk(2, dim=1)[0], context)
        return self(x, context)[0]

    def change(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """y2 and log_det from x2 and the network's output h, and what `gradients` takes beside y2."""
        return x + h, no_log_det(x), ()

    def change_back(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x2 and the log_det of the inverse from y2 and h."""
        return y - h, no_log_det(y)

    def gradients(self, grad: Tensor, grad_log_det: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Those of x2 and h, from those of what `change` gave: dy / dx2 = scale, dy / dr = y d ln(scale) / dr."""
        return grad, grad


class SigmoidCoupling(AdditiveCoupling):
    """y2 = (x2 + t) scale, y1 = x1, scale = m + (1 - m) sigmoid(r + 2), with (t, r) from x1: Glow's affine coupling.

        log_det = sum ln scale

    Kingma & Dhariwal 2018, table 1, write exp(log s) x + t. The authors' code bounds the scale by 1, since without a
    bound training did not converge (openai/glow issue 62), and shifts first; it made the numbers, so it wins. There
    m = 0. Measured at K=4, 16 channels, 10,000 steps, float32: the inverses of images of noise were not finite, those
    of test images within .0023 grey levels. With m = .5: results/README.md. K=32: not measured beyond 300 steps.

    conditioner: maps the first half of the channels and the context to (t, r), (B, C, H, W). min_scale: m, in [0, 1).
    """

    def __init__(self, conditioner: nn.Module, min_scale: float = 0.0) -> None:
        super().__init__(conditioner)
        if not 0 <= min_scale < 1:
            raise ValueError(
                f"flow.min_scale={min_scale} bounds no scale below 1: give 0 to less than 1"
            )
        self.min_scale = min_scale

    def change(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        shift, scale, log_det = self._affine(h)
        return (x + shift) * scale, log_det, (scale,)

    def change_back(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, log_det = self._affine(h)
        return y / scale - shift, -log_det

    def gradients(
        self, grad: Tensor, grad_log_det: Tensor, y: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_x = grad * scale  # and that of t
        of_log_scale = torch.addcmul(grad_log_det[:, None, None, None], grad, y)
        grad_raw = of_log_scale * (
            1 - scale
        )  # d ln(scale) / dr = (1 - scale) (scale - m) / ((1 - m) scale)
        if self.min_scale:
            grad_raw = grad_raw * (scale - self.min_scale) / ((1 - self.min_scale) * scale)
        return grad_x, torch.cat([grad_x, grad_raw], dim=1)

    def _affine(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, scale and the log-determinant, (B,)."""
        shift, raw = h.chunk(2, dim=1)
        raw = raw + 2
        scale = torch.sigmoid(raw)
        if self.min_scale:
            scale = self.min_scale + (1 - self.min_scale) * scale
            return shift, scale, scale.log().sum((1, 2, 3))
        return shift, scale, F.logsigmoid(raw).sum((1, 2, 3))  # a scale of 0 has a finite logarithm
