"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal; NeurIPS 2018, arXiv 1807.03039)."""

import torch
from torch import Tensor, nn

from flows.base import Compose, Flow, FlowModel
from flows.coupling import AdditiveCoupling, SigmoidCoupling
from flows.elementwise import Logit, Shift
from flows.glow.conditioner import GlowConditioner
from flows.glow.edges import ZeroLinear
from flows.glow.priors import SplitPrior, TopPrior
from flows.glow.steps import Steps
from flows.linear import ChannelPermutation, InvertibleConv1x1, InvertibleConv1x1LU
from flows.normalization import ActNorm
from flows.reshape import Squeeze, factor_in, factor_out

PERMUTATIONS = {  # section 3.2; figure 3 compares the first three
    "reverse": lambda channels: ChannelPermutation(torch.arange(channels).flip(0)),
    "shuffle": lambda channels: ChannelPermutation(torch.randperm(channels)),
    "invertible": InvertibleConv1x1LU,
    "invertible_plain": InvertibleConv1x1,  # W itself is the parameter, the default of the authors' code
}
COUPLINGS = ("affine", "additive")


class Glow(FlowModel):
    """The multi-scale model (section 3, figure 2; authors' code where it says more or other).

    | data             | n_levels | depth | coupling | n_bits | batch | source                                        |
    |------------------|----------|-------|----------|--------|-------|-----------------------------------------------|
    | CIFAR-10         | 3        | 32    | affine   | 8      | 512   | authors' README and code                      |
    | ImageNet 32x32   | 3        | 48    | affine   | 8      | 512   | authors' README and code                      |
    | ImageNet 64x64   | 4        | 48    | affine   | 8      | 128   | authors' README and code                      |
    | LSUN 64x64       | 4        | 48    | affine   | 8      | 128   | the paper's appendix; README: 3 levels        |
    | CelebA-HQ 256    | 6        | 32    | additive | 5      | 40    | authors' README and code                      |

    n_levels (L) times: squeeze, depth (K) steps, half of the channels factored out. A step is actnorm, a permutation of
    the channels, a coupling. The priors of factored-out halves depend on the half that goes on, and that of the last
    level is learned: all latents returned are standard normal, eps of the paper's samples. Where paper and code
    differ the code made the numbers: scale sigmoid(. + 2) (`SigmoidCoupling`), actnorm inside the networks
    (`GlowConditioner`), a channel that marks the border (`EdgeConv2d`; edges=False leaves it out as public ports do).

    permutation: one of PERMUTATIONS. n_classes: the last level's prior also depends on the class (authors' code,
    `ycond`), which is then the context, (B,) int64. alpha: of a logit in front (other papers); None: x - 1/2.
    min_scale: of affine couplings (additive ones have no scales); the authors' is 0 (`SigmoidCoupling`).
    x: (B, *shape) in [0, 1]. Latents: one a level.
    """

    def __init__(
        self,
        shape=(3, 32, 32),
        n_levels=3,
        depth=32,
        hidden_channels=512,
        coupling="affine",
        permutation="invertible",
        edges=True,
        n_classes: int | None = None,
        alpha: float | None = None,
        min_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape, self.n_classes = tuple(shape), n_classes
        if len(self.shape) != 3:
            raise ValueError(f"Glow models images (C, H, W), not data of shape {self.shape}")
        channels, height, width = self.shape
        if min(n_levels, depth, hidden_channels) < 1:
            raise ValueError("flow.n_levels, flow.depth and flow.hidden_channels must be at least 1")
        if height % 2**n_levels or width % 2**n_levels:
            raise ValueError(
                f"flow.n_levels={n_levels} halves a {height}x{width} image to odd sizes: give fewer levels"
            )
        for key, value, known in (("coupling", coupling, COUPLINGS), ("permutation", permutation, PERMUTATIONS)):
            if value not in known:
                raise ValueError(f"flow.{key}={value} is not known: give one of {', '.join(known)}")

        def step(channels: int, size: tuple[int, int] | None) -> tuple[Flow, Flow, Flow]:
            out = channels if coupling == "affine" else channels // 2
            conditioner = GlowConditioner(channels // 2, out, hidden_channels, size)
            affine = SigmoidCoupling(conditioner, min_scale) if coupling == "affine" else AdditiveCoupling(conditioner)
            return ActNorm(channels), PERMUTATIONS[permutation](channels), affine

        self.preprocess = Shift(-0.5) if alpha is None else Logit(alpha)
        levels, latent_shapes = [], []
        for i in range(n_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            size = (height, width) if edges else None
            steps = Steps(step(channels, size) for _ in range(depth))
            if i < n_levels - 1:
                levels.append(Compose([Squeeze(), steps, SplitPrior(channels, size)]))
                channels //= 2
            else:
                levels.append(Compose([Squeeze(), steps]))
            latent_shapes.append((channels, height, width))
        self.levels, self.latent_shapes = nn.ModuleList(levels), tuple(latent_shapes)
        self.prior = TopPrior(channels, size, n_classes)
        self.classifier = None if n_classes is None else ZeroLinear(channels, n_classes)
        self.to(memory_format=torch.channels_last)  # as `forward` and `inverse` make the data: convolutions are faster

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        x, total = self.preprocess(x.contiguous(memory_format=torch.channels_last))
        latents = []
        for level in self.levels[:-1]:
            x, log_det = level(x)
            x, z = factor_out(x)
            latents.append(z)
            total = total + log_det
        x, log_det = self.levels[-1](x)
        total = total + log_det
        z, log_det = self.prior(x, self._label(context))
        return (*latents, z), total + log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        z = [level.contiguous(memory_format=torch.channels_last) for level in z]
        x, total = self.prior.inverse(z[-1], self._label(context))
        x, log_det = self.levels[-1].inverse(x)
        total = total + log_det
        for level, latent in zip(reversed(self.levels[:-1]), reversed(z[:-1]), strict=True):
            x, log_det = level.inverse(factor_in(x, latent))
            total = total + log_det
        x, log_det = self.preprocess.inverse(x)
        return x, total + log_det

    def initialize(self, x: Tensor, context=None) -> None:
        x, _ = self.preprocess(x.contiguous(memory_format=torch.channels_last))
        for level in self.levels[:-1]:
            x, _ = factor_out(level.initialize(x))
        self.levels[-1].initialize(x)

    def log_prob_and_class_logits(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x | class), (B,) nats, and what the last level says of the class, (B, n_classes), in one pass.

        The logits are a `ZeroLinear` of that level's mean over space, before its prior, so they do not know the class
        (authors' code, `classifier`).
        """
        self.check_shape(x)
        latents, log_det = self(x, context)  # what may be compiled; the last level is taken back from its eps
        top, _ = self.prior.inverse(latents[-1], self._label(context))
        return self.base.log_prob(latents) + log_det, self.classifier(top.mean((2, 3)))

    def _label(self, context: Tensor | None) -> Tensor | None:
        if self.n_classes is not None and context is None:
            raise ValueError("this Glow is class-conditional: give the classes as context, (B,) int64")
        return None if self.n_classes is None else context
