"""The network that encodes the low-resolution image: RRDB (Wang et al. 2018, ESRGAN)."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import module_list
from flows.checks import LARGEST_DEPTH, check_count, is_whole
from flows.multiscale import channels_last
from flows.recompute import recomputed
from flows.srflow.dense import RESIDUAL, SLOPE, DenseBlock


class ResidualDenseBlock(nn.Module):
    """x + .2 d_3(d_2(d_1(x))) with dense blocks d: the RRDB of Wang et al. 2018, figure 4."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.blocks = module_list(DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h)
        return x + RESIDUAL * h


class RRDBEncoder(nn.Module):
    """Conditional features of a low-resolution image for every level (section 3.4).

    u_0 = conv(low_res) passes n_blocks residual-in-residual dense blocks and a convolution:

        f_1 = u_0 + conv(block_n(.. block_1(u_0))),
        f_2 = conv(up(f_1)),    f_4 = conv(up(LeakyReLU(f_2))),    f_8 = conv(up(LeakyReLU(f_4)))

    where up doubles the sides by repeating pixels. Level l of a flow has sides H / 2^l, which are
    those of low_res times r = scale / 2^l. Its features are f_r, or f_1 reduced bilinearly if
    r < 1, followed by the outputs of the blocks `stacked`, resized to this size by repeating or
    leaving out pixels. The paper says that it concatenates the outputs of all blocks; the authors'
    code, which this class follows, those of four. Their network also has the layers that turn the
    features into an image, which get no gradient in a flow: they are in `RRDB`.

    scale: how many times larger high-resolution images are, a power of 2.
    n_blocks, channels, growth: the blocks, and the channels that they pass on and add inside.
    stacked: the numbers of blocks, from 0, whose outputs are features.
    n_levels: the levels of the flow.

    low_res: (B, 3, h, w) in [0, 1]. h and w have to be multiples of `multiple`. Returns a tuple of
    n_levels tensors (B, n_features, r h, r w), that of level 1, the largest, first.

    Raises ValueError: an argument is out of range, or low_res does not fit.

    If the attribute `recompute` is true, each block keeps only its input for the backward pass.

    >>> encoder = RRDBEncoder(n_blocks=2, channels=8, growth=4, stacked=(0, 1))
    >>> [features.shape[1:] for features in encoder(torch.rand(1, 3, 6, 8))]
    [torch.Size([24, 12, 16]), torch.Size([24, 6, 8]), torch.Size([24, 3, 4])]
    """

    recompute = False

    def __init__(
        self,
        scale: int = 4,
        n_blocks: int = 23,
        channels: int = 64,
        growth: int = 32,
        stacked: Sequence[int] = (1, 8, 15, 22),
        n_levels: int = 3,
    ) -> None:
        super().__init__()
        n_doublings = doublings(scale)
        check_count("flow.encoder_blocks", n_blocks, least=1, most=LARGEST_DEPTH)
        check_count("flow.encoder_channels", channels, least=1)
        check_count("flow.encoder_growth", growth, least=1)
        self.scale = scale
        self.stacked = _checked(stacked, n_blocks)
        self.n_levels = n_levels
        self.n_features = channels * (1 + len(self.stacked))
        self.multiple = max(1, 2**n_levels // scale)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = module_list(ResidualDenseBlock(channels, growth) for _ in range(n_blocks))
        self.conv_trunk = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsamplings = module_list(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(n_doublings - 1)
        )

    def forward(self, low_res: Tensor) -> tuple[Tensor, ...]:
        height, width = low_res.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"low_res is {height}x{width}, but its sides have to be multiples of "
                f"{self.multiple}: pad it by flows.srflow.padded(low_res, {self.multiple})"
            )
        features, outputs = self.trunk(channels_last(low_res))
        maps = self.doubled(features)
        levels = []
        for level in range(1, self.n_levels + 1):
            ratio = self.scale / 2**level
            if ratio >= 1:
                own = maps[len(maps) - level]
            else:
                own = F.interpolate(
                    features, scale_factor=ratio, mode="bilinear", align_corners=False
                )
            stack = [_resized(output, ratio) for output in outputs]
            levels.append(torch.cat([own, *stack], dim=1).to(low_res.dtype))
        return tuple(levels)

    def trunk(self, low_res: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f_1 and the outputs of the stacked blocks, each (B, channels, h, w)."""
        first = self.conv_in(low_res).to(low_res.dtype)
        h = first
        outputs = []
        for i, block in enumerate(self.blocks):
            h = recomputed(nn.Module.__call__, block, h, enabled=self.recompute)
            if i in self.stacked:
                outputs.append(h)
        return first + self.conv_trunk(h).to(low_res.dtype), outputs

    def doubled(self, features: Tensor) -> list[Tensor]:
        """f_1, f_2, f_4, ..., up to half of the scale, from f_1."""
        maps = [features]
        for i, conv in enumerate(self.upsamplings):
            h = maps[-1] if i == 0 else F.leaky_relu(maps[-1], SLOPE)
            maps.append(conv(F.interpolate(h, scale_factor=2.0)))
        return maps


class RRDB(nn.Module):
    """Super-resolution without a distribution, from which the encoder of SRFlow is pre-trained.

    The network of ESRGAN's authors (Wang et al. 2018): the largest features of `RRDBEncoder` pass
    LeakyReLU, the last doubling of the sides, and two convolutions.

    The attribute `encoder` is an `RRDBEncoder`, whose weights the encoder of a flow can load. They
    do not depend on its arguments stacked and n_levels.

    low_res: (B, 3, h, w) in [0, 1], of any size. Returns (B, 3, scale h, scale w), in about [0, 1].

    Raises ValueError: an argument is out of range.

    >>> RRDB(scale=4, n_blocks=1, channels=8, growth=4)(torch.rand(1, 3, 5, 7)).shape
    torch.Size([1, 3, 20, 28])
    """

    def __init__(
        self, scale: int = 4, n_blocks: int = 23, channels: int = 64, growth: int = 32
    ) -> None:
        super().__init__()
        self.encoder = RRDBEncoder(scale, n_blocks, channels, growth, stacked=(), n_levels=1)
        self.upsampling = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_hidden = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, low_res: Tensor) -> Tensor:
        features, _ = self.encoder.trunk(channels_last(low_res))
        h = self.encoder.doubled(features)[-1]
        if self.encoder.scale > 2:
            h = F.leaky_relu(h, SLOPE)
        h = F.leaky_relu(self.upsampling(F.interpolate(h, scale_factor=2.0)), SLOPE)
        return self.conv_out(F.leaky_relu(self.conv_hidden(h), SLOPE)).to(low_res.dtype)


def _resized(x: Tensor, ratio: float) -> Tensor:
    """Images of `ratio` times the sides, by repeating or leaving out pixels."""
    if ratio == 1:
        return x
    return F.interpolate(x, scale_factor=ratio)


def doublings(scale: int) -> int:
    """How often the sides are doubled. Raises ValueError: the scale is no power of 2.

    >>> doublings(8)
    3
    """
    if not is_whole(scale) or scale < 2 or scale & (scale - 1):
        raise ValueError(f"flow.scale={scale} is out of range: give 2, 4, 8 or 16")
    return round(math.log2(scale))


def _checked(stacked: Iterable[int], n_blocks: int) -> tuple[int, ...]:
    """The numbers of the stacked blocks. Raises ValueError: there is no such block."""
    numbers = tuple(stacked)
    if any(not is_whole(i) or not 0 <= i < n_blocks for i in numbers):
        raise ValueError(
            f"flow.stacked={list(numbers)} names blocks that the encoder lacks: with "
            f"flow.encoder_blocks={n_blocks} give numbers from 0 to {n_blocks - 1}"
        )
    if len(set(numbers)) < len(numbers) or list(numbers) != sorted(numbers):
        raise ValueError(f"flow.stacked={list(numbers)}: give increasing numbers of blocks")
    return numbers
