"""The one contract that every layer and every model of this house keeps."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flows.bases import StandardNormal


class Flow(nn.Module, ABC):
    """A bijection z = f(x) with log|det df/dx|.

    Layers map tensor to tensor. `log_det` is in nats, one number an image, shape (B,), at least float32.
    `context` is what a conditional flow depends on; layers without a use for it ignore it.
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

    Differs from a layer in one thing: the latent is a tuple, one tensor a level, also where there is one level.
    Subclasses set `shape` (of one datum) and `latent_shapes` (of one latent each), and `n_classes` where the context
    is a class, (B,) int64.

    noise_shape: None where the log-determinant is exact; else the shape of one datum's noise, uniform on [0, 1), from
    which it is estimated: `log_prob`, `forward` and `inverse` then take the noise (B, *noise_shape) after the context.
    needs_autograd: whether evaluation takes gradients, and so has to run under `torch.enable_grad`.
    """

    shape: tuple[int, ...]
    latent_shapes: tuple[tuple[int, ...], ...]
    n_classes: int | None = None
    noise_shape: tuple[int, ...] | None = None
    needs_autograd = False
    base = StandardNormal()

    @abstractmethod
    def forward(self, x: Tensor, context=None) -> tuple[tuple[Tensor, ...], Tensor]:
        """x (B, *shape) to latents, a tuple of (B, *latent_shape), and log_det (B,) in nats."""

    @abstractmethod
    def inverse(self, z: tuple[Tensor, ...], context=None) -> tuple[Tensor, Tensor]:
        """Latents to x (B, *shape) and the log_det of the inverse, (B,) in nats."""

    def log_prob(self, x: Tensor, context=None) -> Tensor:
        """log p(x) = log p(z) + log|det dz/dx|, nats, (B,) (Dinh et al. 2017, section 3.1). ValueError: wrong shape."""
        self.check_shape(x)
        latents, log_det = self(x, context)
        return self.base.log_prob(latents) + log_det

    def compile(self, *args, **kwargs) -> None:
        """torch.compile every conditioner: those of one shape share their graphs. The whole flow would take minutes.

        All conditioners are one piece of code, with a graph for each shape, and each batch size and mode they are
        called in: soon more than the 8 after which torch stops compiling and says so in a log only.
        """
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for layer in self.modules():
            if hasattr(layer, "conditioner"):
                layer.conditioner.compile(*args, **kwargs)
            if hasattr(layer, "by_hand"):
                layer.by_hand = False  # else it would not call its conditioners

    def check_shape(self, x: Tensor) -> None:
        """ValueError, one line: x is not (B, *shape)."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"{type(self).__name__} was built for data of shape {self.shape}, not {tuple(x.shape[1:])}"
            )

    def initialize(self, x: Tensor, context=None) -> None:
        """Set what depends on data from a first batch, (B, *shape), where the model has such layers."""

    def sample(
        self, n: int, temperature: float = 1.0, context=None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n data points, (n, *shape): x = f^-1(tau * eps), eps ~ base. Call it in eval mode.

        With a context of B rows (a tensor, or a tuple of them) n are drawn for each row: (n, B, *shape).
        Images come out in about [0, 1]: a model whose data passed a logit reaches a little beyond.
        """
        like = next(self.parameters())
        if context is None:
            return self.inverse(self.base.sample(n, self.latent_shapes, temperature, generator, like))[0]
        rows = len(context[0] if isinstance(context, tuple) else context)
        latents = self.base.sample(n * rows, self.latent_shapes, temperature, generator, like)
        return self.inverse(latents, repeated(context, n))[0].unflatten(0, (n, rows))


def no_log_det(x: Tensor) -> Tensor:
    """The log-determinant of a volume-preserving map: zeros, (B,), at least float32."""
    return torch.zeros(x.shape[0], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def repeated(context: Tensor | tuple[Tensor, ...], n: int) -> Tensor | tuple[Tensor, ...]:
    """All rows of a context n times over: B rows become n * B."""
    if isinstance(context, tuple):
        return tuple(repeated(part, n) for part in context)
    return context.repeat(n, *[1] * (context.dim() - 1))
