"""RealNVP: Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio; ICLR 2017, arXiv 1605.08803)."""

import torch
from torch import Tensor, nn

from flows.base import Compose, Flow, FlowModel, Inverted, no_log_det
from flows.conditioners import MLPConditioner, ResidualConditioner, WeightNormConv2d
from flows.coupling import ChannelCoupling, MaskedCoupling
from flows.elementwise import Logit
from flows.masks import Checkerboard
from flows.multiscale import back_through, channels_last, check_image_shape, halved, through
from flows.normalization import CouplingBatchNorm
from flows.reshape import OrderedSqueeze, Squeeze


class RealNVP(FlowModel):
    """The multi-scale model for images (section 3.6, figure 4; authors' code where it says more or other).

    | data                 | n_scales | hidden_channels | n_blocks | source                                        |
    |----------------------|----------|-----------------|----------|-----------------------------------------------|
    | 32x32 (ImageNet)     | 4        | 32              | 4        | section 4.1; scales: until the last is 4x4    |
    | 64x64 (LSUN, CelebA) | 5        | 32              | 2        | section 4.1 (the released commands say 4)     |
    | CIFAR-10             | 2        | 64              | 8        | section 4.1, "downscale only once"            |

    Each scale but the last: three checkerboard couplings, squeeze, three channel couplings, unsqueeze, ordered
    squeeze, half of the channels factored out. The last scale: four checkerboard couplings. Widths double per scale
    and once more for channel couplings (code; the paper's section 3.6 is ambiguous for CIFAR-10, and a public port
    keeps 64 throughout). Where paper and code differ the code made the numbers: the symmetric logit (`Logit`), shift
    before scale (`AffineCoupling`), batch moments in training (`CouplingBatchNorm`), ordered squeeze.

    shape: (C, H, W); H and W may be None, for images of any size that can be halved n_scales - 1 times.
    x: (B, *shape) in [0, 1]. Latents: one a scale; all but the last are factored-out halves, (2C_i, H_i/2, W_i/2).
    """

    def __init__(
        self, shape=(3, 32, 32), n_scales=2, hidden_channels=64, n_blocks=8, alpha=0.05
    ) -> None:
        super().__init__()
        if min(n_scales, hidden_channels, n_blocks) < 1:
            raise ValueError(
                "flow.n_scales, flow.hidden_channels and flow.n_blocks must be at least 1"
            )
        self.shape, self.n_scales = tuple(shape), n_scales
        self.check_image_shape(self.shape)
        channels = self.shape[0]
        self.logit = Logit(alpha)
        self.scales = nn.ModuleList()
        for i in range(n_scales):
            last = i == n_scales - 1
            self.scales.append(self._scale(channels * 2**i, hidden_channels * 2**i, n_blocks, last))
        self.to(
            memory_format=torch.channels_last
        )  # as `forward` and `inverse` make the data: convolutions are faster

    @staticmethod
    def _scale(channels: int, hidden: int, n_blocks: int, last: bool) -> Compose:
        def checker(parity: int) -> Flow:
            mask = Checkerboard(parity)
            conditioner = ResidualConditioner(channels, hidden, n_blocks, mask)
            return MaskedCoupling(
                mask, conditioner, 0.0, CouplingBatchNorm(channels, mask.complement())
            )

        def channel(swap: bool) -> Flow:
            conditioner = ResidualConditioner(2 * channels, 2 * hidden, n_blocks)
            return ChannelCoupling(conditioner, swap, 1.0, CouplingBatchNorm(2 * channels))

        if last:
            return Compose([checker(1), checker(0), checker(1), checker(0)])
        return Compose(
            [
                *[checker(1), checker(0), checker(1)],
                Squeeze(),
                *[channel(False), channel(True), channel(False)],
                Inverted(Squeeze()),
                OrderedSqueeze(channels),
            ]
        )

    def check_image_shape(self, shape: tuple[int | None, ...]) -> None:
        """ValueError, one line: no (C, H, W), or of sizes that the scales halve to odd ones."""
        check_image_shape("RealNVP", shape, self.n_scales - 1, "flow.n_scales", self.n_scales)

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        channels, height, width = self.shape if shape is None else shape
        self.check_image_shape((channels, height, width))
        last = self.n_scales - 1
        halvings = [*range(1, last + 1), last]
        return tuple((channels * 2**i, halved(height, i), halved(width, i)) for i in halvings)

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        context = self.encoded(context)
        x, log_det = self.logit(channels_last(x), context)
        latents, log_det = through(self.scales, x, log_det, context)
        return tuple(latents), log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        context = self.encoded(context)
        latents = [channels_last(level) for level in z]
        x, log_det = back_through(self.scales, latents, no_log_det(latents[-1]), context)
        x, logit_log_det = self.logit.inverse(x, context)
        return x, log_det + logit_log_det

    def l2_penalty(self) -> Tensor:
        """Sum of magnitude^2 over weight-norm convolutions and of a^2 over checkerboard couplings, a scalar.

        The authors' code regularises the variables named `magnitude` and `rescaling_scale`; the channel couplings'
        `scale` is not among them. The paper says "L2 regularization on the weight scale parameters" (section 4.1).
        """
        magnitudes = [
            m.magnitude
            for m in self.modules()
            if isinstance(m, WeightNormConv2d) and m.magnitude is not None
        ]
        factors = [m.log_scale_factor for m in self.modules() if isinstance(m, MaskedCoupling)]
        return sum(p.square().sum() for p in magnitudes + factors)


class RealNVP2d(FlowModel):
    """RealNVP for points: couplings that change one coordinate after the other.

    The model of a widely copied two-moons notebook (two separate three-layer networks of 256, tanh on s), with its
    log-determinant put right: the notebook sums s over the kept coordinate too (see `MaskedCoupling`). Differs from
    it further in the learned factor before tanh and in shifting before scaling, as RealNVP for images here.
    """

    def __init__(self, shape=(2,), n_couplings=6, hidden_channels=256) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if min(n_couplings, hidden_channels) < 1:
            raise ValueError("flow.n_couplings and flow.hidden_channels must be at least 1")
        if self.shape != (2,):
            raise ValueError(
                f"RealNVP2d models points of two coordinates, not data of shape {self.shape}"
            )
        masks = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]
        self.couplings = Compose(
            MaskedCoupling(masks[i % 2], MLPConditioner(2, hidden_channels), 1.0)
            for i in range(n_couplings)
        )

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        return (self.shape,)

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        z, log_det = self.couplings(x, self.encoded(context))
        return (z,), log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        return self.couplings.inverse(z[0], self.encoded(context))
