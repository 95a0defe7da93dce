"""SRFlow: Learning the Super-Resolution Space with Normalizing Flow.

Lugmayr, Danelljan, Van Gool, Timofte; ECCV 2020, arXiv 2006.14200.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from flows.base import Compose, Flow, FlowModel, module_list, no_log_det
from flows.checks import LARGEST_DEPTH, check_count
from flows.context import Context, Encoded, Encoding, Images
from flows.coupling import AffineInjector, SigmoidCoupling
from flows.glow.conditioner import GlowConditioner
from flows.glow.model import PERMUTATIONS, check_choice
from flows.glow.priors import SplitPrior
from flows.glow.steps import Step, Steps
from flows.multiscale import (
    MOST_HALVINGS,
    ImageShape,
    channels_last,
    check_image_shape,
    halved_shape,
    levels_forward,
    levels_initialize,
    levels_inverse,
)
from flows.normalization import ActNorm
from flows.reshape import Squeeze
from flows.srflow.encoder import RRDBEncoder
from flows.srflow.steps import ConditionalSteps


class SRFlow(FlowModel):
    """p(high_res | low_res) of photographs (section 3, figure 2).

    | data   | scale | n_levels | encoder_blocks | stacked      | source        |
    |--------|-------|----------|----------------|--------------|---------------|
    | DF2K   | 4     | 3        | 23             | 1, 8, 15, 22 | authors' code |
    | DF2K   | 8     | 4        | 23             | 1, 3, 5, 7   | authors' code |
    | CelebA | 8     | 4        | 8              | 1, 3, 5, 7   | authors' code |

    Each of n_levels (L) levels is a squeeze, transition_depth steps without a coupling, and depth
    (K) conditional steps. A conditional step is an actnorm, a permutation of the channels, an
    affine injector (`AffineInjector`) and an affine coupling; the networks of both take the level's
    features of the low-resolution image (`RRDBEncoder`). After every level but the last two, half
    of the channels is factored out, with a Gaussian prior that depends on the other half
    (`SplitPrior`). The prior of the last level is a standard normal.

    Where the paper and the authors' code differ, this model follows the code, whose weights gave
    the published numbers: the scale of injectors and couplings is sigmoid(r + 2) + min_scale and
    comes after the shift; the last two levels are not split; the priors of the splits do not see
    the low-resolution image; x is not centred.

    shape: (3, H, W); H and W may be None, for images of any size. Sides are multiples of 2^L, and
        of the scale if that is larger.
    scale: how many times larger high-resolution images are than low-resolution ones: 2, 4, 8, ...
    n_levels, depth, transition_depth, hidden_channels: L, K, the steps without a coupling, and the
        width of the networks.
    permutation: a key of flows.glow.model.PERMUTATIONS. The authors' code has "invertible_plain",
        in which the backward pass of ln|det W| could fail (andreas128/SRFlow issue 13).
    injector: whether conditional steps have an affine injector.
    min_scale: the smallest scale. The 1e-4 of the authors' code does not keep the inverse finite in
        all trained models (andreas128/SRFlow issue 2).
    encoder_blocks, encoder_channels, encoder_growth, stacked: arguments of `RRDBEncoder`.

    x: (B, *shape) in [0, 1]. The context is low_res, (B, 3, H / scale, W / scale) in [0, 1].
    Latents: one tensor for each split, and one of the last level. Raises ValueError: an argument is
    not known or out of range.

    >>> flow = SRFlow(depth=1, hidden_channels=4, encoder_blocks=2, encoder_channels=4,
    ...               encoder_growth=2, stacked=(0, 1))
    >>> x = torch.rand(8, 3, 16, 16)
    >>> low_res = torch.rand(8, 3, 4, 4)
    >>> flow.initialize(x, low_res)  # the actnorms, before training
    >>> latents, log_det = flow(x, low_res)
    >>> [z.shape for z in latents]
    [torch.Size([8, 6, 8, 8]), torch.Size([8, 96, 2, 2])]
    >>> flow.log_prob(x, low_res).shape
    torch.Size([8])
    >>> flow.sample(2, temperature=0.9, context=low_res[:1]).shape
    torch.Size([2, 1, 3, 16, 16])
    """

    unit_interval = True
    conditioned_on = Images(channels=3)
    shape: ImageShape
    levels: Sequence[Flow]
    context_encoder: RRDBEncoder

    def __init__(
        self,
        shape: Sequence[int | None] = (3, None, None),
        scale: int = 4,
        n_levels: int = 3,
        depth: int = 16,
        transition_depth: int = 2,
        hidden_channels: int = 64,
        permutation: str = "invertible",
        injector: bool = True,
        min_scale: float = 1e-4,
        encoder_blocks: int = 23,
        encoder_channels: int = 64,
        encoder_growth: int = 32,
        stacked: Sequence[int] = (1, 8, 15, 22),
    ) -> None:
        super().__init__()
        check_count("flow.n_levels", n_levels, least=1, most=MOST_HALVINGS)
        check_count("flow.depth", depth, least=1, most=LARGEST_DEPTH)
        check_count("flow.transition_depth", transition_depth, most=LARGEST_DEPTH)
        check_count("flow.hidden_channels", hidden_channels, least=1)
        check_choice("permutation", permutation, PERMUTATIONS)
        self.scale = scale
        self.n_levels = n_levels
        self.n_splits = max(0, n_levels - 2)
        self.context_encoder = RRDBEncoder(
            scale, encoder_blocks, encoder_channels, encoder_growth, stacked, n_levels
        )
        self.shape = self.check_image_shape(shape)
        n_features = self.context_encoder.n_features

        def conditioner(c_in: int, c_out: int) -> GlowConditioner:
            return GlowConditioner(
                c_in,
                c_out,
                hidden_channels,
                edges=False,
                context_channels=n_features,
                log_scale_factor=1.0,
            )

        def conditional(channels: int) -> Flow:
            half = channels // 2
            bounds = (min_scale, 1 + min_scale)
            coupling = SigmoidCoupling(conditioner(half, 2 * (channels - half)), *bounds)
            if not injector:
                return coupling
            return Compose([AffineInjector(conditioner(0, 2 * channels), *bounds), coupling])

        def step(channels: int, flow: Flow) -> Step:
            norm = ActNorm(channels, log_scale_factor=1.0)
            return norm, PERMUTATIONS[permutation](channels), flow

        levels = []
        channels = self.shape[0]
        for i in range(n_levels):
            channels *= 4  # the squeeze
            layers: list[Flow] = [Squeeze()]
            if transition_depth:
                layers.append(Steps(step(channels, Compose([])) for _ in range(transition_depth)))
            layers.append(
                ConditionalSteps(step(channels, conditional(channels)) for _ in range(depth))
            )
            if i < self.n_splits:
                layers.append(SplitPrior(channels, edges=False))
                channels //= 2
            levels.append(Compose(layers))
        self.levels = module_list(levels)
        # `forward` and `inverse` use this memory format for images: convolutions are faster in it.
        self.to(memory_format=torch.channels_last)

    def check_image_shape(self, shape: Sequence[int | None]) -> ImageShape:
        """The shape as (3, H, W).

        Raises ValueError: it is not of this form, or a side does not fit n_levels and the scale.
        """
        image = check_image_shape("SRFlow", shape, self.n_levels, "flow.n_levels", self.n_levels)
        channels, *sides = image
        if channels != 3:
            raise ValueError(f"SRFlow models images of 3 channels, not of {channels}")
        if any(side is not None and side % self.scale for side in sides):
            raise ValueError(
                f"SRFlow of flow.scale={self.scale} models images whose sides are multiples of "
                f"{self.scale}, not {sides[0]}x{sides[1]}"
            )
        return image

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        image = self.check_image_shape(shape or self.shape)
        splits = range(1, self.n_splits + 1)
        shapes = [halved_shape(image[0] * 2**i, image, i) for i in splits]
        n_channels = image[0] * 4**self.n_levels // 2**self.n_splits
        return *shapes, halved_shape(n_channels, image, self.n_levels)

    def sample_shape(self, encoding: Encoded | None) -> tuple[int, ...]:
        if encoding is None:
            return super().sample_shape(encoding)
        height, width = encoding.value[0].shape[-2:]
        return 3, 2 * height, 2 * width

    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        encoding = self._features(context, x)
        latents, log_det = levels_forward(
            self.levels, channels_last(x), no_log_det(x), encoding, self.n_splits
        )
        return tuple(latents), log_det

    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        encoding = self._features(context, z[-1], 2**self.n_levels)
        latents = [channels_last(level) for level in z]
        return levels_inverse(self.levels, latents, no_log_det(z[0]), encoding, self.n_splits)

    def initialize_layers(self, x: Tensor, context: Context = None) -> None:
        levels_initialize(self.levels, channels_last(x), self._features(context, x), self.n_splits)

    def _features(self, context: Context, like: Tensor, factor: int = 1) -> Encoding | None:
        """The features of each level, for images that are `factor` times as large as `like`.

        Raises ValueError: the context is not of the size that belongs to these images.
        """
        high_res = tuple(factor * side for side in like.shape[-2:])
        if isinstance(context, Encoded):
            finest = cast("tuple[Tensor, ...]", context.value)[0]
            size = tuple(2 * side // self.scale for side in finest.shape[-2:])
        else:
            self.conditioned_on.check(context, type(self).__name__)
            size = tuple(cast(Tensor, context).shape[-2:])
        if tuple(self.scale * side for side in size) != high_res:
            raise ValueError(
                f"images of {high_res[0]}x{high_res[1]} pixels need low_res of 1/{self.scale} of "
                f"their sides as context, not of {size[0]}x{size[1]}"
            )
        return self.encoded(context, len(like))
