"""Couplings: one part of x is kept and decides how the other part is scaled and shifted."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import Flow, no_log_det
from flows.masks import Mask, as_mask
from flows.recompute import recomputed


class AffineCoupling(Flow):
    """y = (x + t) exp(s) on the changed part, y = x on the kept part (RealNVP).

        s = a tanh(raw),    (t, raw) = conditioner(kept part),    log_det = sum s

    Dinh et al. 2017, section 3.2, write x exp(s) + t. The authors' code shifts first, and so does
    this class: the maps are the same, with another t. The scalar a is learned.

    conditioner: maps the kept part and the context to (t, raw).
    log_scale_factor: the initial value of a.
    norm: an optional flow that is applied after the affine map (`CouplingBatchNorm`).

    If the attribute `recompute` is true, the conditioner keeps only its inputs for the backward
    pass, where its activations are computed again (flows/recompute.py).
    """

    recompute = False

    def __init__(
        self, conditioner: nn.Module, log_scale_factor: float, norm: Flow | None = None
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.log_scale_factor = nn.Parameter(torch.tensor(log_scale_factor))
        self.norm = norm

    def _shift_and_log_scale(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """t and s."""
        shift, raw = recomputed(
            nn.Module.__call__, self.conditioner, kept, context, enabled=self.recompute
        )
        return shift, self.log_scale_factor * torch.tanh(raw)

    def _forward(
        self, x: Tensor, shift: Tensor, log_scale: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y = (x + shift) * torch.exp(log_scale)
        log_det = log_scale.flatten(1).sum(1)
        if self.norm is None:
            return y, log_det
        y, norm_log_det = self.norm(y, context)
        return y, log_det + norm_log_det

    def _inverse(
        self, y: Tensor, shift: Tensor, log_scale: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        log_det = no_log_det(y)
        if self.norm is not None:
            y, log_det = self.norm.inverse(y, context)
        return y * torch.exp(-log_scale) - shift, log_det - log_scale.flatten(1).sum(1)


class MaskedCoupling(AffineCoupling):
    """An affine coupling that keeps the elements where `mask` is 1 (Dinh et al. 2017, section 3.4).

    The mask is a checkerboard of an image, or a single coordinate of points. Only the changed
    elements enter the log-determinant. (A well-known notebook sums s over the kept ones too, which
    is wrong by sum(mask * s).)

    mask: zeros and ones, broadcast over the batch: a tensor or a list, (D,) for points, or a module
    that returns the mask for x (`Checkerboard`, for images of any size).

    >>> from flows.conditioners import MLPConditioner
    >>> coupling = MaskedCoupling([1.0, 0.0], MLPConditioner(2, hidden_channels=8), 1.0)
    >>> x = torch.tensor([[0.5, 2.0]])
    >>> y, log_det = coupling(x)
    >>> y[0, 0].item(), log_det.shape  # the first coordinate is kept
    (0.5, torch.Size([1]))
    """

    def __init__(
        self,
        mask: Mask,
        conditioner: nn.Module,
        log_scale_factor: float = 0.0,
        norm: Flow | None = None,
    ) -> None:
        super().__init__(conditioner, log_scale_factor, norm)
        self.mask = as_mask(mask)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._forward(x, *self._masked(x, context), context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, *self._masked(z, context), context)

    def _masked(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """t and s, 0 where x is kept."""
        mask = self.mask(x)
        shift, log_scale = self._shift_and_log_scale(x * mask, context)
        return shift * (1 - mask), log_scale * (1 - mask)


class ChannelCoupling(AffineCoupling):
    """An affine coupling that keeps the first half of the channels, or the second if `swap`.

    >>> from flows.conditioners import ResidualConditioner
    >>> conditioner = ResidualConditioner(channels=2, hidden_channels=4, n_blocks=1)
    >>> coupling = ChannelCoupling(conditioner, swap=False).eval()
    >>> x = torch.rand(2, 4, 6, 6)
    >>> y, log_det = coupling(x)
    >>> torch.equal(y[:, :2], x[:, :2]), log_det.shape
    (True, torch.Size([2]))
    """

    def __init__(
        self,
        conditioner: nn.Module,
        swap: bool,
        log_scale_factor: float = 1.0,
        norm: Flow | None = None,
    ) -> None:
        super().__init__(conditioner, log_scale_factor, norm)
        self.swap = swap

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(x)
        shift, log_scale = self._shift_and_log_scale(kept, context)
        changed, log_det = self._forward(changed, shift, log_scale, context)
        return self._join(kept, changed), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(z)
        shift, log_scale = self._shift_and_log_scale(kept, context)
        changed, log_det = self._inverse(changed, shift, log_scale, context)
        return self._join(kept, changed), log_det

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept half and the changed half."""
        first, second = x.chunk(2, dim=1)
        return (second, first) if self.swap else (first, second)

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        if self.swap:
            return torch.cat([changed, kept], dim=1)
        return torch.cat([kept, changed], dim=1)


