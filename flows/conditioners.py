"""The networks inside couplings. Their outputs are float32 whatever the ambient autocast."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.caching import once
from flows.masks import as_mask
from flows.normalization import BiasOnlyBatchNorm2d


class WeightNormConv2d(nn.Conv2d):
    """A "same" convolution with the weight W / |W| per output channel, times a learned `magnitude` if asked for.

    Salimans & Kingma 2016 with the norm fixed to 1 where there is no `magnitude`, as in RealNVP's code. Initialised
    as there: W ~ U(-s, s) and magnitude = s sqrt(C_in k^2 / 12) with s = sqrt(2 / C_in); biases 0.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, magnitude=False, bias=True
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )
        bound = math.sqrt(2 / in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        if bias:
            nn.init.zeros_(self.bias)
        start = bound * math.sqrt(in_channels * kernel_size**2 / 12)
        self.magnitude = (
            nn.Parameter(torch.full((out_channels, 1, 1, 1), start)) if magnitude else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, once(self, "normalized", self.normalized), self.bias, padding=self.padding
        )

    def normalized(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)
        return self.weight * (1 / norm if self.magnitude is None else self.magnitude / norm)


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
        """Weight and bias of the first convolution with the batch norm after it, by its running averages."""
        conv, norm = self.layers[2], self.layers[3]
        scale = torch.rsqrt(norm.running_var + norm.eps)
        return conv.normalized() * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class ResidualConditioner(nn.Module):
    """RealNVP's network: one net with two outputs (authors' code; the paper's section 4.1 only sketches it).

    BN -> [h, -h] -> ReLU -> 3x3 -> n_blocks residual blocks; a 1x1 of every block's output is summed ("skip"), then
    BN -> ReLU -> 1x1. With a checkerboard `mask` (a tensor (H, W), or a module that gives it for x) the input is
    doubled after its BN, since half of it is 0, and the mask is one more input channel. Has no use for a context.

    x: (B, C, H, W), zero where masked. Returns shift and raw log-scale, each (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        n_blocks: int,
        mask: Tensor | nn.Module | None = None,
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

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
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
    """Two separate three-layer ReLU networks for points: shift t(x) and raw log-scale s(x), each (B, D).

    Has no use for a context.
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

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return self.shift(x).to(x.dtype), self.log_scale(x).to(x.dtype)
