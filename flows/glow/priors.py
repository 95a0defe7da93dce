"""Learned Gaussian priors N(m, e^(2s)), as the bijection eps = (z - m) e^-s onto a standard normal.

The density of z is the same, and the inverse is exact. A temperature tau multiplies eps, so that
the standard deviation e^s becomes tau e^s at every level, as in the authors' code (section 6 of the
paper).
"""

import torch
from torch import Tensor, nn

from flows.base import Flow
from flows.glow.edges import Edge, ZeroConv2d, ZeroLinear, scaled_bias
from flows.glow.kernels import size_of
from flows.normalization import scales_and_biases


class SplitPrior(Flow):
    """[z1, z2] -> [z1, eps], eps = (z2 - m(z1)) e^-s(z1), for the halves of the channels.

        log_det = -sum s

    z2 is factored out, and z1 goes on to the next level. m and s are the output of one
    zero-initialised convolution of z1 (authors' code, `split2d_prior`), so that eps = z2 at first.

    x: (B, C, H, W). edges: as in `EdgeConv2d`. A context is ignored.

    >>> x = torch.rand(2, 4, 3, 3)
    >>> y, log_det = SplitPrior(channels=4, edges=True)(x)
    >>> torch.equal(y, x), log_det.shape
    (True, torch.Size([2]))
    """

    def __init__(self, channels: int, edges: bool) -> None:
        super().__init__()
        self.net = ZeroConv2d(channels // 2, channels, edges)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, z = x.chunk(2, dim=1)
        eps, log_det = standardized(z, *self._moments(kept))
        return torch.cat([kept, eps], dim=1), log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, eps = z.chunk(2, dim=1)
        z, log_det = unstandardized(eps, *self._moments(kept))
        return torch.cat([kept, z], dim=1), log_det

    def _moments(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """m and s, in float32 even under autocast, which applies only to coupling networks."""
        with torch.autocast(kept.device.type, enabled=False):
            mean, log_std = self.net(kept).chunk(2, dim=1)
        return mean, log_std


class TopPrior(Flow):
    """eps = (z - m) e^-s at the last level, with m and s constant per channel.

        log_det = -sum s

    In the authors' code (`prior`) m and s are a `ZeroConv2d` of an image of zeros. Of this only the
    bias remains, and with `edges` the map of the border, so that m and s differ along the border.
    With `n_classes` a `ZeroLinear` of the one-hot class is added to them, and the context is the
    class, (B,) int64. At first m = s = 0.

    >>> x = torch.rand(2, 4, 3, 3)
    >>> eps, log_det = TopPrior(4, edges=True, n_classes=10)(x, torch.tensor([3, 8]))
    >>> torch.equal(eps, x), log_det.shape
    (True, torch.Size([2]))
    """

    edge: Edge | None
    by_class: ZeroLinear | None

    def __init__(self, channels: int, edges: bool, n_classes: int | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.edge = Edge(2 * channels) if edges else None
        self.by_class = None
        if n_classes is not None:
            self.by_class = ZeroLinear(n_classes, 2 * channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return standardized(x, *self._moments(x, context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return unstandardized(z, *self._moments(z, context))

    def _moments(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and s, which broadcast to x."""
        (scale,), (bias,) = scales_and_biases([self.log_scale], [self.shift])
        edge = None if self.edge is None else self.edge.weight
        h = scaled_bias(bias, edge, scale, size_of(x))
        if self.by_class is not None:
            if context is None:
                raise ValueError("the prior depends on the class: give it as context, (B,) int64")
            # F.one_hot reads the values, which vmap does not allow. This indexing fails for a class
            # that is out of range, also on a GPU, where `Classes` does not check the values.
            rows = torch.eye(self.by_class.in_features, dtype=x.dtype, device=context.device)
            one_hot = rows.index_select(0, context)
            h = h + self.by_class(one_hot)[:, :, None, None]
        mean, log_std = h.chunk(2, dim=-3)
        return mean, log_std


def standardized(z: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """eps = (z - m) e^-s and its log_det, (B,); m and s broadcast to z, (B, C, H, W)."""
    return (z - mean) * torch.exp(-log_std), -log_std.expand_as(z).flatten(1).sum(1)


def unstandardized(eps: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """z = m + e^s eps and its log_det, (B,): the inverse of `standardized`."""
    return mean + torch.exp(log_std) * eps, log_std.expand_as(eps).flatten(1).sum(1)
