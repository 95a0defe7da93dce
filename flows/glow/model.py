"""Glow: Generative Flow with Invertible 1x1 Convolutions.

Kingma, Dhariwal; NeurIPS 2018, arXiv 1807.03039.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from flows.base import Compose, Flow, FlowModel, module_list
from flows.checks import LARGEST_DEPTH, check_count
from flows.context import Classes, Context
from flows.coupling import AdditiveCoupling, SigmoidCoupling
from flows.elementwise import Logit, Shift
from flows.glow.conditioner import GlowConditioner
from flows.glow.edges import ZeroLinear
from flows.glow.priors import SplitPrior, TopPrior
from flows.glow.steps import Step, Steps
from flows.linear import ChannelPermutation, InvertibleConv1x1, InvertibleConv1x1LU
from flows.multiscale import (
    MOST_HALVINGS,
    ImageShape,
    channels_last,
    check_image_shape,
    halved_shape,
    levels_forward,
    levels_initialize,
    levels_inverse,
    of_level,
)
from flows.normalization import ActNorm
from flows.reshape import Squeeze


def reverse(channels: int) -> ChannelPermutation:
    """The channels in reverse order."""
    return ChannelPermutation(torch.arange(channels).flip(0))


def shuffle(channels: int) -> ChannelPermutation:
    """The channels in a random order that is drawn once and then stays fixed."""
    return ChannelPermutation(torch.randperm(channels))


# Section 3.2; figure 3 compares the first three.
PERMUTATIONS: dict[str, Callable[[int], ChannelPermutation | InvertibleConv1x1]] = {
    "reverse": reverse,
    "shuffle": shuffle,
    "invertible": InvertibleConv1x1LU,
    "invertible_plain": InvertibleConv1x1,  # the default of the authors' code
}
COUPLINGS = ("affine", "additive")


class Glow(FlowModel):
    """The multi-scale model (section 3, figure 2).

    | data           | n_levels | depth | coupling | n_bits | batch | source                     |
    |----------------|----------|-------|----------|--------|-------|----------------------------|
    | CIFAR-10       | 3        | 32    | affine   | 8      | 512   | authors' README and code   |
    | ImageNet 32x32 | 3        | 48    | affine   | 8      | 512   | authors' README and code   |
    | ImageNet 64x64 | 4        | 48    | affine   | 8      | 128   | authors' README and code   |
    | LSUN 64x64     | 4        | 48    | affine   | 8      | 128   | appendix; README: 3 levels |
    | CelebA-HQ 256  | 6        | 32    | additive | 5      | 40    | authors' README and code   |

    Each of n_levels (L) levels is a squeeze and depth (K) steps, where a step is an actnorm, a
    permutation of the channels and a coupling. After every level but the last, half of the channels
    is factored out, with a Gaussian prior that depends on the other half (`SplitPrior`). The prior
    of the last level is learned too (`TopPrior`). Both are bijections onto a standard normal, which
    is therefore the base distribution of all latents returned. (In the table, n_bits and batch are
    settings of the data, not of the model.)

    Where the paper and the authors' code differ, this model follows the code, which produced the
    published numbers: the scale sigmoid(. + 2) (`SigmoidCoupling`), actnorms inside of the networks
    (`GlowConditioner`), a channel that marks the border (`EdgeConv2d`).

    shape: (C, H, W); H and W may be None, for images of any size that can be halved n_levels times.
    n_levels, depth, hidden_channels: L, K and the width of the coupling networks.
    coupling: "affine" or "additive".
    permutation: a key of PERMUTATIONS.
    edges: whether convolutions see where the border is (`EdgeConv2d`).
    n_classes: if given, the context is the class, (B,) int64, and the prior of the last level
        depends on it (authors' code, `ycond`).
    alpha: if given, images pass `Logit(alpha)` first, as in RealNVP; None: x - 1/2, as in the
        authors' code.
    min_scale: a lower bound of the scale of affine couplings (`SigmoidCoupling`); 0 in the authors'
        code.

    x: (B, *shape) in [0, 1]. Latents: one tensor for each level. Raises ValueError: an argument is
    not known or out of range.

    >>> flow = Glow((3, 8, 8), n_levels=2, depth=1, hidden_channels=4)
    >>> x = torch.rand(16, 3, 8, 8)
    >>> flow.initialize(x)  # the actnorms, before training
    >>> latents, log_det = flow(x)
    >>> [z.shape for z in latents]
    [torch.Size([16, 6, 4, 4]), torch.Size([16, 24, 2, 2])]
    >>> flow.log_prob(x).shape, flow.sample(2, temperature=0.7).shape
    (torch.Size([16]), torch.Size([2, 3, 8, 8]))
    """

    unit_interval = True
    shape: ImageShape
    levels: Sequence[Flow]
    classifier: ZeroLinear | None

    def __init__(
        self,
        shape: Sequence[int | None] = (3, 32, 32),
        n_levels: int = 3,
        depth: int = 32,
        hidden_channels: int = 512,
        coupling: str = "affine",
        permutation: str = "invertible",
        edges: bool = True,
        n_classes: int | None = None,
        alpha: float | None = None,
        min_scale: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("flow.n_levels", n_levels, least=1, most=MOST_HALVINGS)
        check_count("flow.depth", depth, least=1, most=LARGEST_DEPTH)
        check_count("flow.hidden_channels", hidden_channels, least=1)
        check_choice("coupling", coupling, COUPLINGS)
        check_choice("permutation", permutation, PERMUTATIONS)
        self.n_levels = n_levels
        self.shape = self.check_image_shape(shape)
        if n_classes is not None:
            self.conditioned_on = Classes(n_classes)

        def step(channels: int) -> Step:
            half = channels // 2
            layer: AdditiveCoupling
            if coupling == "affine":
                conditioner = GlowConditioner(half, channels, hidden_channels, edges)
                layer = SigmoidCoupling(conditioner, min_scale)
            else:
                conditioner = GlowConditioner(half, half, hidden_channels, edges)
                layer = AdditiveCoupling(conditioner)
            return ActNorm(channels), PERMUTATIONS[permutation](channels), layer

        self.preprocess = Shift(-0.5) if alpha is None else Logit(alpha)
        levels = []
        channels = 4 * self.shape[0]
        for _ in range(n_levels - 1):
            steps = Steps(step(channels) for _ in range(depth))
            levels.append(Compose([Squeeze(), steps, SplitPrior(channels, edges)]))
            channels *= 2  # half of them are factored out; the next squeeze makes four of each
        levels.append(Compose([Squeeze(), Steps(step(channels) for _ in range(depth))]))
        self.levels = module_list(levels)
        self.prior = TopPrior(channels, edges, n_classes)
        self.classifier = None
        if n_classes is not None:
            self.classifier = ZeroLinear(channels, n_classes)
        # `forward` and `inverse` use this memory format for images: convolutions are faster in it.
        self.to(memory_format=torch.channels_last)

    def check_image_shape(self, shape: Sequence[int | None]) -> ImageShape:
        """The shape as (C, H, W).

        Raises ValueError: it is not of this form, or a side cannot be halved n_levels times.
        """
        return check_image_shape("Glow", shape, self.n_levels, "flow.n_levels", self.n_levels)

    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        image = self.check_image_shape(shape or self.shape)
        last = self.n_levels
        shapes = [halved_shape(image[0] * 2**i, image, i) for i in range(1, last)]
        return *shapes, halved_shape(image[0] * 2 ** (last + 1), image, last)

    def forward(self, x: Tensor, context: Context = None) -> tuple[tuple[Tensor, ...], Tensor]:
        self.check_data(x)
        encoding = self.encoded(context, len(x))
        x, log_det = self.preprocess(channels_last(x))
        (*latents, top), log_det = levels_forward(self.levels, x, log_det, encoding)
        z, prior_log_det = self.prior(top, of_level(encoding, -1))
        return (*latents, z), log_det + prior_log_det

    def inverse(self, z: tuple[Tensor, ...], context: Context = None) -> tuple[Tensor, Tensor]:
        self.check_latents(z)
        encoding = self.encoded(context, len(z[0]))
        *latents, top = [channels_last(level) for level in z]
        top, log_det = self.prior.inverse(top, of_level(encoding, -1))
        x, log_det = levels_inverse(self.levels, [*latents, top], log_det, encoding)
        x, preprocess_log_det = self.preprocess.inverse(x)
        return x, log_det + preprocess_log_det

    def initialize_layers(self, x: Tensor, context: Context = None) -> None:
        # Only the last prior depends on the class, and data do not set it: no class is needed.
        encoding = None
        if context is not None:
            encoding = self.encoded(context, len(x))
        x, _ = self.preprocess(channels_last(x))
        levels_initialize(self.levels, x, encoding)

    def log_prob_and_class_logits(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """log p(x | class), (B,) nats, and logits of the class, (B, n_classes), in one pass.

        The classifier is a `ZeroLinear` applied to the spatial mean of the last level. It comes
        before the prior, so its logits do not depend on the given class (authors' code,
        `classifier`).

        Raises ValueError: x or the context does not fit the model, or the model has no classes.
        """
        self.check_data(x)
        encoding = self.encode_context(context)
        if encoding is None or self.classifier is None:
            raise ValueError("this Glow is not class-conditional: build it with n_classes")
        # `self(...)` returns the last level only as eps: the prior's inverse gives it back.
        latents, log_det = self(x, encoding)
        top, _ = self.prior.inverse(latents[-1], of_level(encoding.value, -1))
        return self.base.log_prob(latents) + log_det, self.classifier(top.mean((2, 3)))


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value of `flow.<key>` that is not one of the choices. Raises ValueError."""
    if value not in choices:
        raise ValueError(f"flow.{key}={value} is not known: give one of {', '.join(choices)}")
