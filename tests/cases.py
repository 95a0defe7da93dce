"""The one list of tiny instances that every generic test runs over.

A new flow gets its tests by one line here.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sketch_nice import Nice
from sketch_residual import ResidualFlow
from sketch_super_resolution import SuperResolution
from torch import Tensor, nn

from flows.base import Bijection, Compose, Flow, Inverted
from flows.conditioners import MLPConditioner, ResidualConditioner
from flows.coupling import (
    AdditiveCoupling,
    AffineInjector,
    ChannelCoupling,
    MaskedCoupling,
    SigmoidCoupling,
)
from flows.elementwise import Logit, Shift
from flows.glow import Glow
from flows.glow.conditioner import GlowConditioner
from flows.glow.priors import SplitPrior, TopPrior
from flows.glow.steps import Steps
from flows.linear import ChannelPermutation, InvertibleConv1x1, InvertibleConv1x1LU
from flows.masks import checkerboard
from flows.normalization import ActNorm, CouplingBatchNorm, uninitialized
from flows.realnvp import RealNVP, RealNVP2d
from flows.reshape import OrderedSqueeze, Squeeze
from flows.srflow import SRFlow
from flows.srflow.steps import ConditionalSteps


@dataclass(frozen=True)
class Case:
    """A flow to be tested, and how.

    make: returns a fresh flow in float32.
    shape: of one datum.
    unit_interval: the data lie in [0, 1], not on the whole line.
    noise: the standard deviation of what `trained` adds to the weights. Little where a scale is an
        exponential, as exp(3 s) in Glow.
    context: of a conditional flow: makes n rows of it for data of a shape, in float64 or int64.
    tolerance: of round trips and log-determinants in float64; an iterative inverse needs more.
    iterations: the argument `n_iterations` of `make`, where the inverse or the log-determinant is
        an iteration; else None.
    """

    name: str
    make: Callable[..., Bijection]
    shape: tuple[int, ...]
    is_model: bool = False
    unit_interval: bool = False
    noise: float = 0.3
    context: Callable[[int, tuple[int, ...], torch.Generator], Tensor] | None = None
    tolerance: float = 1e-8
    iterations: int | None = None

    def build(self) -> Bijection:
        """A fresh flow, with as many iterations as its tolerance needs."""
        if self.iterations is None:
            return self.make()
        return self.make(n_iterations=self.iterations)

    def conditions(
        self, n: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[Tensor, ...]:
        """The arguments of a flow's methods after n data.

        There are none, or a context, or a context (which may be None) and noise.
        """
        generator = torch.Generator().manual_seed(100 + seed)
        context = None
        if self.context is not None:
            context = self.context(n, self.shape, generator)
            if context.is_floating_point():
                context = context.to(dtype)
        noise_shape = getattr(self.build(), "noise_shape", None)
        if noise_shape is not None:
            noise = torch.rand(n, *noise_shape, generator=generator, dtype=torch.float64).to(dtype)
            return context, noise
        if context is None:
            return ()
        return (context,)

    def data(self, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """n data, (n, *shape).

        They are drawn in float64, so that every dtype sees the same numbers, and off centre, so
        that their mean matters.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.unit_interval:
            return torch.rand(n, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
        return (
            0.4 + 1.3 * torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        ).to(dtype)


def masked_image_coupling() -> MaskedCoupling:
    mask = checkerboard(4, 6, 1)
    return MaskedCoupling(
        mask[None], ResidualConditioner(2, 4, 1, mask), 0.0, CouplingBatchNorm(2, 1 - mask)
    )


def masked_point_coupling() -> MaskedCoupling:
    return MaskedCoupling(torch.tensor([0.0, 1.0, 1.0]), MLPConditioner(3, 5), 1.0)


def channel_coupling(swap: bool, norm: bool = True) -> ChannelCoupling:
    batch_norm = CouplingBatchNorm(2) if norm else None
    return ChannelCoupling(ResidualConditioner(2, 4, 1), swap, 1.0, batch_norm)


def glow_step() -> tuple[Flow, Flow, Flow]:
    return ActNorm(4), InvertibleConv1x1LU(4), SigmoidCoupling(GlowConditioner(2, 4, 5, True))


def conditional_step() -> tuple[Flow, Flow, Flow]:
    injector = AffineInjector(GlowConditioner(0, 8, 5, False, 3, 1.0), 1e-2, 1.01)
    coupling = SigmoidCoupling(GlowConditioner(2, 4, 5, False, 3, 1.0), 1e-2, 1.01)
    return ActNorm(4, 1.0), InvertibleConv1x1LU(4), Compose([injector, coupling])


def glow(
    name: str,
    shape: tuple[int, ...],
    depth: int = 2,
    noise: float = 0.05,
    context=None,
    **arguments,
) -> Case:
    def make() -> Glow:
        return Glow(shape, depth=depth, hidden_channels=5, **arguments)

    return Case(name, make, shape, is_model=True, unit_interval=True, noise=noise, context=context)


def low_res(n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Low-resolution images, (n, C, H / 4, W / 4), for images of `shape`, (C, H, W)."""
    channels, height, width = shape
    return torch.rand(
        n, channels, height // 4, width // 4, generator=generator, dtype=torch.float64
    )


def features(n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Encoded images of three channels, (n, 3, H, W), for a layer's input of `shape`."""
    return torch.rand(n, 3, *shape[1:], generator=generator, dtype=torch.float64)


def srflow(name: str, shape: tuple[int, ...], **arguments) -> Case:
    def make() -> SRFlow:
        tiny = {"depth": 1, "transition_depth": 1, "hidden_channels": 3}
        encoder = {"encoder_blocks": 2, "encoder_channels": 3, "encoder_growth": 2}
        return SRFlow(**tiny | encoder | {"stacked": (0, 1)} | arguments)

    return Case(
        name,
        make,
        shape,
        is_model=True,
        unit_interval=True,
        noise=0.02,
        context=low_res,
    )


def classes(n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """n of three classes, (n,)."""
    return torch.randint(3, (n,), generator=generator)


CASES = [
    Case(
        "Compose",
        lambda: Compose([channel_coupling(False), Squeeze(), OrderedSqueeze(16)]),
        (4, 4, 4),
    ),
    Case("Inverted", lambda: Inverted(channel_coupling(True, norm=False)), (4, 2, 3)),
    Case("Logit", Logit, (2, 3, 5), unit_interval=True),
    Case("Squeeze", Squeeze, (3, 4, 6)),
    Case("OrderedSqueeze", lambda: OrderedSqueeze(3), (3, 4, 6)),
    Case("MaskedCoupling-image", masked_image_coupling, (2, 4, 6)),
    Case("MaskedCoupling-points", masked_point_coupling, (3,)),
    Case("ChannelCoupling", lambda: channel_coupling(False), (4, 2, 3)),
    Case("ChannelCoupling-swap", lambda: channel_coupling(True), (4, 2, 3)),
    Case("CouplingBatchNorm", lambda: CouplingBatchNorm(3), (3, 2, 4)),
    Case("CouplingBatchNorm-mask", lambda: CouplingBatchNorm(3, checkerboard(2, 4, 0)), (3, 2, 4)),
    Case("Shift", lambda: Shift(-0.5), (2, 3, 5)),
    Case("ActNorm", lambda: ActNorm(3), (3, 2, 4)),
    Case("ChannelPermutation", lambda: ChannelPermutation(torch.randperm(6)), (6, 2, 3)),
    Case("InvertibleConv1x1", lambda: InvertibleConv1x1(4), (4, 2, 3)),
    Case("InvertibleConv1x1LU", lambda: InvertibleConv1x1LU(4), (4, 2, 3)),
    Case("AdditiveCoupling", lambda: AdditiveCoupling(GlowConditioner(2, 2, 5, True)), (4, 2, 3)),
    Case(
        "SigmoidCoupling",
        lambda: SigmoidCoupling(GlowConditioner(2, 4, 5, True)),
        (4, 2, 3),
        noise=0.1,
    ),
    Case(
        "SigmoidCoupling-no-edges",
        lambda: SigmoidCoupling(GlowConditioner(2, 4, 5, False)),
        (4, 2, 3),
        noise=0.1,
    ),
    Case(
        "SigmoidCoupling-floor",
        lambda: SigmoidCoupling(GlowConditioner(2, 4, 5, True), 0.25),
        (4, 2, 3),
        noise=0.1,
    ),
    Case(
        "SigmoidCoupling-context",
        lambda: SigmoidCoupling(GlowConditioner(2, 4, 5, False, 3, 1.0), 1e-2, 1.01),
        (4, 2, 3),
        noise=0.1,
        context=features,
    ),
    Case(
        "AffineInjector",
        lambda: AffineInjector(GlowConditioner(0, 8, 5, False, 3, 1.0), 1e-2, 1.01),
        (4, 2, 3),
        noise=0.1,
        context=features,
    ),
    Case("Steps", lambda: Steps(glow_step() for _ in range(3)), (4, 2, 3), noise=0.03),
    Case(
        "ConditionalSteps",
        lambda: ConditionalSteps(conditional_step() for _ in range(2)),
        (4, 2, 3),
        noise=0.05,
        context=features,
    ),
    Case("SplitPrior", lambda: SplitPrior(4, True), (4, 2, 3)),
    Case("TopPrior", lambda: TopPrior(4, True), (4, 2, 3)),
    glow("Glow", (3, 4, 8), n_levels=2),
    glow("Glow-1level", (1, 4, 4), n_levels=1, min_scale=0.25),
    glow("Glow-depth32", (1, 4, 4), n_levels=2, depth=32, noise=0.01),
    glow(
        "Glow-additive-shuffle-logit",
        (2, 8, 8),
        n_levels=3,
        coupling="additive",
        permutation="shuffle",
        alpha=0.05,
    ),
    glow("Glow-reverse-no-edges", (2, 4, 4), n_levels=2, permutation="reverse", edges=False),
    glow("Glow-plain-W", (2, 4, 4), n_levels=2, permutation="invertible_plain"),
    glow("Glow-classes", (2, 4, 4), n_levels=2, n_classes=3, context=classes),
    Case(
        "Glow-any-size",
        lambda: Glow((2, None, None), 2, 1, 5),
        (2, 4, 8),
        is_model=True,
        unit_interval=True,
        noise=0.05,
    ),
    srflow("SRFlow", (3, 8, 16)),
    srflow("SRFlow-plain", (3, 4, 8), n_levels=2, injector=False, permutation="invertible_plain"),
    Case(
        "RealNVP-2scales",
        lambda: RealNVP((3, 4, 6), 2, 4, 1),
        (3, 4, 6),
        is_model=True,
        unit_interval=True,
    ),
    Case(
        "RealNVP-3scales",
        lambda: RealNVP((1, 8, 8), 3, 3, 1),
        (1, 8, 8),
        is_model=True,
        unit_interval=True,
    ),
    Case(
        "RealNVP-any-size",
        lambda: RealNVP((1, None, None), 2, 3, 1),
        (1, 4, 6),
        is_model=True,
        unit_interval=True,
    ),
    Case("sketch-NICE", lambda: Nice((1, 2, 3)), (1, 2, 3), is_model=True),
    Case(
        "sketch-SuperResolution",
        SuperResolution,
        (3, 8, 4),
        is_model=True,
        noise=0.05,
        context=low_res,
    ),
    Case("sketch-ResidualFlow", ResidualFlow, (3,), is_model=True, tolerance=1e-6, iterations=40),
    Case("RealNVP2d", lambda: RealNVP2d(n_couplings=4, hidden_channels=8), (2,), is_model=True),
]


# realnvp_cifar10 as a run of seconds: four steps an epoch, validated after every third step.
TINY = [
    "preset=demo",
    "logger.name=none",
    "flow.hidden_channels=4",
    "flow.n_blocks=1",
    "data.size=8",
    "data.n_train=64",
    "data.batch_size=16",
    "data.n_val=24",
    "data.n_test=40",
    "eval.bn_images=32",
    "samples.n=4",
    "samples.every_n_steps=3",
    "trainer.val_check_interval=3",
    "checkpoint.every_n_steps=2",
    "trainer.precision=32-true",
]
MODELS = [case for case in CASES if case.is_model]
LAYERS = [case for case in CASES if not case.is_model]


def fresh(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> Bijection:
    """A newly built flow, whose weights `seed` decides; torch's own generator does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.build().to(dtype)


def trained(case: Case, dtype: torch.dtype = torch.float32) -> Bijection:
    """A flow in eval mode with other weights and running statistics than the initial ones.

    They are the same at every call.
    """
    return copy.deepcopy(_trained(case, dtype))


@functools.cache
def _trained(case: Case, dtype: torch.dtype) -> Bijection:
    flow = fresh(case, dtype=dtype)
    with torch.no_grad():
        if uninitialized(flow):
            flow.initialize(case.data(64, dtype, seed=20), *case.conditions(64, dtype)[:1])
        perturb(flow, case.noise)
        for seed in range(20):
            flow(case.data(16, dtype, seed), *case.conditions(16, dtype, seed))
    return flow.eval()


def perturb(flow: nn.Module, scale: float = 0.3, seed: int = 1) -> nn.Module:
    """Add Gaussian noise to every parameter, in place.

    Factors that are 0 at first would hide a term from a test.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return flow


def flat(z: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The latents of a model, or the output of a layer, as one matrix, (B, D)."""
    levels = z if isinstance(z, tuple) else (z,)
    return torch.cat([level.flatten(1) for level in levels], dim=1)
