"""The networks inside couplings.

Their outputs have the dtype of their inputs, also under autocast.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.masks import Mask, as_mask
from flows.normalization import BiasOnlyBatchNorm2d


class WeightNormConv2d(nn.Conv2d):
    """A "same" convolution whose weight is W / |W| per output channel, times a `magnitude`.

    Salimans & Kingma 2016. Without a learned magnitude the norm of the weight is 1. This and the
    initialisation are those of RealNVP's code: W ~ U(-s, s) and magnitude = s sqrt(C_in k^2 / 12)
    with s = sqrt(2 / C_in); biases are 0.

    magnitude: whether to learn a magnitude, (C_out, 1, 1, 1).
    """

    magnitude: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        magnitude: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        bound = math.sqrt(2 / in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.magnitude = None
        if magnitude:
            start = bound * math.sqrt(in_channels * kernel_size**2 / 12)
            self.magnitude = nn.Parameter(torch.full((out_channels, 1, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        weight = once(self, "normalized", self.normalized)
        return F.conv2d(x, weight, self.bias, padding=self.padding)

    def normalized(self) -> Tensor:
        """The normalised weight, which the convolution applies: (C_out, C_in, k, k)."""
        norm = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)
        factor = 1 / norm if self.magnitude is None else self.magnitude / norm
        return self.weight * factor


class ResidualBlock(nn.Module):
    """x + conv(ReLU(BN(conv(ReLU(BN(x)))))), 3x3, pre-activation (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            BiasOnlyBatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WeightNormConv2d(channels, channels, 3, bias=False),
            BiasOnlyBatchNorm2d(channels),
            nn.ReLU(inplace=True),
            WeightNormConv2d(channels, channels, 3, magnitude=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.layers(x)
        weight, bias = once(self, "folded", self._folded)
        h = F.conv2d(self.layers[0](x).relu_(), weight, bias, padding=1).relu_()
        return x + self.layers[5](h)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of one convolution that equals the first one and its batch norm in eval.

        The batch norm is that with its running averages.
        """
        conv = cast(WeightNormConv2d, self.layers[2])
        norm = cast(BiasOnlyBatchNorm2d, self.layers[3])
        scale = torch.rsqrt(norm.running_var + norm.eps)
        return conv.normalized() * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class ResidualConditioner(nn.Module):
    """RealNVP's network: one net with two outputs, shift and raw log-scale, each (B, C, H, W).

    BN -> [h, -h] -> ReLU -> 3x3 -> n_blocks residual blocks. The input and the output of every
    block pass a 1x1 convolution each, and the sum of these ("skip") passes BN -> ReLU -> 1x1. The
    paper's section 4.1 only sketches this; the details are those of the authors' code.

    With a checkerboard `mask` the input is doubled after its BN, since half of it is 0, and the
    mask is one more input channel.

    x: (B, C, H, W), zero on the changed elements. mask: 1 on the kept elements; a tensor (H, W), or
    a module that returns it for x. A context is ignored.

    >>> net = ResidualConditioner(channels=2, hidden_channels=8, n_blocks=1).eval()
    >>> shift, log_scale = net(torch.rand(5, 2, 4, 6))
    >>> shift.shape, log_scale.shape
    (torch.Size([5, 2, 4, 6]), torch.Size([5, 2, 4, 6]))
    """

    mask: nn.Module | None

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        n_blocks: int,
        mask: Mask | None = None,
    ) -> None:
        super().__init__()
        self.mask = None if mask is None else as_mask(mask)
        self.bn_in = BiasOnlyBatchNorm2d(channels)
        self.conv_in = WeightNormConv2d(2 * channels + (mask is not None), hidden_channels, 3)
        self.blocks = nn.ModuleList(ResidualBlock(hidden_channels) for _ in range(n_blocks))
        self.skips = nn.ModuleList(
            WeightNormConv2d(hidden_channels, hidden_channels, 1, magnitude=True)
            for _ in range(n_blocks + 1)
        )
        self.bn_out = BiasOnlyBatchNorm2d(hidden_channels)
        self.conv_out = WeightNormConv2d(hidden_channels, 2 * channels, 1, magnitude=True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.bn_in(x)
        if self.mask is None:
            h = torch.cat([h, -h], dim=1)
        else:
            h = torch.cat([2 * h, -2 * h, self.mask(x).expand(len(x), 1, -1, -1)], dim=1)
        h = self.conv_in(h.relu_())
        out = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            h = block(h)
            out = out + skip(h)
        shift, log_scale = self.conv_out(self.bn_out(out).relu_()).to(x.dtype).chunk(2, dim=1)
        return shift, log_scale


class MLPConditioner(nn.Module):
    """Two separate three-layer ReLU networks for points: shift t(x) and raw log-scale s(x).

    x: (B, D), zero in the changed dimensions. Returns two tensors (B, D). A context is ignored.

    >>> shift, log_scale = MLPConditioner(n_dims=2, hidden_channels=8)(torch.rand(5, 2))
    >>> shift.shape, log_scale.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(self, n_dims: int, hidden_channels: int) -> None:
        super().__init__()
        self.shift = self._net(n_dims, hidden_channels)
        self.log_scale = self._net(n_dims, hidden_channels)

    @staticmethod
    def _net(n_dims: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(n_dims, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, n_dims),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.shift(x).to(x.dtype), self.log_scale(x).to(x.dtype)