class AdditiveCoupling(Flow):
    """y2 = x2 + t(x1), y1 = x1, for the halves of the channels; log_det is 0.

    Dinh et al. 2014, section 3.2.

    conditioner: maps the first half of the channels and the context to t, (B, C/2, H, W). Where it
    has a method `initialize(x, context)`, `Flow.initialize` calls it.

    >>> from flows.glow.conditioner import GlowConditioner
    >>> coupling = AdditiveCoupling(GlowConditioner(2, 2, hidden_channels=8, edges=True))
    >>> x = torch.rand(2, 4, 6, 6)
    >>> y, log_det = coupling(x)
    >>> torch.equal(y, x), log_det  # the last layer of Glow's network is 0 at first
    (True, tensor([0., 0.]))
    """

    def __init__(self, conditioner: nn.Module) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self.split(x)
        changed, log_det, _ = self.change(changed, self.conditioner(kept, context))
        return self.joined(kept, changed), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self.split(z)
        changed, log_det = self.change_back(changed, self.conditioner(kept, context))
        return self.joined(kept, changed), log_det

    def initialize(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        initialize = getattr(self.conditioner, "initialize", None)
        if initialize is not None:
            initialize(self.split(x)[0], context)
        return super().initialize(x, context)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that are kept, and those that are changed: the halves."""
        kept, changed = x.chunk(2, dim=1)
        return kept, changed

    def joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([kept, changed], dim=1)

    def change(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """y2 and log_det, (B,), from x2 and the network's output h.

        The third value holds the tensors that `gradients` needs in addition to y2.
        """
        return x + h, no_log_det(x), ()

    def change_back(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x2 and the log_det of the inverse, (B,), from y2 and the network's output h."""
        return y - h, no_log_det(y)

    def gradients(
        self, grad: Tensor, grad_log_det: Tensor, y: Tensor, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x2 and h, from those of y2 and log_det.

        state: the third value of `change`.
        """
        return grad, grad


class SigmoidCoupling(AdditiveCoupling):
    """y2 = (x2 + t) scale, y1 = x1, for the halves of the channels: Glow's affine coupling.

        scale = m + (M - m) sigmoid(r + 2),    (t, r) = conditioner(x1),    log_det = sum ln scale

    Kingma & Dhariwal 2018, table 1, write exp(log s) x + t. This class follows the authors' code,
    which produced the published numbers: it shifts first, and bounds the scale above by M = 1,
    since without a bound training did not converge (openai/glow issue 62). The code has no lower
    bound, m = 0. The inverse divides by the scale, so small scales make it inexact in float32: a
    trained flow may give single images back some grey levels off. A flow in float64
    (`flow.double()`) does not; results/index.html shows the effect of m > 0.

    conditioner: maps the first half of the channels and the context to t and r, concatenated along
        the channels: (B, C, H, W).
    min_scale: m, from 0 to less than 1, else ValueError.
    max_scale: M. SRFlow's sigmoid(r + 2) + m is M = 1 + m.

    >>> from flows.glow.conditioner import GlowConditioner
    >>> coupling = SigmoidCoupling(GlowConditioner(2, 4, hidden_channels=8, edges=True))
    >>> x = torch.rand(2, 4, 6, 6)
    >>> y, log_det = coupling(x)
    >>> log_det  # 2 * 6 * 6 ln sigmoid(2): the last layer of Glow's network is 0 at first
    tensor([-9.1388, -9.1388], grad_fn=<SumBackward1>)
    """

    def __init__(
        self, conditioner: nn.Module, min_scale: float = 0.0, max_scale: float = 1.0
    ) -> None:
        super().__init__(conditioner)
        if not 0 <= min_scale < 1:
            raise ValueError(
                f"flow.min_scale={min_scale} is out of range: give a number from 0 to less than 1"
            )
        self.min_scale = min_scale
        self.max_scale = max_scale

    def change(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        shift, scale, log_det = self._affine(h)
        return (x + shift) * scale, log_det, (scale,)

    def change_back(self, y: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, log_det = self._affine(h)
        return y / scale - shift, -log_det

    def gradients(
        self, grad: Tensor, grad_log_det: Tensor, y: Tensor, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x2 and h, from those of y2 and log_det, by

        dy2 / dx2 = dy2 / dt = scale,    dy2 / dr = y2 d ln(scale) / dr,
        d ln(scale) / dr = (M - scale) (scale - m) / ((M - m) scale)
        """
        (scale,) = state
        grad_x = grad * scale  # this is the gradient of t too
        grad_log_scale = torch.addcmul(grad_log_det[:, None, None, None], grad, y)
        grad_raw = grad_log_scale * (self.max_scale - scale)
        if self._is_bounded():
            size = self.max_scale - self.min_scale
            grad_raw = grad_raw * (scale - self.min_scale) / (size * scale)
        return grad_x, torch.cat([grad_x, grad_raw], dim=1)

    def _affine(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, scale and log_det, (B,)."""
        shift, raw = h.chunk(2, dim=1)
        raw = raw + 2
        scale = torch.sigmoid(raw)
        if self._is_bounded():
            scale = self.min_scale + (self.max_scale - self.min_scale) * scale
            return shift, scale, scale.log().sum((1, 2, 3))
        # logsigmoid is finite even where the sigmoid has rounded to 0.
        return shift, scale, F.logsigmoid(raw).sum((1, 2, 3))

    def _is_bounded(self) -> bool:
        """Whether the scale is another function than sigmoid(r + 2)."""
        return self.min_scale > 0 or self.max_scale != 1


class AffineInjector(SigmoidCoupling):
    """y = (x + t) scale on all channels, where the context alone decides t and the scale.

        scale = m + (M - m) sigmoid(r + 2),    (t, r) = conditioner(context)

    SRFlow (Lugmayr et al. 2020, section 3.3), with the scale of its authors' code.

    conditioner: is called with x without any channels, (B, 0, H, W), and the context; returns t and
        r, concatenated along the channels: (B, 2C, H, W).
    min_scale, max_scale: m and M, as in `SigmoidCoupling`.

    >>> from flows.glow.conditioner import GlowConditioner
    >>> network = GlowConditioner(0, 8, hidden_channels=5, edges=False, context_channels=3)
    >>> injector = AffineInjector(network)
    >>> y, log_det = injector(torch.rand(2, 4, 6, 6), torch.rand(2, 3, 6, 6))
    >>> log_det  # 4 * 6 * 6 ln sigmoid(2)
    tensor([-18.2776, -18.2776], grad_fn=<SumBackward1>)
    """

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """None of the channels are kept, and all are changed."""
        return x[:, :0], x

    def joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        return changed
