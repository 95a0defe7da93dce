"""Glow: Generative Flow with Invertible 1x1 Convolutions (Kingma, Dhariwal; NeurIPS 2018, arXiv 1807.03039)."""

import torch
from torch import Tensor, nn

from flows.base import Compose, Flow, FlowModel
from flows.context import Classes
from flows.coupling import AdditiveCoupling, SigmoidCoupling
from flows.elementwise import Logit, Shift
from flows.glow.conditioner import GlowConditioner
from flows.glow.edges import ZeroLinear
from flows.glow.priors import SplitPrior, TopPrior
from flows.glow.steps import Steps
from flows.linear import ChannelPermutation, InvertibleConv1x1, InvertibleConv1x1LU
from flows.multiscale import (
    back_through,
    channels_last,
    check_image_shape,
    halved,
    initialize_through,
    through,
)
from flows.normalization import ActNorm
from flows.reshape import Squeeze

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
    shape: (C, H, W); H and W may be None, for images of any size that can be halved n_levels times.
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
        if min(n_levels, depth, hidden_channels) < 1:
            raise ValueError(
                "flow.n_levels, flow.depth and flow.hidden_channels must be at least 1"
            )
        for key, value, choices in (
            ("coupling", coupling, COUPLINGS),
            ("permutation", permutation, PERMUTATIONS),
        ):
            if value not in choices:
                raise ValueError(
                    f"flow.{key}={value} is not known: give one of {', '.join(choices)}"
                )
        self.shape, self.n_levels = tuple(shape), n_levels
        self.check_image_shape(self.shape)
        self.conditioned_on = None if n_classes is None else Classes(n_classes)

        def step(channels: int) -> tuple[Flow, Flow, Flow]:
            out = channels if coupling == "affine" else channels // 2
            conditioner = GlowConditioner(channels // 2, out, hidden_channels, edges)
            affine = (
                SigmoidCoupling(conditioner, min_scale)
                if coupling == "affine"
                else AdditiveCoupling(conditioner)
            )
            return ActNorm(channels), PERMUTATIONS[permutation](channels), affine

        self.preprocess = Shift(-0.5) if alpha is None else Logit(alpha)
        self.levels = nn.ModuleList()
        channels = self.shape[0]
        for i in range(n_levels):
            channels = 4 * channels
            steps = Steps(step(channels) for _ in range(depth))
            if i < n_levels - 1:
                self.levels.append(Compose([Squeeze(), steps, SplitPrior(channels, edges)]))
                channels //= 2
            else:
                self.levels.append(Compose([Squeeze(), steps]))
        self.prior = TopPrior(channels, edges, n_classes)
        self.classifier = None if n_classes is None else ZeroLinear(channels, n_classes)
        self.to(
            memory_format=torch.channels_last
        )  # as `forward` and `inverse` make the data: convolutions are faster

    def check_image_shape(self, shape: tuple[int | None, ...]) -> None:
        """ValueError, one line: no (C, H, W), or of sizes that the levels halve to odd ones."""
        check_image_shape("Glow", shape, self.n_levels, "flow.n_levels", self.n_levels)

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        channels, height, width = self.shape if shape is None else shape
        self.check_image_shape((channels, height, width))
        shapes = [
            (channels * 2**i, halved(height, i), halved(width, i)) for i in range(1, self.n_levels)
        ]
        last = self.n_levels
        return (*shapes, (channels * 2 ** (last + 1), halved(height, last), halved(width, last)))

    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        context = self.encoded(context)
        x, log_det = self.preprocess(channels_last(x), context)
        (*latents, top), log_det = through(self.levels, x, log_det, context)
        z, prior_log_det = self.prior(top, context)
        return (*latents, z), log_det + prior_log_det

    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        context = self.encoded(context)
        *latents, top = [channels_last(level) for level in z]
        top, log_det = self.prior.inverse(top, context)
        x, log_det = back_through(self.levels, [*latents, top], log_det, context)
        x, preprocess_log_det = self.preprocess.inverse(x, context)
        return x, log_det + preprocess_log_det

    def initialize(self, x: Tensor, context=None) -> None:
        # The class enters the last prior alone, which data do not set: it may be left out.
        context = None if context is None else self.encoded(context)
        x, _ = self.preprocess(channels_last(x), context)
        initialize_through(self.levels, x, context)

    def log_prob_and_class_logits(self, x: Tensor, context) -> tuple[Tensor, Tensor]:
        """log p(x | class), (B,) nats, and what the last level says of the class, (B, n_classes), in one pass.

        The logits are a `ZeroLinear` of that level's mean over space, before its prior, so they do not know the class
        (authors' code, `classifier`).
        """
        self.check_shape(x)
        encoding = self.encode_context(context)
        latents, log_det = self(
            x, encoding
        )  # what may be compiled; the last level is taken back from its eps
        top, _ = self.prior.inverse(latents[-1], encoding.value)
        return self.base.log_prob(latents) + log_det, self.classifier(top.mean((2, 3)))
