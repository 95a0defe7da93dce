"""RealNVP: Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio; ICLR 2017, arXiv 1605.08803)."""

import torch
from torch import Tensor, nn

from flows.base import Compose, Flow, FlowModel, Inverted
from flows.conditioners import MLPConditioner, ResidualConditioner, WeightNormConv2d
from flows.coupling import ChannelCoupling, MaskedCoupling, checkerboard
from flows.elementwise import Logit
from flows.normalization import CouplingBatchNorm
from flows.reshape import OrderedSqueeze, Squeeze, factor_in, factor_out


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

    x: (B, *shape) in [0, 1]. Latents: one a scale; all but the last are factored-out halves, (2C_i, H_i/2, W_i/2).
    """

    def __init__(self, shape=(3, 32, 32), n_scales=2, hidden_channels=64, n_blocks=8, alpha=0.05) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if len(self.shape) != 3:
            raise ValueError(f"RealNVP models images (C, H, W), not data of shape {self.shape}")
        channels, height, width = self.shape
        if min(n_scales, hidden_channels, n_blocks) < 1:
            raise ValueError("flow.n_scales, flow.hidden_channels and flow.n_blocks must be at least 1")
        if height % 2 ** (n_scales - 1) or width % 2 ** (n_scales - 1):
            raise ValueError(
                f"flow.n_scales={n_scales} halves a {height}x{width} image to odd sizes: give fewer scales"
            )
        self.logit = Logit(alpha)
        self.scales = nn.ModuleList()
        latent_shapes = []
        for i in range(n_scales):
            last = i == n_scales - 1
            self.scales.append(self._scale((channels, height, width), hidden_channels * 2**i, n_blocks, last))
            if not last:
                channels, height, width = 2 * channels, height // 2, width // 2
            latent_shapes.append((channels, height, width))
        self.latent_shapes = tuple(latent_shapes)
        self.to(memory_format=torch.channels_last)  # as `forward` and `inverse` make the data: convolutions are faster

    @staticmethod
    def _scale(shape: tuple[int, int, int], hidden: int, n_blocks: int, last: bool) -> Compose:
        channels, height, width = shape

        def checker(parity: int) -> Flow:
            mask = checkerboard(height, width, parity)
            conditioner = ResidualConditioner(channels, hidden, n_blocks, mask)
            return MaskedCoupling(mask[None], conditioner, 0.0, CouplingBatchNorm(channels, 1 - mask))

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

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        x, total = self.logit(x.contiguous(memory_format=torch.channels_last))
        latents = []
        for scale in self.scales[:-1]:
            x, log_det = scale(x)
            x, z = factor_out(x)
            latents.append(z)
            total = total + log_det
        z, log_det = self.scales[-1](x)
        return (*latents, z), total + log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        z = [level.contiguous(memory_format=torch.channels_last) for level in z]
        x, total = self.scales[-1].inverse(z[-1])
        for scale, latent in zip(reversed(self.scales[:-1]), reversed(z[:-1]), strict=True):
            x, log_det = scale.inverse(factor_in(x, latent))
            total = total + log_det
        x, log_det = self.logit.inverse(x)
        return x, total + log_det

    def l2_penalty(self) -> Tensor:
        """Sum of magnitude^2 over weight-norm convolutions and of a^2 over checkerboard couplings, a scalar.

        The authors' code regularises the variables named `magnitude` and `rescaling_scale`; the channel couplings'
        `scale` is not among them. The paper says "L2 regularization on the weight scale parameters" (section 4.1).
        """
        magnitudes = [
            m.magnitude for m in self.modules() if isinstance(m, WeightNormConv2d) and m.magnitude is not None
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
        if self.shape != (2,):
            raise ValueError(f"RealNVP2d models points of two coordinates, not data of shape {self.shape}")
        self.latent_shapes = (self.shape,)
        masks = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]
        self.couplings = Compose(
            MaskedCoupling(masks[i % 2], MLPConditioner(2, hidden_channels), 1.0) for i in range(n_couplings)
        )

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        z, log_det = self.couplings(x)
        return (z,), log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        return self.couplings.inverse(z[0])
