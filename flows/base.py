"""The one contract that every layer and every model of this house keeps."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flows.bases import Base, StandardNormal
from flows.context import Classes, ContextKind, Encoded


class Flow(nn.Module, ABC):
    """A bijection z = f(x) with log|det df/dx|.

    Layers map tensor to tensor. `log_det` is in nats, one number an image, shape (B,), at least float32.
    `context` is what a conditional flow depends on. A layer that holds others, or a network, hands it on to all of
    them; one without a use for it ignores it.
    """

    @abstractmethod
    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        """Data to latent: z = f(x) and log|det df/dx|, (B,)."""

    @abstractmethod
    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        """Latent to data: x = f^-1(z) and log|det df^-1/dz|, (B,): minus that of `forward` at x."""

    def initialize(self, x: Tensor, context=None) -> Tensor:
        """Set what depends on data (`ActNorm`) from a first batch, as far as it is not yet set. Returns f(x).

        A layer that holds others hands it on, in the order of `forward`. Call it under `torch.no_grad()`, once.
        """
        return self(x, context)[0]


class Compose(Flow):
    """f = f_n o ... o f_1; the log-determinants add up (Dinh et al. 2017, section 3.5)."""

    def __init__(self, layers: Iterable[Flow]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        total = no_log_det(x)
        for layer in self.layers:
            x, log_det = layer(x, context)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        total = no_log_det(z)
        for layer in reversed(self.layers):
            z, log_det = layer.inverse(z, context)
            total = total + log_det
        return z, total

    def initialize(self, x: Tensor, context=None) -> Tensor:
        for layer in self.layers:
            x = layer.initialize(x, context)
        return x


class Inverted(Flow):
    """The same bijection read backwards: `forward` is the wrapped flow's `inverse`."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return self.flow.inverse(x, context)

    def inverse(self, z: Tensor, context=None) -> tuple[Tensor, Tensor]:
        return self.flow(z, context)


