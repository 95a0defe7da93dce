"""Super-resolution as a likelihood: p(high_res | low_res), the objective of SRFlow."""

import math
import warnings
from typing import Any, Literal, Protocol, Self, cast, get_args

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from flows.base import FlowModel, UninitializedWarning
from flows.caching import cached
from flows.context import Encoded
from flows.srflow.padding import padded
from lightning_modules.callbacks.image_quality import SuperResolved
from lightning_modules.checks import check_count, check_not_negative, check_number
from lightning_modules.density import DensityModule
from lightning_modules.noise import Position, image_generator
from lightning_modules.numerics import FAILURES, report_failure
from lightning_modules.objective import Data, Input, Objective
from lightning_modules.precision import evaluation
from results.metrics import Metric

NoiseName = Literal["normal", "uniform", "none"]
NOISES: tuple[str, ...] = get_args(NoiseName)
LEVELS = 255  # the largest grey level; images in [0, 1] are grey levels over it
N_BITS = 8
SIGMA = 4 / math.sqrt(3)  # grey levels
MOST_SAMPLES = 1000  # of an image, in a test
PICTURE = 160  # pixels of the sides of pictures that are drawn during training


class ConditionalFlow(Protocol):
    """What this objective reads of a flow of high-resolution images."""

    scale: int  # the side of an image over that of the low-resolution one
    n_levels: int  # how often the flow halves an image
    context_encoder: nn.Module


