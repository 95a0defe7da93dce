"""A sketch of SRFlow (Lugmayr et al. 2020): a flow of images of any size, given a small image.

It uses nothing private. The small image is encoded once, even for many samples, and every level
takes its own part of the encoding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import Compose, FlowModel, module_list
from flows.context import Context, Encoded, Images
from flows.coupling import SigmoidCoupling
from flows.glow.priors import SplitPrior
from flows.glow.steps import Steps
from flows.linear import InvertibleConv1x1
from flows.multiscale import (
    channels_last,
    check_image_shape,
    halved_shape,
    levels_forward,
    levels_initialize,
    levels_inverse,
)
from flows.normalization import ActNorm
from flows.reshape import Squeeze


class Encoder(nn.Module):
    """A low-resolution image (B, 3, h, w) to features of two levels.

    Returns (B, F, 2h, 2w) and (B, F, h, w).
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, features, 3, padding=1)
        self.second = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, low_res: Tensor) -> tuple[Tensor, Tensor]:
        coarse = self.first(low_res).tanh()
        fine = self.second(F.interpolate(coarse, scale_factor=2, mode="nearest")).tanh()
        return fine.to(low_res.dtype), coarse.to(low_res.dtype)


class ConditionalNetwork(nn.Module):
    """The network of a coupling: half of the channels and a level's features to shift and scale."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels // 2 + features, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.last(self.first(torch.cat([x, context], dim=1)).relu()).to(x.dtype)


class SuperResolution(FlowModel):
    """p(high_res | low_res) of images that are four times as high and wide as the given ones."""

    conditioned_on = Images(channels=3)

    def __init__(
        self,
        shape: Sequence[int | None] = (3, None, None),
        depth: int = 2,
        features: int = 4,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.context_encoder = Encoder(features)

        def steps(channels: int) -> Steps:
            networks = [ConditionalNetwork(channels, features) for _ in range(depth)]
            return Steps(
                (ActNorm(channels), InvertibleConv1x1(channels), SigmoidCoupling(network))
                for network in networks
            )

        self.levels = module_list(
            [
                Compose([Squeeze(), steps(12), SplitPrior(12, edges=False)]),
                Compose([Squeeze(), steps(24)]),
            ]
        )

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        image = check_image_shape("SuperResolution", shape or self.shape, 2, "flow.n_levels", 2)
        return halved_shape(2 * image[0], image, 1), halved_shape(8 * image[0], image, 2)

    def sample_shape(self, encoding: Encoded | None) -> tuple[int, ...]:
        height, width = encoding.value[-1].shape[-2:]
        return 3, 4 * height, 4 * width

    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        zero = x.new_zeros(len(x))
        encoding = self.encoded(context, len(x))
        latents, log_det = levels_forward(self.levels, channels_last(x), zero, encoding)
        return tuple(latents), log_det

    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        encoding = self.encoded(context, len(z[0]))
        zero = z[0].new_zeros(len(z[0]))
        latents = [channels_last(level) for level in z]
        return levels_inverse(self.levels, latents, zero, encoding)

    def initialize_layers(self, x: Tensor, context: Context = None) -> None:
        levels_initialize(self.levels, channels_last(x), self.encoded(context, len(x)))
