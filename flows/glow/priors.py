"""Learned Gaussian priors N(m, e^(2s)), written as the bijection eps = (z - m) e^-s onto a standard normal.

The density is the same, the inverse exact, and a temperature is one factor on eps: sigma becomes tau sigma at every
level, as in the authors' samples (Kingma & Dhariwal 2018, section 6; openai/glow).
"""

import torch
from torch import Tensor, nn

from flows.base import Flow
from flows.glow.edges import Edge, ZeroConv2d, ZeroLinear, added
from flows.normalization import scales_and_biases


class SplitPrior(Flow):
    """[z1, z2] -> [z1, eps], eps = (z2 - m(z1)) e^-s(z1): the half that is factored out, given the half that goes on.

        log_det = -sum s

    m and s come from one zero-initialised convolution of z1 (authors' code, `split2d_prior`), so eps = z2 at first.
    x: (B, C, H, W); the halves are those of the channels. edges: as in `EdgeConv2d`. Has no use for a context.
    """

    def __init__(self, channels: int, edges: bool) -> None:
        super().__init__()
        self.net = ZeroConv2d(channels // 2, channels, edges)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        kept, z = x.chunk(2, dim=1)
        eps, log_det = standardized(z, *self._moments(kept))
        return torch.cat([kept, eps], dim=1), log_det

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        kept, eps = z.chunk(2, dim=1)
        z, log_det = unstandardized(eps, *self._moments(kept))
        return torch.cat([kept, z], dim=1), log_det

    def _moments(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """m and s, in float32 under autocast too, as all that is no coupling network."""
        with torch.autocast(kept.device.type, enabled=False):
            return self.net(kept).chunk(2, dim=1)


class TopPrior(Flow):
    """eps = (z - m) e^-s at the last level, m and s a constant per channel, with n_classes one of the class's own.

        log_det = -sum s

    Authors' code, `prior`: a `ZeroConv2d` of an image of zeros, of which the bias and, with `edges`, the border remain,
    so that m and s differ along the border; plus a `ZeroLinear` of the one-hot class. The context is then the class,
    (B,) int64. m = s = 0 at first.
    """

    def __init__(self, channels: int, edges: bool, n_classes: int | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.edge = Edge(2 * channels) if edges else None
        self.by_class = None if n_classes is None else ZeroLinear(n_classes, 2 * channels)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return standardized(x, *self._moments(x, context))

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return unstandardized(z, *self._moments(z, context))

    def _moments(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and s, each broadcastable to x."""
        (scale,), (bias,) = scales_and_biases([self.log_scale], [self.shift])
        edge = None if self.edge is None else self.edge.weight
        h = added(bias, edge, scale, x.shape[-2:])
        if self.by_class is not None:
            classes = torch.arange(self.by_class.in_features, device=context.device)
            one_hot = (context[:, None] == classes).to(x.dtype)
            h = h + self.by_class(one_hot)[:, :, None, None]
        mean, log_std = h.chunk(2, dim=-3)
        return mean, log_std


def standardized(z: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """eps = (z - m) e^-s and its log_det; m and s broadcast to z (B, C, H, W)."""
    return (z - mean) * torch.exp(-log_std), -log_std.expand_as(z).flatten(1).sum(1)


def unstandardized(eps: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """z = m + e^s eps and its log_det: the inverse of `standardized`."""
    return mean + torch.exp(log_std) * eps, log_std.expand_as(eps).flatten(1).sum(1)