class GreyLevelNoise(nn.Module):
    """Turns grey levels q, uint8 from 0 to 255, into x = (q + n) / 255, with noise n.

        normal    n ~ N(0, std^2). The paper (Lugmayr et al. 2020) adds such noise.
        uniform   n ~ U(-1/2, 1/2), so that the density of q + n bounds the probability of q.
        none      n = 0, as the authors' released code trains.

    Rounding 255 x gives q for a sample without noise, as `quality.super_resolution.as_uint8` does.
    The dequantisers of datamodules/ scale q by 256 instead.

    It is a `Dequantization`: see there for `noise` and `kind`.

    name: one of NOISES. std: in grey levels, of the normal noise. Raises ValueError: one of them is
    out of its range.

    >>> q = torch.tensor([[0, 255]], dtype=torch.uint8)
    >>> x, log_weight = GreyLevelNoise("uniform")(q, torch.tensor([[0.5, 0.75]]))
    >>> (255 * x).tolist()
    [[0.0, 255.25]]
    """

    noise: Literal["uniform", "normal"]
    kind: str

    def __init__(self, name: NoiseName = "normal", std: float = SIGMA) -> None:
        super().__init__()
        if name not in NOISES:
            raise ValueError(f"optim.noise={name} is not known: give one of {', '.join(NOISES)}")
        check_not_negative("optim.noise_std", std)
        self.name = name
        self.std = std
        self.noise = "normal"
        self.kind = "noisy"
        if name == "uniform":
            self.noise = "uniform"
            self.kind = "exact"

    def forward(
        self, q: Tensor, noise: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, in the dtype of the noise, and log_weight, (B,) nats.

        log_weight is D ln(256/255), so that bits per dimension are those of the density of grey
        levels: `bits_per_dim` takes x for grey levels over 256.

        q: (B, *shape), uint8. noise: (B, *shape), of the kind that `self.noise` names.
        """
        offsets = {"normal": self.std * noise, "uniform": noise - 0.5, "none": 0 * noise}
        x = (q.to(noise.dtype) + offsets[self.name]) / LEVELS
        log_weight = q[0].numel() * math.log(2**N_BITS / LEVELS)
        return x, noise.new_full((len(q),), log_weight)

    def initialize(self, q: Tensor, noise: Tensor, context: Tensor | None = None) -> None:
        """Nothing: there are no parts that depend on data."""

    def extra_repr(self) -> str:
        return f"{self.name}, std={self.std:g}"


class SuperResolutionModule(DensityModule):
    """Minimises the mean of -log p(high_res | low_res), in nats an image (Lugmayr et al. 2020).

    Batches are (high_res uint8 (B, 3, H, W), index, low_res uint8 (B, 3, H/s, W/s)). The flow gets
    x = (high_res + noise) / 255 and the context low_res / 255.

    The first metric is the density of the noisy grey levels in bits/dim, `bpd_noisy`; with uniform
    noise it is `bpd`. `release_bits` is the number that the authors' code reports: bits of
    -log p(x), for x in [0, 1], divided by the number of pixels, not of values. Bits/dim are a third
    of it and log2(255). Images whose sides the flow cannot halve often enough lose pixels at the
    right and below for these two.

    Validation and test also return super-resolved images, for the callback `ImageQuality`: one for
    each image in validation, `samples` in a test. Their latents are a function of noise_seed and
    the image's index.

    The encoder of low_res can be frozen in the first part of training. It then runs without a
    gradient, so that neither its weights nor the optimizer's moments of them change. All its
    parameters keep `requires_grad`, since DDP averages only gradients that are required when it
    wraps the module.

    noise, noise_std: see `GreyLevelNoise`; the default is the standard deviation of the paper.
    encoder_frozen_until: the share of trainer.max_steps in which the encoder is frozen: 0.5 in the
        paper, 0 in the authors' code, which never freezes it; 1: it is never trained.
    samples: how many images a test makes of each low-resolution one, to measure their diversity.
    temperature: the standard deviation of the latents of these images.
    The other arguments are those of `DensityModule`. Raises ValueError: one is out of its range.
    """

    extra_metrics = (Metric("release_bits", "lower", "bits/pixel"),)

    def __init__(
        self,
        flow: FlowModel,
        dequantizer: nn.Module | None,
        n_bits: int | None,
        seed: int,
        noise: NoiseName = "normal",
        noise_std: float = SIGMA,
        encoder_frozen_until: float = 0.5,
        samples: int = 5,
        temperature: float = 0.9,
        **arguments: Any,
    ) -> None:
        if dequantizer is None:
            dequantizer = GreyLevelNoise(noise, noise_std)
        super().__init__(flow, dequantizer, n_bits, seed, **arguments)
        check_number(
            "optim.encoder_frozen_until",
            encoder_frozen_until,
            "a share of the steps, from 0 to 1",
            lambda share: 0 <= share <= 1,
        )
        check_count("eval.samples", samples, least=1, most=MOST_SAMPLES)
        check_not_negative("eval.temperature", temperature)
        if n_bits != N_BITS:
            raise ValueError(f"super-resolution is of images of {N_BITS} bits, not of {n_bits}")
        self.encoder_frozen_until = encoder_frozen_until
        self.samples = samples
        self.temperature = temperature
        of_images = cast(ConditionalFlow, flow)
        self.scale = of_images.scale
        self.multiple = max(1, 2**of_images.n_levels // self.scale)  # of the sides of low_res

    @classmethod
    def of(
        cls,
        config: DictConfig,
        model: nn.Module,
        data: Data,
        dequantizer: nn.Module | None = None,
    ) -> Self:
        """Make the module that a recipe describes.

        An encoder of random weights, which neither `flow.encoder_checkpoint` nor `init_from` gives,
        is trained from the first step on. The arguments are those of `DensityModule.of`.
        """
        settings = {**config.optim, **config.eval}
        names = (config.flow.get("encoder_checkpoint"), config.get("init_from"))
        if names == (None, None):
            settings["encoder_frozen_until"] = 0.0
        flow = cast(FlowModel, model)
        return cls(flow, dequantizer, data.n_bits, config.seed, shape=data.shape, **settings)

    # ----------------------------------------------------------------------------- declarations

    @property
    def encoder(self) -> nn.Module:
        """The part of the flow that encodes low_res."""
        return cast(ConditionalFlow, self.flow).context_encoder

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the encoder is frozen in the step that is running."""
        share = self.encoder_frozen_until
        if share in (0, 1):
            return share == 1
        return self.trainer.global_step < share * self.trainer.max_steps

    def check_data(self, data: Data) -> None:
        check_scale(data, self.scale)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule. Raises ValueError: the run has no last step."""
        if 0 < self.encoder_frozen_until < 1 and self.trainer.max_steps < 1:
            raise ValueError(
                f"optim.encoder_frozen_until={self.encoder_frozen_until} is a share of the steps: "
                "set trainer.max_steps"
            )
        return super().configure_optimizers()

    def trial(self, n: int) -> Tensor | None:
        """The loss on n random images of the size of a training crop."""
        high_res = torch.randint(0, LEVELS, (n, *cast(tuple[int, ...], self.shape)))
        low_res = high_res[:, :, :: self.scale, :: self.scale]
        batch = [high_res.to(torch.uint8), torch.arange(n), low_res.to(torch.uint8)]
        sample = self.training_input(batch, Position(epoch=0, step=0))
        with warnings.catch_warnings():  # a trial comes before the initialisation
            warnings.simplefilter("ignore", UninitializedWarning)
            return -self.flow.log_prob(*sample.arguments).mean()

    def capture(self) -> None:
        """Raises ValueError: a graph would hold the encoder frozen, or trained, for ever."""
        Objective.capture(self)

    # ----------------------------------------------------------------------------- inputs

    def context(self, batch: list[Tensor]) -> Tensor:
        """The low-resolution images of a batch, (B, 3, h, w) in [0, 1]."""
        return batch[2].to(self.float_dtype) / LEVELS

    def input_of(self, batch: list[Tensor], k: int = 0) -> Input:
        """As `DensityModule.input_of`, of the upper left part that the flow can halve."""
        return super().input_of(self.halvable(batch), k)

    def halvable(self, batch: list[Tensor]) -> list[Tensor]:
        """The upper left part of a batch whose low_res has sides that are multiples of `multiple`.

        The flow can halve its high_res as often as it has to. Raises ValueError: it is too small.
        """
        sides = batch[2].shape[2:]
        height = whole(sides[0], self.multiple)
        width = whole(sides[1], self.multiple)
        if not height or not width:
            raise ValueError(
                f"a low-resolution image has {sides[0]} x {sides[1]} pixels, and this "
                f"{self.model_name} needs {self.multiple} x {self.multiple}: leave it out"
            )
        return part_of(batch, (0, 0), (height, width))

    # ----------------------------------------------------------------------------- training

    def objective(
        self, x: Tensor, context: Tensor | None = None, *noise: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """log p(x | context), (B,) nats, and a penalty that is zero.

        The penalty of several processes connects the frozen encoder with the loss, by gradients of
        zero: DDP waits for a gradient of every parameter.
        """
        if not self.encoder_is_frozen:
            return self.run(self.flow.log_prob, x, context), 0.0
        with torch.no_grad():
            encoding = cast(Encoded, self.flow.encode_context(context))
        penalty: Tensor | float = 0.0
        if self.trainer.world_size > 1:
            penalty = 0 * sum(parameter.sum() for parameter in self.encoder.parameters())
        return self.flow.log_prob(x, encoding), penalty

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Take the gradients of a frozen encoder away, so that the optimizer leaves it alone."""
        if self.encoder_is_frozen:
            for parameter in self.encoder.parameters():
                parameter.grad = None
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ----------------------------------------------------------------------------- evaluation

    def evaluate(
        self, flow: FlowModel, x: Tensor, context: Tensor | None = None, *noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x | context), (B,) nats, and `release_bits`."""
        log_prob = flow.log_prob(x, context)
        n_pixels = x.shape[2] * x.shape[3]
        return log_prob, {"release_bits": -log_prob / (n_pixels * math.log(2))}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        """Log the likelihood, and return one image for each, but not before training."""
        super().validation_step(batch, batch_idx)
        if self.trainer.sanity_checking:
            return None
        return self.super_resolved(batch, 1)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        """Log the likelihood, and return `samples` images for each."""
        super().test_step(batch, batch_idx)
        return self.super_resolved(batch, self.samples)

    def super_resolved(self, batch: list[Tensor], n: int) -> SuperResolved:
        """n images for each of a batch. They are NaN where the flow cannot be inverted at all."""
        high_res, indices, low_res = batch
        parts = []
        with evaluation(self.device.type), torch.no_grad(), cached(self.flow):
            for index, image in zip(indices.tolist(), self.context(batch).split(1), strict=True):
                generator = image_generator(index, self.noise_seed)
                try:
                    part = super_resolve(self.flow, image, n, self.temperature, generator)
                except FAILURES as error:
                    report_failure("super-resolved images", error.with_traceback(None))
                    part = torch.full((n, 1, *high_res.shape[1:]), torch.nan, device=image.device)
                parts.append(part)
        return SuperResolved(low_res, high_res, torch.cat(parts, 1))

    # ----------------------------------------------------------------------------- pictures

    def draw(
        self, n: int, temperature: float, seed: int, batch: list[Tensor] | None = None
    ) -> Tensor | None:
        """n images for the middle of the first image of a batch, (n, 3, H, W); None without one."""
        if batch is None:
            return None
        _, _, low_res = self.middle(batch)
        generator = torch.Generator().manual_seed(seed)
        context = low_res[:1].to(self.device, self.float_dtype) / LEVELS
        return super_resolve(self.flow, context, n, temperature, generator)[:, 0]

    def reconstruct(self, batch: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """The middle of the images and f^-1(f(x)) of it, (B, 3, H, W) each."""
        return super().reconstruct(self.middle(batch))

    def middle(self, batch: list[Tensor]) -> list[Tensor]:
        """The middle of all images of a batch, of at most PICTURE pixels a side."""
        return middle_of(batch, self.multiple)


def whole(side: int, multiple: int) -> int:
    """The largest multiple of a number that is not above a side.

    >>> whole(15, multiple=4)
    12
    """
    return side // multiple * multiple


def part_of(batch: list[Tensor], corner: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    """The same part of the high_res and the low_res of a batch.

    corner: its upper left pixel in low_res, (row, column). size: (height, width) in low_res.
    """
    high_res, indices, low_res = batch
    scale = high_res.shape[2] // low_res.shape[2]
    for axis in (0, 1):
        high_res = high_res.narrow(2 + axis, scale * corner[axis], scale * size[axis])
        low_res = low_res.narrow(2 + axis, corner[axis], size[axis])
    return [high_res, indices, low_res]


def middle_of(batch: list[Tensor], multiple: int = 1) -> list[Tensor]:
    """The middle of the images of a batch, of at most PICTURE pixels a side.

    multiple: of the sides of low_res.
    """
    sides = batch[2].shape[2:]
    longest = PICTURE * sides[0] // batch[0].shape[2]
    height, width = (whole(min(side, longest), multiple) for side in sides)
    corner = ((sides[0] - height) // 2, (sides[1] - width) // 2)
    return part_of(batch, corner, (height, width))


def check_scale(data: Data, scale: int) -> None:
    """Refuse data without low-resolution images, or with images of another scale than a model's.

    Raises ValueError.
    """
    of_data = getattr(data, "scale", None)
    if of_data is None:
        raise ValueError(
            f"{type(data).__name__} has no low-resolution images: give data.name=super_resolution"
        )
    if of_data != scale:
        raise ValueError(f"flow.scale={scale} does not fit data.scale={of_data}: give the same")


def super_resolve(
    flow: FlowModel, low_res: Tensor, n: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Draw n images for each low-resolution one, neither clipped nor rounded.

    Images whose sides the flow cannot halve often enough are mirrored at the right and below, and
    the images that are drawn are cut off there again. low_res is encoded once, and the images are
    drawn one after the other, which takes the least memory.

    flow: a `ConditionalFlow`. low_res: (B, 3, h, w) in [0, 1]. temperature: the standard deviation
    of the latents. Returns (n, B, 3, s h, s w).
    """
    of_images = cast(ConditionalFlow, flow)
    scale = of_images.scale
    enlarged, (height, width) = padded(low_res, max(1, 2**of_images.n_levels // scale))
    encoding = flow.encode_context(enlarged)
    shape = (3, scale * enlarged.shape[2], scale * enlarged.shape[3])
    images = [
        flow.sample(1, temperature, encoding, shape=shape, generator=generator)[0] for _ in range(n)
    ]
    return torch.stack(images)[..., : scale * height, : scale * width]
