"""RealNVP: Density estimation using Real NVP.

Dinh, Sohl-Dickstein, Bengio; ICLR 2017, arXiv 1605.08803. "The paper", sections and figures below
refer to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flows.base import Compose, Flow, FlowModel, Inverted, module_list, no_log_det
from flows.checks import LARGEST_DEPTH, check_count
from flows.conditioners import MLPConditioner, ResidualConditioner, WeightNormConv2d
from flows.context import Context
from flows.coupling import ChannelCoupling, MaskedCoupling
from flows.elementwise import Logit
from flows.masks import Checkerboard
from flows.multiscale import (
    MOST_HALVINGS,
    ImageShape,
    channels_last,
    check_image_shape,
    halved_shape,
    levels_forward,
    levels_inverse,
    of_level,
)
from flows.normalization import CouplingBatchNorm
from flows.reshape import OrderedSqueeze, Squeeze


class RealNVP(FlowModel):
    """The multi-scale model of images (section 3.6, figure 4).

    | data                 | n_scales | hidden_channels | n_blocks | source                       |
    |----------------------|----------|-----------------|----------|------------------------------|
    | 32x32 (ImageNet)     | 4        | 32              | 4        | section 4.1: halved to 4x4   |
    | 64x64 (LSUN, CelebA) | 5        | 32              | 2        | section 4.1 (code: 4 blocks) |
    | CIFAR-10             | 2        | 64              | 8        | section 4.1                  |

    Each scale but the last: three checkerboard couplings, squeeze, three channel couplings,
    unsqueeze, ordered squeeze (`OrderedSqueeze`), half of the channels factored out. The last
    scale: four checkerboard couplings.

    Where the paper and the authors' code differ, this model follows the code, which produced the
    published numbers: the symmetric logit (`Logit`), shift before scale (`AffineCoupling`), the
    batch's moments in training (`CouplingBatchNorm`), the ordered squeeze, and widths that double
    with each scale and once more for channel couplings (the paper is ambiguous for CIFAR-10).

    shape: (C, H, W); H and W may be None, for images of any size that can be halved n_scales - 1
        times.
    n_scales, hidden_channels, n_blocks: as in the table; hidden_channels is the width of the
        networks of the first scale, n_blocks the number of residual blocks in a network.
    alpha: the alpha of `Logit`.

    x: (B, *shape) in [0, 1]. Latents: one tensor for each scale. If the images of scale i are
    (C_i, H_i, W_i), its latents, which are factored out, are (2 C_i, H_i/2, W_i/2); those of the
    last scale are (C_i, H_i, W_i). Raises ValueError: an argument is out of range.

    >>> flow = RealNVP((3, 8, 8), n_scales=2, hidden_channels=4, n_blocks=1).eval()
    >>> latents, log_det = flow(torch.rand(5, 3, 8, 8))
    >>> [z.shape for z in latents]
    [torch.Size([5, 6, 4, 4]), torch.Size([5, 6, 4, 4])]
    >>> flow.inverse(latents)[0].shape, log_det.shape
    (torch.Size([5, 3, 8, 8]), torch.Size([5]))
    """

    unit_interval = True
    shape: ImageShape
    scales: Sequence[Flow]

    def __init__(
        self,
        shape: Sequence[int | None] = (3, 32, 32),
        n_scales: int = 2,
        hidden_channels: int = 64,
        n_blocks: int = 8,
        alpha: float = 0.05,
    ) -> None:
        super().__init__()
        check_count("flow.n_scales", n_scales, least=1, most=MOST_HALVINGS)
        check_count("flow.hidden_channels", hidden_channels, least=1)
        check_count("flow.n_blocks", n_blocks, least=1, most=LARGEST_DEPTH)
        self.n_scales = n_scales
        self.shape = self.check_image_shape(shape)
        self.logit = Logit(alpha)
        channels = self.shape[0]
        scales = [
            _scale(channels * 2**i, hidden_channels * 2**i, n_blocks) for i in range(n_scales - 1)
        ]
        last = n_scales - 1
        scales.append(_last_scale(channels * 2**last, hidden_channels * 2**last, n_blocks))
        self.scales = module_list(scales)
        # `forward` and `inverse` use this memory format for images: convolutions are faster in it.
        self.to(memory_format=torch.channels_last)

    def check_image_shape(self, shape: Sequence[int | None]) -> ImageShape:
        """The shape as (C, H, W).

        Raises ValueError: it is not of this form, or a side cannot be halved n_scales - 1 times.
        """
        return check_image_shape(
            "RealNVP", shape, self.n_scales - 1, "flow.n_scales", self.n_scales
        )

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        image = self.check_image_shape(shape or self.shape)
        last = self.n_scales - 1
        return tuple(halved_shape(image[0] * 2**i, image, i) for i in (*range(1, last + 1), last))

    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        encoding = self.encoded(context, len(x))
        x, log_det = self.logit(channels_last(x))
        latents, log_det = levels_forward(self.scales, x, log_det, encoding)
        return tuple(latents), log_det

    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        encoding = self.encoded(context, len(z[0]))
        latents = [channels_last(level) for level in z]
        x, log_det = levels_inverse(self.scales, latents, no_log_det(latents[-1]), encoding)
        x, logit_log_det = self.logit.inverse(x)
        return x, log_det + logit_log_det

    def l2_penalty(self) -> Tensor:
        """Return the sum of squares of the parameters that the authors' code regularises, a scalar.

        They are every `magnitude` of a `WeightNormConv2d` and every `log_scale_factor` of a
        checkerboard coupling: in the code, the variables named `magnitude` and `rescaling_scale`.
        The factor of channel couplings, called `scale` there, is not among them. The paper says "L2
        regularization on the weight scale parameters" (section 4.1).
        """
        magnitudes = [
            module.magnitude
            for module in self.modules()
            if isinstance(module, WeightNormConv2d) and module.magnitude is not None
        ]
        factors = [
            module.log_scale_factor
            for module in self.modules()
            if isinstance(module, MaskedCoupling)
        ]
        penalty = magnitudes[0].square().sum()
        for parameter in (*magnitudes[1:], *factors):
            penalty = penalty + parameter.square().sum()
        return penalty


def _scale(channels: int, hidden_channels: int, n_blocks: int) -> Compose:
    """A scale that is not the last, for images with `channels` channels.

    Its channel couplings work on 4 * channels channels, since they follow a squeeze.
    """

    def checkerboard_coupling(parity: int) -> MaskedCoupling:
        return _checkerboard_coupling(channels, hidden_channels, n_blocks, parity)

    def channel_coupling(swap: bool) -> ChannelCoupling:
        conditioner = ResidualConditioner(2 * channels, 2 * hidden_channels, n_blocks)
        norm = CouplingBatchNorm(2 * channels)
        return ChannelCoupling(conditioner, swap, log_scale_factor=1.0, norm=norm)

    return Compose(
        [
            *[checkerboard_coupling(parity) for parity in (1, 0, 1)],
            Squeeze(),
            *[channel_coupling(swap) for swap in (False, True, False)],
            Inverted(Squeeze()),
            OrderedSqueeze(channels),
        ]
    )


def _last_scale(channels: int, hidden_channels: int, n_blocks: int) -> Compose:
    """The last scale, for images with `channels` channels."""
    return Compose(
        _checkerboard_coupling(channels, hidden_channels, n_blocks, parity)
        for parity in (1, 0, 1, 0)
    )


def _checkerboard_coupling(
    channels: int, hidden_channels: int, n_blocks: int, parity: int
) -> MaskedCoupling:
    mask = Checkerboard(parity)
    conditioner = ResidualConditioner(channels, hidden_channels, n_blocks, mask)
    norm = CouplingBatchNorm(channels, mask.complement())
    return MaskedCoupling(mask, conditioner, log_scale_factor=0.0, norm=norm)


class RealNVP2d(FlowModel):
    """RealNVP for points in the plane: couplings that change the two coordinates in turn.

    It is the model of a widely copied two-moons notebook (separate three-layer networks of width
    256 for s and t, tanh on s) with a correct log-determinant: the notebook sums s over the kept
    coordinate too (see `MaskedCoupling`). It differs from the notebook in two more points: a
    learned factor multiplies the tanh, and x is shifted before it is scaled, as in `RealNVP`.

    shape: (2,), else ValueError. x: (B, 2). Latents: one tensor (B, 2).

    >>> flow = RealNVP2d(n_couplings=4, hidden_channels=8)
    >>> (z,), log_det = flow(torch.rand(5, 2))
    >>> z.shape, log_det.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        shape: Sequence[int | None] = (2,),
        n_couplings: int = 6,
        hidden_channels: int = 256,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        check_count("flow.n_couplings", n_couplings, least=1, most=LARGEST_DEPTH)
        check_count("flow.hidden_channels", hidden_channels, least=1)
        if self.shape != (2,):
            raise ValueError(
                f"RealNVP2d models points of two coordinates, not data of shape {self.shape}"
            )
        # Lists, because tensors would have no values under torch.device("meta").
        masks = [[0.0, 1.0], [1.0, 0.0]]
        self.couplings = Compose(
            MaskedCoupling(masks[i % 2], MLPConditioner(2, hidden_channels), 1.0)
            for i in range(n_couplings)
        )

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        return ((2,),)

    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        z, log_det = self.couplings(x, of_level(self.encoded(context, len(x)), 0))
        return (z,), log_det

    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        return self.couplings.inverse(z[0], of_level(self.encoded(context, len(z[0])), 0))