class FlowModel(Flow):
    """A whole model: a bijection from data of `shape` onto a base of equal size.

    Differs from a layer in two things. The latent is a tuple, one tensor a level, also where there is one level. And
    the context is the raw one (labels, a low-resolution image), which `context_encoder` turns into what the layers
    take, once a call.

    A subclass sets `shape` and says what else is true of it:

    shape: of one datum. Entries may be None: any size that the model can halve, e.g. (3, None, None).
    base: the distribution of the latents.
    conditioned_on: what the context is (`Classes`, `Images`); None where the model takes none.
    context_encoder: a module that maps a context to what the layers take, a tensor or a tuple of them, one a level,
        with the rows of the context; None: the layers take the context itself.
    noise_shape: None for an exact log-determinant. A flow whose log-determinant is an estimate (FFJORD, Residual Flow)
        gives the shape of one datum's noise, uniform in [0, 1), that the estimate is a function of; `forward`,
        `inverse` and `log_prob` then take `noise`, (B, *noise_shape), behind the context. `sample` calls `inverse`
        without it, and drops the log-determinant.
    needs_autograd: whether also evaluation needs gradients, as an estimate by autograd does. No inference mode then.
    """

    shape: tuple[int | None, ...]
    base: Base = StandardNormal()
    conditioned_on: ContextKind | None = None
    context_encoder: nn.Module | None  # of an instance: a class attribute would hide the module
    noise_shape: tuple[int, ...] | None = None
    needs_autograd: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.context_encoder = None

    @abstractmethod
    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        """x (B, *shape) to latents, a tuple of (B, *latent_shape), and log_det (B,) in nats.

        A model that hands a context on takes `self.encoded(context)` first.
        """

    @abstractmethod
    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        """Latents to x (B, *shape) and the log_det of the inverse, (B,) in nats."""

    @abstractmethod
    def latent_shapes(self, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
        """The shape of one latent each, for data of `shape`; None: of the model's own. ValueError: it does not fit."""

    @property
    def n_classes(self) -> int | None:
        """The number of classes of a class-conditional model, else None."""
        return self.conditioned_on.n_classes if isinstance(self.conditioned_on, Classes) else None

    def log_prob(self, x: Tensor, context=None, noise: Tensor | None = None) -> Tensor:
        """log p(x) = log p(z) + log|det dz/dx|, nats, (B,) (Dinh et al. 2017, section 3.1).

        noise: (B, *noise_shape), of an estimated log-determinant only. ValueError, one line: x has another shape, the
        context is none, or the noise is missing or not asked for.
        """
        self.check_shape(x)
        self.check_noise(noise)
        context = self.encode_context(context)
        if context is not None and len(context) != len(x):
            raise ValueError(f"{len(context)} contexts for {len(x)} data: give one each")
        latents, log_det = self(x, context) if noise is None else self(x, context, noise)
        return self.base.log_prob(latents) + log_det

    def encode_context(self, context) -> Encoded | None:
        """A context as the layers take it, for several calls with the same one. ValueError, one line: it is none."""
        if self.conditioned_on is None:
            if context is not None:
                raise ValueError(
                    f"this {type(self).__name__} is not conditioned on anything: leave the context out"
                )
            return None
        if isinstance(context, Encoded):
            return context
        self.conditioned_on.check(context, type(self).__name__)
        return Encoded(context if self.context_encoder is None else self.context_encoder(context))

    def encoded(self, context) -> Tensor | tuple[Tensor, ...] | None:
        """What the layers take: of a raw context encoded now, of an `Encoded` one as it is."""
        encoding = self.encode_context(context)
        return None if encoding is None else encoding.value

    def compile(self, *args, **kwargs) -> None:
        """torch.compile every conditioner: those of one shape share their graphs. The whole flow would take minutes.

        All conditioners are one piece of code, with a graph for each shape, and each batch size and mode they are
        called in: soon more than the 8 after which torch stops compiling and says so in a log only. Sizes are
        constants of a graph (dynamic=False), since what depends on them alone is one (`constant`).
        """
        kwargs.setdefault("dynamic", False)
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.modules():
            if hasattr(layer, "conditioner"):
                layer.conditioner.compile(*args, **kwargs)
            if hasattr(layer, "by_hand"):
                layer.by_hand = False  # else it would not call its conditioners

    def check_shape(self, x: Tensor) -> None:
        """ValueError, one line: x is not (B, *shape), or a size that is free does not fit the model."""
        actual = tuple(x.shape[1:])
        fits = len(actual) == len(self.shape)
        fits = fits and all(
            own in (None, side) for own, side in zip(self.shape, actual, strict=True)
        )
        if not fits:
            own = str(self.shape).replace("None", "any")
            raise ValueError(
                f"{type(self).__name__} was built for data of shape {own}, not {actual}"
            )
        if None in self.shape:
            self.latent_shapes(actual)

    def check_noise(self, noise: Tensor | None) -> None:
        """ValueError, one line: an estimated log-determinant lacks its noise, or an exact one was handed some."""
        name = type(self).__name__
        if self.noise_shape is not None and noise is None:
            shape = f"(B, {', '.join(map(str, self.noise_shape))})"
            raise ValueError(
                f"the log-determinant of {name} is an estimate: give noise {shape}, uniform in [0, 1)"
            )
        if self.noise_shape is None and noise is not None:
            raise ValueError(f"the log-determinant of {name} is exact: leave the noise out")

    def initialize(self, x: Tensor, context=None) -> None:
        """Set what depends on data from a first batch, (B, *shape), where the model has such layers."""

    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        context=None,
        *,
        shape: tuple[int, ...] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw n data points, (n, *shape): x = f^-1(tau * eps), eps ~ base. Call it in eval mode.

        With a context of B rows n are drawn for each row: (n, B, *shape); the context is encoded once.
        Images come out in about [0, 1]: a model whose data passed a logit reaches a little beyond.
        shape: of one datum, for a model of any size; None: `sample_shape` says it. ValueError, one line: it does not.
        """
        like = next(self.parameters())
        encoding = self.encode_context(context)
        latent_shapes = self.latent_shapes(shape or self.sample_shape(encoding))
        if encoding is None:
            return self.inverse(self.base.sample(n, latent_shapes, temperature, generator, like))[0]
        rows = len(encoding)
        latents = self.base.sample(n * rows, latent_shapes, temperature, generator, like)
        return self.inverse(latents, encoding.repeated(n))[0].unflatten(0, (n, rows))

    def sample_shape(self, encoding: Encoded | None) -> tuple[int, ...]:
        """The shape of a sample where nobody gives one: the model's own.

        A model of any size whose context decides it (super-resolution) overrides this. encoding: the context, encoded.
        ValueError, one line: nothing decides it.
        """
        if None in self.shape:
            raise ValueError(
                f"this {type(self).__name__} models data of any size: give sample(..., shape=(C, H, W))"
            )
        return self.shape


def no_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a volume-preserving map: zeros, (B,), at least float32."""
    return torch.zeros(
        x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
    )
