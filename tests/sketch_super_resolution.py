"""A sketch of SRFlow (Lugmayr et al. 2020): a flow of any size given a low-resolution image, of public parts alone.

The image is encoded once, also for many samples; every level takes its own part of what the encoder gives.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.base import Compose, FlowModel
from flows.context import Encoded, Images
from flows.coupling import SigmoidCoupling
from flows.glow.priors import SplitPrior
from flows.glow.steps import Steps
from flows.linear import InvertibleConv1x1
from flows.multiscale import (
    back_through,
    channels_last,
    check_image_shape,
    initialize_through,
    through,
)
from flows.normalization import ActNorm
from flows.reshape import Squeeze


class Encoder(nn.Module):
    """A low-resolution image (B, 3, h, w) to features of two levels, (B, F, 2h, 2w) and (B, F, h, w)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(3, features, 3, padding=1),
            nn.Conv2d(features, features, 3, padding=1),
        )

    def forward(self, low_res: Tensor) -> tuple[Tensor, Tensor]:
        coarse = self.first(low_res).tanh()
        fine = self.second(F.interpolate(coarse, scale_factor=2, mode="nearest")).tanh()
        return fine.to(low_res.dtype), coarse.to(low_res.dtype)


class ConditionalNetwork(nn.Module):
    """The network of a coupling: half of the channels and the level's features to shift and raw scale."""

    def __init__(self, channels: int, features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels // 2 + features, 8, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.last(self.first(torch.cat([x, context], dim=1)).relu()).to(x.dtype)


class SuperResolution(FlowModel):
    """p(high_res | low_res) for images that are four times as high and wide as the low-resolution ones."""

    conditioned_on = Images(channels=3)

    def __init__(self, shape=(3, None, None), depth: int = 2, features: int = 4) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.context_encoder = Encoder(features)

        def steps(channels: int) -> Steps:
            coupling = (
                SigmoidCoupling(ConditionalNetwork(channels, features)) for _ in range(depth)
            )
            return Steps(
                (ActNorm(channels), InvertibleConv1x1(channels), part) for part in coupling
            )

        self.levels = nn.ModuleList(
            [
                Compose([Squeeze(), steps(12), SplitPrior(12, edges=False)]),
                Compose([Squeeze(), steps(24)]),
            ]
        )

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        channels, height, width = shape or self.shape
        check_image_shape("SuperResolution", (channels, height, width), 2, "flow.n_levels", 2)
        return (2 * channels, height // 2, width // 2), (8 * channels, height // 4, width // 4)

    def sample_shape(self, encoding: Encoded | None) -> tuple[int, ...]:
        return (self.shape[0], *(4 * side for side in encoding.value[-1].shape[-2:]))

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        zero = x.new_zeros(len(x))
        latents, log_det = through(self.levels, channels_last(x), zero, self.encoded(context))
        return tuple(latents), log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        latents = [channels_last(level) for level in z]
        return back_through(self.levels, latents, z[0].new_zeros(len(z[0])), self.encoded(context))

    def initialize(self, x: Tensor, context=None) -> None:
        initialize_through(self.levels, channels_last(x), self.encoded(context))
